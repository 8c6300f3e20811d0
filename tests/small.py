"""A small net, tasks for it, and its meta-gradient, for tests of what learners do with models of the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import prune

from fewstep import Learner, Task, maml
from fewstep.engine import Engine
from tests.reference import meta_gradient, naive_losses

LOOP = Engine(method="loop")


def draw(seed: int = 1) -> Task:
    torch.manual_seed(seed)
    x, y = torch.randn(2, 3, 5, 4, dtype=torch.float64), torch.randn(2, 3, 5, 2, dtype=torch.float64)
    return Task(support=(x[0], y[0]), query=(x[1], y[1]))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.other = nn.Linear(4, 6).double(), nn.Linear(6, 2).double(), nn.Linear(6, 2).double()
        self.register_buffer("mask", torch.ones(6, dtype=torch.float64))
        self.offset = nn.Parameter(torch.zeros(6, dtype=torch.float64), requires_grad=False)
        self.use_other = False

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.a(x).tanh() * self.mask + self.offset)

    def head(self, hidden: Tensor) -> Tensor:
        result: Tensor = (self.other if self.use_other else self.b)(hidden)
        return result


def learned(model: nn.Module, engine: Engine | None = None, **options: Any) -> Learner:
    return maml(model, functional.mse_loss, lr=0.1, steps=2, engine=engine or Engine(), **options)


def gradient(learner: Learner, tasks: Task | None = None) -> Tensor:
    own = [value for value in learner.parameters() if value.requires_grad]
    return meta_gradient(learner(tasks or draw()), own)


def naive_gradient(model: nn.Module, tasks: Task, adapted: Sequence[str]) -> Tensor:
    """What `gradient(learned(model), tasks)` has to be, by the naive loop."""
    own = [value for value in model.parameters() if value.requires_grad]
    return meta_gradient(naive_losses(model, functional.mse_loss, tasks, lr=0.1, steps=2, adapted=adapted), own)


def pruned(model: Net) -> Net:
    prune.l1_unstructured(model.a, "weight", 0.4)  # type: ignore[no-untyped-call]
    return model
