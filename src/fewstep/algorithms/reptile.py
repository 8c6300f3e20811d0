"""Reptile (Nichol, Achiam, Schulman 2018, arXiv 1803.02999, Algorithms 1 and 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fewstep.errors import InputError
from fewstep.functional import Loss
from fewstep.learner import Learner
from fewstep.task import Batch, Task, is_pair
from fewstep.updates import SGD


def reptile(model: nn.Module, loss: Loss, *, lr: float, steps: int = 1, pool: bool = True,
            **options: Any) -> Learner:  # fmt: skip
    """The start moves towards the adapted parameters: the meta-gradient is theta - theta'.

        theta_i' = theta - alpha * grad L_i(theta; support and query),  `steps` times
        pseudo-gradient  sum_i (theta - theta_i')

    The outer objective `learner(tasks)` has the query loss at theta' as its value and theta - theta' as its gradient by
    theta. The mean over a batch of tasks is the paper's batched version (Algorithm 2), batches of one task its serial
    one (Algorithm 1); `torch.optim.SGD(learner.parameters(), lr=epsilon)` takes its outer step. With one inner step it
    is alpha times the gradient of the mean loss: joint training. The effect that MAML has as well begins with two.

    In training nothing is held out, so the value is a loss on examples that were adapted to. `path`, `adapt` and
    `evaluate` adapt to the support set alone, as for any method.

    Derivatives: first order. Gradient evaluations per task: `steps`, and one of the loss without a gradient. Memory:
    one set of parameters per task, whatever the number of steps. Meta-learned: what adapts, by default everything;
    other parameters stay as they are.

    lr : alpha, the inner learning rate
    steps : inner steps in training; at least 2 for more than joint training
    pool : whether the inner loop of training sees the query examples of `(x, y)` batches too; batches of another form
        cannot be joined, and there it sees the support set only
    options : as for `fewstep.Learner`, but for the derivative, of which there is none

    `InputError` where a stream of support batches is to be pooled.

    >>> from fewstep import Task
    >>> model = nn.Linear(1, 1, bias=False)                # L = w^2, w' = w - 2 alpha w = 0.8
    >>> _ = nn.init.constant_(model.weight, 1.0)
    >>> learner = reptile(model, nn.functional.mse_loss, lr=0.1)
    >>> x, y = torch.ones(1, 1, 1), torch.zeros(1, 1, 1)
    >>> loss = learner(Task(support=(x, y), query=(x, y)))
    >>> loss.sum().backward()
    >>> round(loss.item(), 4), round(model.weight.grad.item(), 4)   # w'^2 and w - w'
    (0.64, 0.2)
    """
    if pool and options.get("stream"):
        raise InputError(
            "a stream of support batches cannot be joined with the query set; use pool=False "
            "(--algorithm-options pool=False)"
        )
    return Learner(model, loss, SGD(lr), steps=steps, derivative="none", outer=PseudoGradient(pool), **options)


@dataclass(frozen=True)
class PseudoGradient:
    """The outer objective of Reptile: the query loss [B] as the value, theta - theta' as the gradient.

    pool : whether the inner loop sees the query examples of `(x, y)` batches too
    """

    pool: bool = True

    def __call__(self, learner: Learner, tasks: Task) -> Tensor:
        loop = learner.inner_loop(_union(tasks) if self.pool else tasks.support, learner.steps)
        theta = start = next(loop)  # the one part with a graph: theta, or what a start makes of it
        with torch.no_grad():
            for theta in loop:  # noqa: B007
                pass
            value = learner.query_loss(theta, learner.steps, tasks)
            theta = learner.objective.in_order(theta, start, len(value))
        squares = [(start[name] - theta[name]).square().reshape(len(value), -1).sum(1) for name in start]
        half = 0.5 * torch.stack(squares).sum(0)  # its gradient is theta - theta'
        return value + (half - half.detach())


def _union(tasks: Task) -> Batch:
    """Support and query examples of each task as one batch, where batches are `(x, y)`."""
    if not is_pair(tasks.support):
        return tasks.support
    return tree_map(lambda support, query: torch.cat([support, query], 1), tasks.support, tasks.query)
