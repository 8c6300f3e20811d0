"""FOMAML: first-order MAML (Finn et al. 2017, section 5.2, "first-order approximation")."""

from __future__ import annotations

from typing import Any

from torch import nn

from fewstep.functional import Loss
from fewstep.learner import Learner
from fewstep.updates import SGD


def fomaml(model: nn.Module, loss: Loss, *, lr: float, steps: int = 1, **options: Any) -> Learner:
    """MAML whose inner gradient counts as a constant: the meta-gradient is the query gradient at theta'.

    Derivatives: first order; an approximation with an error of O(alpha), which converges to other points than MAML
    (Fallah et al. 2020, arXiv 1908.10400). Gradient evaluations per task: steps + 1. Memory: one set of parameters
    per task. Arguments as for `maml`.

    >>> import torch
    >>> from fewstep import Task
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> _ = torch.nn.init.constant_(model.weight, 1.0)
    >>> x, y = torch.ones(1, 1, 1), torch.zeros(1, 1, 1)
    >>> learner = fomaml(model, torch.nn.functional.mse_loss, lr=0.1)
    >>> learner(Task(support=(x, y), query=(x, y))).sum().backward()   # 2 w' = 1.6, where MAML has 1.28
    >>> round(model.weight.grad.item(), 4)
    1.6
    """
    return Learner(model, loss, SGD(lr), steps=steps, derivative="none", **options)
