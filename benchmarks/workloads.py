"""What is measured: a model, a loss and random tasks of the paper's shapes; and the loop that is the yardstick."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from benchmarks.transformer import Transformer
from fewstep import Learner, Task, losses, maml, models
from fewstep.functional import Loss
from fewstep.patterns import matching

Contender = Callable[[Task], Tensor]


@dataclass(frozen=True)
class Workload:
    """A model to meta-train, tasks for it, and the setting of its inner loop.

    turn : meta-steps in a row that are timed together: several where one is short, as in training
    device : where it is to be computed
    """

    name: str
    model: nn.Module
    loss: Loss
    tasks: Task
    lr: float
    steps: int
    adapt: str = "*"
    turn: int = 1
    device: str = "cpu"

    @property
    def tiny(self) -> bool:
        """Whether a step is so short that Adam and calls count, and caches do not."""
        return self.turn >= 10

    @cached_property
    def adapted(self) -> list[str]:
        """The names of the parameters that the inner loop changes."""
        return matching([name for name, _ in self.model.named_parameters()], self.adapt)

    def share(self, part: int, parts: int) -> Workload:
        """The same with one part of the tasks only."""
        size = self.tasks.size
        low, high = part * size // parts, (part + 1) * size // parts
        return replace(self, tasks=self.tasks.select(slice(low, high)))

    def to(self, device: str) -> Workload:
        """The same, computed on a device."""
        return replace(self, model=self.model.to(device), tasks=self.tasks.to(device), device=device)

    def ours(self, **options: Any) -> Learner:
        """The learner of this library."""
        return maml(self.model, self.loss, lr=self.lr, steps=self.steps, adapt=self.adapt, **options)

    def naive(self, tasks: Task) -> Tensor:
        """The query losses [B] by plain autograd through one task after another, for any module."""
        queries = []
        for task in one_by_one(tasks):
            (support_x, support_y), (query_x, query_y) = task
            theta: dict[str, Tensor] = dict(self.model.named_parameters())
            for _ in range(self.steps):
                value = self.loss(functional_call(self.model, theta, (support_x,)), support_y)
                grads = torch.autograd.grad(value, [theta[name] for name in self.adapted], create_graph=True)
                theta = {**theta, **{n: theta[n] - self.lr * g for n, g in zip(self.adapted, grads, strict=True)}}
            queries.append(self.loss(functional_call(self.model, theta, (query_x,)), query_y))
        return torch.stack(queries)

    def meta_step(self, contender: Contender) -> None:
        """Zero the gradients, take the loss, go back."""
        self.model.zero_grad()
        contender(self.tasks).sum().backward()  # type: ignore[no-untyped-call]

    def meta_gradient(self, contender: Contender) -> Tensor:
        """The meta-gradient of the summed query losses as one flat vector."""
        self.meta_step(contender)
        return flat_gradient(self.model)

    def rounding(self, draws: int = 8) -> float:
        """How far the naive loop's own meta-gradient moves, at most, when every weight moves by 1e-7 of itself.

        Where that puts an activation on the other side of a ReLU's kink, it is much more than 1e-7.
        """
        before = self.meta_gradient(self.naive)
        start = [value.detach().clone() for value in self.model.parameters()]
        errors = []
        for draw in range(draws):
            torch.manual_seed(draw)
            for value, own in zip(self.model.parameters(), start, strict=True):
                value.data = own * (1 + 1e-7 * torch.randn_like(own))
            errors.append(float((self.meta_gradient(self.naive) - before).norm() / before.norm()))
        for value, own in zip(self.model.parameters(), start, strict=True):
            value.data = own
        return max(errors)


def flat_gradient(model: nn.Module) -> Tensor:
    """The gradients of all parameters as one vector, with zeros where a parameter has no part in the loss."""
    values = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([value.flatten() for value in values])


def one_by_one(tasks: Task) -> list[Task]:
    """The tasks without their task axis."""
    return [tasks.select(torch.tensor(i)) for i in range(tasks.size)]


def sinusoid(tasks: int = 25) -> Workload:
    """The paper's regression (section 5.1): 10 shots and 10 queries."""
    torch.manual_seed(0)
    x, y = torch.rand(2, tasks, 10, 1), torch.rand(2, tasks, 10, 1)
    data = Task((x[0], y[0]), (x[1], y[1]))
    return Workload("sinusoid", models.mlp(), functional.mse_loss, data, lr=0.01, steps=1, turn=100)


def omniglot(tasks: int = 32, ways: int = 5, queries: int = 1, steps: int = 1, lr: float = 0.4, turn: int = 3,
             name: str = "omniglot-5way-1shot") -> Workload:  # fmt: skip
    """Omniglot, 1 shot, on random pictures. queries : of each class"""
    torch.manual_seed(0)
    shape = (1, 28, 28)
    data = Task(pictures(tasks, ways, ways, shape), pictures(tasks, queries * ways, ways, shape))
    return Workload(name, models.conv4(ways), losses.summed_over_ways, data, lr, steps, "~*.offset", turn)


def miniimagenet(steps: int, support: int, query: int, size: int, tasks: int = 1) -> Workload:
    """The network for Mini-ImageNet, 5 ways, on random pictures."""
    torch.manual_seed(0)
    model = models.conv4(5, channels=3, size=size, filters=32, pool=True)
    shape = (3, size, size)
    data = Task(pictures(tasks, support, 5, shape), pictures(tasks, query, 5, shape))
    return Workload("miniimagenet-5way-1shot", model, losses.summed_over_ways, data, 0.01, steps, "~*.offset")


def transformer(tasks: int = 8) -> Workload:
    """Sequences of 32 random tokens in 5 classes, 5 shots and 5 queries of each; every parameter adapts."""
    torch.manual_seed(0)
    sets = [(torch.randint(64, (tasks, 25, 32)), pictures(tasks, 25, 5, ())[1]) for _ in range(2)]
    return Workload(
        "transformer", Transformer(5), functional.cross_entropy, Task(*sets), lr=0.05, steps=3, turn=3
    )  # fmt: skip


def pictures(tasks: int, count: int, ways: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Random x [tasks, count, *shape] in 0..1 and the labels y [tasks, count] that repeat 0..ways-1."""
    labels = torch.arange(count).remainder(ways).expand(tasks, -1).clone()
    return torch.rand(tasks, count, *shape), labels


# Each by its number of tasks.
WORKLOADS: dict[str, Callable[[int], Workload]] = {
    "sinusoid": sinusoid,
    "omniglot-5way-1shot": omniglot,
    "omniglot-5way-1shot-15q": lambda tasks: omniglot(tasks, queries=15, turn=1, name="omniglot-5way-1shot-15q"),
    "omniglot-20way-1shot": lambda tasks: omniglot(tasks, 20, 1, 5, 0.1, 1, "omniglot-20way-1shot"),
    "miniimagenet-5way-1shot": lambda tasks: miniimagenet(5, 5, 75, 84, tasks),
    "transformer": transformer,
}
TASKS = {
    "sinusoid": 25, "omniglot-5way-1shot": 32, "omniglot-5way-1shot-15q": 32, "omniglot-20way-1shot": 16,
    "miniimagenet-5way-1shot": 4, "transformer": 8,
}  # fmt: skip


def origin(module: str) -> str:
    """How to get the numbers again: command, versions, threads, machine and commit."""
    here = Path(__file__).parent
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True)
    program = ["fewstep"] if sys.argv[1:2] == ["bench"] else ["python", "-m", module]
    command = shlex.join([*program, *sys.argv[1:]])
    commit = git.stdout.strip() or "unknown"
    return (
        f"{command}\ntorch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}, "
        f"commit {commit}"
    )
