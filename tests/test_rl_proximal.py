"""ProMP's penalty against plain loops, and its options."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.distributions import kl_divergence
from torch.func import functional_call

from fewstep import InputError, Learner, Task
from fewstep.meta_step import MetaStep
from fewstep.recipes import RECIPES
from fewstep.recipes.policies import PolicyRecipe
from fewstep.rl import Ascent, GaussianPolicy, ProximalPenalty
from fewstep.rl.experience import Experience
from fewstep.rl.surrogates import Clipped, likelihood_ratio
from fewstep.updates import SGD
from tests.reference import relative_error
from tests.test_rl import LR, _With, distribution, explorer_of, flat, run_of, tasks_of


def moved(steps: int, **options: Any) -> tuple[Learner, Task]:
    """A learner, and what it lived through before its parameters moved a little."""
    torch.manual_seed(0)
    policy = GaussianPolicy(2, 2, (5,)).double()
    learner = Learner(policy, Clipped(0.3), SGD(LR), steps=steps, inner_loss=likelihood_ratio, stream=True,
                      outer=ProximalPenalty(0.7), **options)  # fmt: skip
    experience = explorer_of(learner).explore(tasks_of())
    with torch.no_grad():
        for value in learner.parameters():
            value.add_(torch.randn_like(value), alpha=0.05)
    return learner, experience


def naive_divergence(policy: Any, theta: dict[str, Tensor], lived: Experience) -> Tensor:
    """Step by step, by PyTorch's distributions."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    outputs = functional_call(policy, theta, (lived.observations,))
    for old, new, taken in zip(*(part.flatten(0, 1) for part in (lived.outputs, outputs, lived.mask)), strict=True):
        if taken:
            total = total + kl_divergence(distribution(policy, old), distribution(policy, new))
            count += 1
    return total / count


@pytest.mark.parametrize("steps", [0, 1, 2])
@pytest.mark.parametrize("adapt", ["*", "mean.*"])
def test_the_penalty_is_that_of_plain_loops(adapt: str, steps: int) -> None:
    learner, experience = moved(steps, adapt=adapt)
    policy: Any = learner.model
    objectives, penalties = [], []
    for number in range(3):
        support, query = run_of(experience, number)
        theta, away = dict(policy.named_parameters()), [torch.zeros((), dtype=torch.float64)]
        for step in range(steps):
            batch = Experience(*[part[step] for part in support])
            away.append(naive_divergence(policy, theta, batch))
            own = {name: value for name, value in theta.items() if adapt == "*" or name.startswith("mean.")}
            loss = likelihood_ratio(cast(Any, _With(policy, theta)), batch)
            grads = torch.autograd.grad(loss, list(own.values()), create_graph=True)
            theta = {**theta, **{n: v - LR * g for (n, v), g in zip(own.items(), grads, strict=True)}}
        penalties.append(torch.stack(away).sum() / max(steps, 1))
        objectives.append(Clipped(0.3)(cast(Any, _With(policy, theta)), query) + 0.7 * penalties[-1])
    ours, naive = learner(experience), torch.stack(objectives)
    torch.testing.assert_close(ours, naive)
    assert (torch.stack(penalties) > 1e-4).all() or not steps
    trained = list(learner.parameters())
    first, second = (flat(torch.autograd.grad(found.mean(), trained)) for found in (ours, naive))
    assert relative_error(first, second) < 1e-8


def test_the_penalty_holds_the_policy_back() -> None:
    """Over several epochs; the first one does not notice."""
    ends = []
    for weight in (1e-9, 1e3):
        torch.manual_seed(0)
        learner = Learner(GaussianPolicy(2, 2, (5,)), Clipped(), SGD(LR), steps=1, inner_loss=likelihood_ratio,
                          stream=True, outer=ProximalPenalty(weight))  # fmt: skip
        tasks, start = tasks_of(), flat(learner.parameters()).detach()
        for epochs in (1, 9):
            step = MetaStep(learner, torch.optim.SGD(learner.parameters()))
            Ascent(explorer_of(learner), step, epochs)(tasks, 1e-3)
            ends.append((flat(learner.parameters()).detach() - start).norm().item())
    assert ends[0] == pytest.approx(ends[2], rel=1e-4)
    assert ends[3] < 0.5 * ends[1]


def test_options_of_promp() -> None:
    navigation = cast(PolicyRecipe, RECIPES["navigation"])
    learner = dataclasses.replace(navigation, outer="ppo", ratio_clip=0.3, kl_penalty=5e-4).learner()
    assert isinstance(learner.loss, Clipped)
    assert isinstance(learner.outer, ProximalPenalty)
    assert (learner.loss.clip, learner.outer.weight) == (0.3, 5e-4)
    wrong: dict[str, Any]
    for wrong, message in (
        ({"kl_penalty": 0.1}, "--kl-penalty 0.1 has no part in --outer trpo"),
        ({"ratio_clip": 0.3, "outer": "adam"}, "--ratio-clip 0.3 has no part in --outer adam"),
        ({"kl_penalty": 0.1, "outer": "ppo", "correction": 1.0}, "--correction and --kl-penalty are outer objectives"),
    ):
        with pytest.raises(InputError, match=message):
            dataclasses.replace(navigation, **wrong)
    for wrong, message in (
        ({"ratio_clip": -1.0}, "the ratio's clip must be above 0 and finite, but -1.0 came"),
        ({"kl_penalty": -0.1}, "the weight of the penalty must be above 0 and finite, but -0.1 came"),
        (
            {"kl_penalty": 0.1, "algorithm": "bmg"},
            "--algorithm bmg has its own outer objective; leave out --kl-penalty",
        ),
    ):
        with pytest.raises(InputError, match=message):
            dataclasses.replace(navigation, outer="ppo", **wrong).learner()
