"""What a meta-learned policy is compared with: the paper's baselines, and a policy that adapts by its memory."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fewstep.baselines import Baseline
from fewstep.data.episodes import numbered_generator
from fewstep.learner import Learner
from fewstep.meta_step import MetaStep
from fewstep.rl import TRPO, Ascent, RecurrentPolicy, policy_of
from fewstep.rl.environments import Environment, Told, Trials
from fewstep.rl.surrogates import Clipped, likelihood_ratio
from fewstep.updates import SGD

if TYPE_CHECKING:
    from fewstep.recipes.policies import PolicyRecipe

RATES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
REMEMBERED = 100  # numbers in the state of a recurrent policy


def policy_baselines(recipe: PolicyRecipe) -> list[Baseline]:
    """The paper's three, where there can be an oracle, and RL^2 where the recipe wants it."""
    world, steps, seed = recipe.environment, recipe.test_steps, recipe.seed
    settings = {"iterations": recipe.pretrain_iterations, "seed": seed}
    told = Told(world, world.sample_tasks(1, numbered_generator(0, 0)).numel())
    trials = Trials(world, steps + 1)

    def oracle() -> nn.Module:
        return recipe.seeded(lambda: policy_of(told))

    def recurrent() -> nn.Module:
        return recipe.seeded(lambda: RecurrentPolicy(trials.observations, policy_of(trials, REMEMBERED, hidden=())))

    found = [
        Baseline("pre-trained on all tasks, fine-tuned", recipe.initial_model, partial(_pretrain, recipe, world),
                 settings, steps, RATES),
        Baseline("random start, fine-tuned", recipe.initial_model, lambda model: {}, {"seed": seed}, steps, RATES),
    ]  # fmt: skip
    if recipe.has_oracle:
        found.append(Baseline("oracle, told the task", oracle, partial(_pretrain, recipe, told), settings, 0))
    if recipe.recurrent_iterations:
        own = {"iterations": recipe.recurrent_iterations, "seed": seed, "episodes": trials.episodes}
        train = partial(_remember, recipe, trials)
        found.append(Baseline("RL^2, by its memory of as many episodes", recurrent, train, own, steps))
    return found


def _pretrain(recipe: PolicyRecipe, world: Environment, model: nn.Module) -> dict[str, Any]:
    """TRPO on all tasks together, without inner steps, whatever the outer rule of the recipe is."""
    learner = Learner(model, likelihood_ratio, SGD(recipe.inner_lr), steps=0, engine=recipe.engine, stream=True)
    # The recipe's stride fits its trajectories where it takes TRPO itself; there is no inner step to thin.
    region = replace(recipe.region, stride=recipe.stride if recipe.outer == "trpo" else 1, inner_stride=1)
    step = TRPO(recipe.explorer(learner, world, recipe.trajectories), region)
    episodes = recipe.episodes("train")
    for number in range(recipe.pretrain_iterations):
        step(episodes[number])
    return {}


def _remember(recipe: PolicyRecipe, trials: Trials, model: nn.Module) -> dict[str, Any]:
    """Proximal policy optimisation along whole trials, with about as many environment steps as an iteration takes."""
    learner = Learner(model, Clipped(), SGD(recipe.inner_lr), steps=0, engine=recipe.engine, stream=True)
    adam = MetaStep(learner, torch.optim.Adam(learner.parameters()))
    count = max(2, recipe.trajectories * (recipe.inner_steps + 1) // trials.episodes)
    step = Ascent(recipe.explorer(learner, trials, count), adam, recipe.epochs)
    episodes = recipe.episodes("train")
    for number in range(recipe.recurrent_iterations):
        step(episodes[number], recipe.meta_lr)
    return {}
