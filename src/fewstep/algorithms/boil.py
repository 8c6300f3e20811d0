"""BOIL: body only update in the inner loop (Oh, Yoo, Kim, Yun 2021, arXiv 2008.08882, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from fewstep.functional import Loss
from fewstep.learner import Learner
from fewstep.patterns import adapted_part
from fewstep.updates import SGD


def boil(model: nn.Module, loss: Loss, *, lr: float, steps: int = 1, head: str | None = None,
         adapt: str | Sequence[str] = "*", **options: Any) -> Learner:  # fmt: skip
    """MAML in which everything but the head adapts, so that the features have to change for each task.

        body_i' = body - alpha * grad_body L_i(body, head; support),  `steps` times
        minimise  sum_i L_i(body_i', head; query)  over body and head

    Derivatives: second order, by Hessian-vector products. Gradient evaluations per task: as for MAML. Memory: the body
    of each step. Meta-learned: all parameters, the head among them.

    lr, steps : alpha and the inner steps in training
    head : name of the submodule that does not adapt, the last linear layer unless given
    adapt : patterns that say what of the body adapts
    options : as for `fewstep.Learner`

    `InputError` where the model has no such head, or nothing but it.

    >>> import torch
    >>> from fewstep import Task
    >>> model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))   # L = (v u x - y)^2
    >>> for layer, value in zip(model, (1.0, 2.0)): _ = nn.init.constant_(layer.weight, value)
    >>> x, y = torch.ones(1, 1, 1), torch.zeros(1, 1, 1)       # v stays 2, u' = u - 2 alpha v (v u) = 0.2
    >>> learner = boil(model, nn.functional.mse_loss, lr=0.1)
    >>> round(learner(Task(support=(x, y), query=(x, y))).item(), 4)
    0.16
    """
    return Learner(model, loss, SGD(lr), steps=steps, adapt=adapted_part(model, "body", adapt, head), **options)
