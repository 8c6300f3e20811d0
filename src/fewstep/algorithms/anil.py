"""ANIL: almost no inner loop (Raghu, Raghu, Bengio, Vinyals 2020, arXiv 1909.09157, section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from fewstep.functional import Loss
from fewstep.learner import Learner
from fewstep.patterns import adapted_part
from fewstep.updates import SGD


def anil(model: nn.Module, loss: Loss, *, lr: float, steps: int = 1, head: str | None = None,
         adapt: str | Sequence[str] = "*", **options: Any) -> Learner:  # fmt: skip
    """MAML in which only the head adapts; the body is meta-learned, and the same for all tasks.

        head_i' = head - alpha * grad_head L_i(body, head; support),  `steps` times
        minimise  sum_i L_i(body, head_i'; query)  over body and head

    Derivatives: second order, by Hessian-vector products. Gradient evaluations per task: as for MAML, but those by the
    head are cheap. Memory: the head of each step. Meta-learned: all parameters.

    lr, steps : alpha and the inner steps in training
    head : name of the submodule that adapts, the last linear layer unless given
    adapt : patterns that say what of the head adapts
    options : as for `fewstep.Learner`

    `InputError` where the model has no such head, or the patterns leave nothing of it.

    >>> import torch
    >>> from fewstep import Task
    >>> model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))   # L = (v u x - y)^2
    >>> for layer in model: _ = nn.init.constant_(layer.weight, 1.0)
    >>> x, y = torch.ones(1, 1, 1), torch.zeros(1, 1, 1)       # u stays, v' = v - 2 alpha u (v u) = 0.8
    >>> learner = anil(model, nn.functional.mse_loss, lr=0.1)
    >>> round(learner(Task(support=(x, y), query=(x, y))).item(), 4)
    0.64
    """
    return Learner(model, loss, SGD(lr), steps=steps, adapt=adapted_part(model, "head", adapt, head), **options)
