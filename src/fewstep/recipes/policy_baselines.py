"""What a meta-learned policy is compared with: the paper's baselines, and a policy that adapts by its memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from fewstep.baselines import Baseline
from fewstep.data.episodes import numbered_generator
from fewstep.distributed import from_first
from fewstep.evaluate import Evaluation, evaluate
from fewstep.learner import Learner
from fewstep.progress import narrate, progress
from fewstep.rl import TRPO, Ascent, Explorer, RecurrentPolicy, policy_of
from fewstep.rl.environments import Environment, Told, Trials
from fewstep.rl.surrogates import Clipped, likelihood_ratio
from fewstep.run import Run
from fewstep.train import Step, Training, train
from fewstep.updates import SGD

if TYPE_CHECKING:
    from fewstep.recipes.policies import PolicyRecipe

RATES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
REMEMBERED = 100  # numbers in the state of a recurrent policy


def policy_baselines(recipe: PolicyRecipe) -> list[Baseline]:
    """The paper's three, where there can be an oracle; RL^2 and first-order MAML where the recipe wants these."""
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
        Baseline("random start, fine-tuned", recipe.initial_model, lambda model, run: {}, {"seed": seed}, steps, RATES),
    ]  # fmt: skip
    if recipe.has_oracle:
        found.append(Baseline("oracle, told the task", oracle, partial(_pretrain, recipe, told), settings, 0))
    if recipe.recurrent_iterations:
        own = {"iterations": recipe.recurrent_iterations, "seed": seed, "episodes": trials.episodes}
        train = partial(_remember, recipe, trials)
        found.append(Baseline("RL^2, by its memory of as many episodes", recurrent, train, own, steps))
    if recipe.first_order_iterations:
        own = {"iterations": recipe.first_order_iterations, "seed": seed}
        found.append(Baseline("first-order MAML", recipe.initial_model, partial(_first_order, recipe), own, steps,
                              [recipe.inner_lr]))  # fmt: skip
    return found


def _pretrain(recipe: PolicyRecipe, world: Environment, model: nn.Module, run: Run) -> dict[str, Any]:
    """TRPO on all tasks together, without inner steps, whatever the outer rule of the recipe is."""
    learner = Learner(model, likelihood_ratio, SGD(recipe.inner_lr), steps=0, engine=recipe.engine, stream=True)
    # The recipe's stride fits its trajectories where it takes TRPO itself; there is no inner step to thin.
    region = replace(recipe.region, stride=recipe.stride if recipe.outer == "trpo" else 1, inner_stride=1)
    explorer = partial(recipe.explorer, learner, world, recipe.trajectories)
    return _still(
        recipe, learner, explorer, lambda own, adam: TRPO(explorer(), region), recipe.pretrain_iterations, run
    )


def _remember(recipe: PolicyRecipe, trials: Trials, model: nn.Module, run: Run) -> dict[str, Any]:
    """Proximal policy optimisation along whole trials, with about as many environment steps as an iteration takes."""
    engine = replace(recipe.engine, compile="no")  # a trace would have each of thousands of steps in it
    learner = Learner(model, Clipped(), SGD(recipe.inner_lr), steps=0, engine=engine, stream=True)
    count = max(2, recipe.trajectories * (recipe.inner_steps + 1) // trials.episodes)
    explorer = partial(recipe.explorer, learner, trials, count)
    return _still(recipe, learner, explorer, lambda own, adam: Ascent(explorer(), adam, recipe.epochs),
                  recipe.recurrent_iterations, run)  # fmt: skip


def _still(recipe: PolicyRecipe, learner: Learner, explorer: Callable[[], Explorer],
           step_of: Callable[[Learner, Step], Step], iterations: int, run: Run) -> dict[str, Any]:  # fmt: skip
    """Train a learner that takes no inner steps. explorer : makes one, for training and for validation"""

    def validate(learner: Learner) -> Evaluation:
        episodes, count = recipe.episodes("validation"), recipe.validation_episodes
        return evaluate(explorer(), episodes, metric=recipe.metric, steps=0, count=count)

    training = replace(recipe.training(), iterations=iterations, schedule="constant", clip=None, keep=1)
    return _trained(recipe, learner, step_of, validate, training, run)


def _first_order(recipe: PolicyRecipe, model: nn.Module, run: Run) -> dict[str, Any]:
    """MAML, trained as the recipe trains its learner, but for the derivative."""
    plain = replace(recipe, algorithm="maml", algorithm_options="", derivative="none", keep=1,
                    iterations=recipe.first_order_iterations, first_order_iterations=0)  # fmt: skip
    return _trained(plain, plain.learner(model), plain.step_of, plain.validate, plain.training(), run)


def _trained(recipe: PolicyRecipe, learner: Learner, step_of: Callable[[Learner, Step], Step],
             validate: Callable[[Learner], Evaluation], training: Training, run: Run) -> dict[str, Any]:  # fmt: skip
    """Train a learner in a run's folder, from which it goes on; the last weights are what counts."""
    done, total = from_first(lambda: (run.load_state() or {"step": 0})["step"]), training.iterations
    if done > total:  # of before, when more were asked for
        run.delete("trainer.pt")
        done = 0
    narrate(f"training what to compare with: iteration {done} of {total}, in {run.path}")
    with progress(total, done=done) as report:
        train(learner, recipe.episodes("train"), training, run, validate=validate, step_of=step_of, report=report)
    return {}
