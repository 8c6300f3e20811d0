"""WarpGrad: meta-learning with warped gradient descent (Flennerhag et al. 2020, arXiv 1909.00025)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.algorithms.t_net import t_net
from fewstep.errors import InputError
from fewstep.functional import Loss, Objective, Place, tensors_by_name
from fewstep.gradient import inner_gradient
from fewstep.learner import Learner
from fewstep.models.warp import add_warp, warps_of
from fewstep.task import Task, at_step


class WarpMAML:
    """The query loss [B] after the inner loop; by what warps learn and by what all else: an outer objective.

    warps : names of the warp parameters, "model.NAME"
    """

    def __init__(self, warps: Collection[str]) -> None:
        self.warps = set(warps)

    def __call__(self, learner: Learner, tasks: Task) -> Tensor:
        with held(learner.objective, self.warps):
            path = list(learner.inner_loop(tasks.support, learner.steps))
            result = learner.query_loss(path[-1], learner.steps, tasks)
        with held(learner.objective, set(learner.objective.shared) - self.warps):
            along = self.along([{name: value.detach() for name, value in theta.items()} for theta in path],
                               learner, tasks)  # fmt: skip
        return result + (along - along.detach())

    def along(self, path: Sequence[dict[str, Tensor]], learner: Learner, tasks: Task) -> Tensor:
        """The query loss [B] one step further, from each theta of the path but the last: the mean over these."""
        losses = []
        for k, theta in enumerate(path[:-1]):
            support = at_step(tasks.support, k, learner.stream, axis=1)
            _, gradient = inner_gradient(*learner.problem(theta, support, Place(k, query=False)))
            moved, _ = learner.update(theta, tensors_by_name(list(theta), gradient), None, k)
            losses.append(learner.query_loss(moved, k + 1, tasks))
        return torch.stack(losses).mean(0)


def held(objective: Objective, names: Collection[str]) -> AbstractContextManager[None]:
    """Inside, no derivative goes through the parameters of these names: what is added to each is 0, and minus it."""
    own = {**dict(objective.module.named_parameters()), **objective.per_step}
    chosen = [own[name] for name in names if name in own]  # measured statistics have no derivative anyway
    return objective.shifted({id(value): value.detach() - value for value in chosen})


def warp_grad(model: nn.Module, loss: Loss, *, lr: float, steps: int = 1, adapt: str | Sequence[str] = "*",
              **options: Any) -> Learner:  # fmt: skip
    """Warp-MAML: warp layers that learn to make each inner step a good one, wherever on the path it starts.

        warps phi :  minimise  sum_i mean_k L_i(theta_k - alpha * grad L_i(theta_k, phi; support), phi; query)
                     over the thetas of the path, k = 0 ... steps - 1, which count as constants
        all else  :  minimise  sum_i L_i(theta_steps, phi; query),  as MAML does, phi a constant

    The warps are linear maps after each layer but the head, as in T-net (`fewstep.models.add_warp`, IN PLACE); with one
    step it is T-net. Derivatives: second order; `derivative="none"` is the paper's cheaper approximation. Gradient
    evaluations per task: 3 steps + 1, and 2 steps products. Memory: the parameters of two paths. Meta-learned: the
    start, all warps, and all other shared parameters.

    The value is the query loss after the last step; the warps' own objective gives their gradient only.

    adapt : patterns of what adapts, from which the warps are taken away
    lr, steps, options : as for `maml`; steps at least 1

    >>> from fewstep import Task
    >>> model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))     # u T w x
    >>> for value in model.parameters():
    ...     _ = nn.init.constant_(value, 1.0)
    >>> learner = warp_grad(model, nn.functional.mse_loss, lr=0.1)
    >>> x, y = torch.ones(1, 1, 1), torch.zeros(1, 1, 1)
    >>> loss = learner(Task(support=(x, y), query=(x, y)))   # u' = w' = 1 - 0.1 * 2 = 0.8: (0.8 * 0.8)^2
    >>> round(loss.item(), 4)
    0.4096
    """
    if steps == 0:
        raise InputError("warps learn from inner steps: steps must be at least 1, but 0 came")
    if not warps_of(model):
        add_warp(model)
    outer = WarpMAML({f"model.{name}" for name in warps_of(model)})
    return t_net(model, loss, lr=lr, steps=steps, adapt=adapt, outer=outer, **options)
