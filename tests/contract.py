"""What tests of all methods share: the models, losses and tasks that each method is built on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fewstep import Learner, Task, algorithms, models
from fewstep.functional import Loss

TASKS, STEPS, LR = 3, 2, 0.1


@dataclass(frozen=True)
class Case:
    """A model, a loss, and a batch of one set of TASKS tasks."""

    model: Callable[[], nn.Module]
    loss: Loss
    batch: Callable[[], Any]


def policy_gradient(policy: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """-mean(log pi(a|o) adv)"""
    chosen: Tensor = policy(batch["obs"]).log_softmax(-1).gather(-1, batch["act"].unsqueeze(-1)).squeeze(-1)
    return -(chosen * batch["adv"]).mean()


def squares(prediction: Tensor, y: Tensor) -> Tensor:
    """Towards one-hot labels. Unlike cross-entropy it is not blind to what the rows of a head have in common."""
    return (prediction - torch.eye(prediction.shape[-1], dtype=prediction.dtype)[y]).square().mean()


def labels(examples: int, ways: int) -> Tensor:
    """Of each task, with an example of each class."""
    return torch.arange(examples).remainder(ways).expand(TASKS, -1).clone()


CASES = {
    "regression": Case(
        lambda: models.mlp(2, 1, (6, 5), init="xavier"),
        functional.mse_loss,
        lambda: (torch.randn(TASKS, 5, 2), torch.randn(TASKS, 5, 1)),
    ),
    "convolution": Case(
        lambda: models.conv4(3, filters=4, size=16),
        functional.cross_entropy,
        lambda: (torch.randn(TASKS, 6, 1, 16, 16), labels(6, 3)),
    ),
    "policy": Case(
        lambda: models.mlp(3, 4, (6,), init="xavier"),
        policy_gradient,
        lambda: {
            "obs": torch.randn(TASKS, 7, 3),
            "act": torch.randint(4, (TASKS, 7)),
            "adv": torch.randn(TASKS, 7),
        },
    ),
}
"""What every method has to do."""

OTHERS = {
    f"{ways} ways": Case(
        lambda: models.mlp(4, 3, (6,), init="xavier"),
        squares,
        lambda ways=ways: (torch.randn(TASKS, 2 * ways + 1, 4), labels(2 * ways + 1, ways)),  # type: ignore[misc]
    )
    for ways in (2, 5)
} | {
    "batch norm": Case(
        lambda: nn.Sequential(
            nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Tanh(), nn.Linear(4, 2)
        ),
        functional.cross_entropy,
        lambda: (torch.randn(TASKS, 6, 3), labels(6, 2)),
    )
}
"""What only some have to do: a head for 3 ways in tasks of other ways, and norms with weight and bias."""

LABELS = "its head starts from class labels"
EXCEPT = {("proto_maml", "regression"): LABELS, ("proto_maml", "policy"): LABELS,
          ("unicorn_maml", "regression"): LABELS, ("unicorn_maml", "policy"): LABELS}  # fmt: skip
"""Where a method makes no sense, and why."""

TOLERANCE = {"hf_maml": 1e-6}
"""A difference of two gradients has noise of its own."""

PAIRS = [
    pytest.param(name, case, id=f"{name}-{case}")
    for name in algorithms.__all__
    for case in CASES
    if (name, case) not in EXCEPT
]
every_pair = pytest.mark.parametrize(("name", "case"), PAIRS)


def case_of(case: str) -> Case:
    return CASES[case] if case in CASES else OTHERS[case]


def build(name: str, case: str, seed: int = 0, **options: Any) -> Learner:
    """The method on the model of a case, all parameters away from where they start."""
    torch.manual_seed(seed)
    model, loss = case_of(case).model(), case_of(case).loss
    learner: Learner = getattr(algorithms, name)(model, loss, **{"lr": LR, "steps": STEPS, **options})
    learner.iteration = 0
    with torch.no_grad():
        for value in learner.parameters():
            value.add_(0.05 * torch.randn_like(value))
    return learner


def tasks_of(case: str) -> Task:
    torch.manual_seed(7)
    return Task(case_of(case).batch(), case_of(case).batch())
