"""BMG: bootstrapped meta-gradients (Flennerhag et al. 2022, arXiv 2109.04504)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fewstep.errors import InputError
from fewstep.functional import Loss
from fewstep.learner import Learner
from fewstep.task import Task
from fewstep.updates import SGD
from fewstep.updates.common import positive


class Bootstrap:
    """The query loss [B] after the inner loop, with the gradient of the distance to a later target: an outer objective.

    target_steps, rate : L and the size of the target's last step
    """

    def __init__(self, target_steps: int, rate: float) -> None:
        if not isinstance(target_steps, int) or target_steps < 1:
            raise InputError(f"the target must be at least 1 step ahead, but {target_steps!r} came")
        self.target_steps, self.rate = target_steps, positive(rate, "the rate of the target's step")

    def __call__(self, learner: Learner, tasks: Task) -> Tensor:
        ahead = learner.steps + self.target_steps - 1
        path = learner.inner_loop(tasks.support, ahead)
        for _ in range(learner.steps + 1):
            theta = next(path)
        here = later = {name: value.detach() for name, value in theta.items()}
        with torch.no_grad():
            for later in path:  # noqa: B007
                pass
            problem, tensors = learner.query_problem(later, ahead, tasks)
            _, *gradient = problem.gradient(tensors, problem.theta)
        pull = torch.zeros((), dtype=gradient[0].dtype, device=gradient[0].device)
        for g, (name, value) in zip(gradient, theta.items(), strict=True):
            away = (here[name] - later[name].detach()) / self.rate + g  # (theta_K - target) / rate
            pull = pull + ((value - here[name]) * away).reshape(len(g), -1).sum(1)  # 0, with the derivative `away`
        return learner.query_loss(here, learner.steps, tasks) + pull


def bmg(model: nn.Module, loss: Loss, *, lr: float, steps: int = 1, target_steps: int = 5, rate: float | None = None,
        **options: Any) -> Learner:  # fmt: skip
    """MAML that aims at where L further steps lead, without differentiating through these.

        target = theta_{K+L-1} - rate * grad L_i(theta_{K+L-1}; query),  the first L - 1 steps on the support set
        minimise  |theta_K - target|^2 / (2 rate)  over theta_0, the target a constant

    The paper's squared Euclidean distance as the matching function. Derivatives: second order through the K steps. With
    L = 1 the meta-gradient is MAML's. Gradient evaluations per task: steps + L + 1, and `steps` products. Memory: the
    parameters of each of the K steps. Meta-learned: the start and all shared parameters; the query loss reads these
    too, for which there is no target: that part of their gradient is MAML's.

    The value is the query loss at theta_K, so that logs compare with other methods'; the distance gives the gradient
    only. A finite difference of the value is therefore not the gradient, unless L = 1.

    lr, steps : of the K inner steps;  options : as for `fewstep.Learner`
    target_steps : L, at least 1
    rate : of the target's last step, along the query gradient; by default lr

    >>> from fewstep import Task
    >>> model = nn.Linear(1, 1, bias=False)                # L = w^2: w' = 0.8 w, and a step later 0.64 w
    >>> _ = nn.init.constant_(model.weight, 1.0)
    >>> x, y = torch.ones(1, 1, 1), torch.zeros(1, 1, 1)
    >>> learner = bmg(model, nn.functional.mse_loss, lr=0.1, target_steps=2)
    >>> loss = learner(Task(support=(x, y), query=(x, y)))
    >>> loss.sum().backward()                              # the target is 0.512: 0.8 * (0.8 - 0.512) / 0.1
    >>> round(loss.item(), 4), round(model.weight.grad.item(), 4)
    (0.64, 2.304)
    """
    outer = Bootstrap(target_steps, lr if rate is None else rate)
    return Learner(model, loss, SGD(lr), steps=steps, outer=outer, **options)
