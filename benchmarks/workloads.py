"""What is measured: a model, a loss and random tasks of the paper's shapes; and the loops that are the yardstick."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from fewstep import Learner, Task, losses, maml, models
from fewstep.functional import Loss, matching

Contender = Callable[[Task], Tensor]


@dataclass(frozen=True)
class Workload:
    """A model to meta-train, tasks for it, and the setting of its inner loop."""

    model: nn.Module
    loss: Loss
    tasks: Task
    lr: float
    steps: int
    adapt: str = "*"

    def ours(self, **options: Any) -> Learner:
        """The learner of this library."""
        return maml(self.model, self.loss, lr=self.lr, steps=self.steps, adapt=self.adapt, **options)

    def naive(self, tasks: Task) -> Tensor:
        """The query losses [B] by plain autograd through one task after another, for any module."""
        adapted = matching([name for name, _ in self.model.named_parameters()], self.adapt)
        queries = []
        for task in one_by_one(tasks):
            (support_x, support_y), (query_x, query_y) = task
            theta: dict[str, Tensor] = dict(self.model.named_parameters())
            for _ in range(self.steps):
                value = self.loss(functional_call(self.model, theta, (support_x,)), support_y)
                grads = torch.autograd.grad(value, [theta[name] for name in adapted], create_graph=True)
                theta = {**theta, **{n: theta[n] - self.lr * g for n, g in zip(adapted, grads, strict=True)}}
            queries.append(self.loss(functional_call(self.model, theta, (query_x,)), query_y))
        return torch.stack(queries)

    def by_hand(self, tasks: Task) -> Tensor:
        """The same for the sinusoid network alone, written out over a list of weights: no module is called."""
        queries = []
        for task in one_by_one(tasks):
            (support_x, support_y), (query_x, query_y) = task
            theta: list[Tensor] = list(self.model.parameters())
            for _ in range(self.steps):
                value = functional.mse_loss(relu_network(support_x, theta), support_y)
                grads = torch.autograd.grad(value, theta, create_graph=True)
                theta = [weight - self.lr * grad for weight, grad in zip(theta, grads, strict=True)]
            queries.append(functional.mse_loss(relu_network(query_x, theta), query_y))
        return torch.stack(queries)

    def meta_step(self, contender: Contender) -> None:
        """Zero the gradients, take the loss, go back."""
        self.model.zero_grad()
        contender(self.tasks).sum().backward()  # type: ignore[no-untyped-call]

    def meta_gradient(self, contender: Contender) -> Tensor:
        """The meta-gradient as one flat vector, with zeros where a parameter has no part in it."""
        self.meta_step(contender)
        values = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.model.parameters()]
        return torch.cat([value.flatten() for value in values])

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


def one_by_one(tasks: Task) -> list[Task]:
    """The tasks without their task axis."""
    return [tasks.select(torch.tensor(i)) for i in range(tasks.size)]


def relu_network(x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Linear layers with ReLU between them; weight and bias take turns in `weights`."""
    for i in range(0, len(weights) - 2, 2):
        x = functional.relu(functional.linear(x, weights[i], weights[i + 1]))
    return functional.linear(x, weights[-2], weights[-1])


def sinusoid(tasks: int = 25) -> Workload:
    """The paper's regression (section 5.1): 10 shots and 10 queries."""
    torch.manual_seed(0)
    x, y = torch.rand(2, tasks, 10, 1), torch.rand(2, tasks, 10, 1)
    return Workload(models.mlp(), functional.mse_loss, Task((x[0], y[0]), (x[1], y[1])), lr=0.01, steps=1)


def omniglot(tasks: int = 32) -> Workload:
    """Omniglot, 5 ways, 1 shot, 1 query a class, on random pictures."""
    torch.manual_seed(0)
    data = Task(pictures(tasks, 5, 5, (1, 28, 28)), pictures(tasks, 5, 5, (1, 28, 28)))
    return Workload(models.conv4(5), losses.summed_over_ways, data, lr=0.4, steps=1, adapt="~*.offset")


def miniimagenet(steps: int, support: int, query: int, size: int) -> Workload:
    """One task with the network for Mini-ImageNet, 5 ways, on random pictures."""
    torch.manual_seed(0)
    model = models.conv4(5, channels=3, size=size, filters=32, pool=True)
    data = Task(pictures(1, support, 5, (3, size, size)), pictures(1, query, 5, (3, size, size)))
    return Workload(model, losses.summed_over_ways, data, lr=0.01, steps=steps, adapt="~*.offset")


def pictures(tasks: int, count: int, ways: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Random x [tasks, count, *shape] in 0..1 and the labels y [tasks, count] that repeat 0..ways-1."""
    labels = torch.arange(count).remainder(ways).expand(tasks, -1).clone()
    return torch.rand(tasks, count, *shape), labels


def origin(module: str) -> str:
    """How to get the numbers again: command, versions, threads, machine and commit."""
    here = Path(__file__).parent
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True)
    command = shlex.join(["python", "-m", module, *sys.argv[1:]])
    commit = git.stdout.strip() or "unknown"
    return (
        f"{command}\ntorch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}, "
        f"commit {commit}"
    )
