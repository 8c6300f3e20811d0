"""HF-MAML: Hessian-free MAML (Fallah, Mokhtari, Ozdaglar 2020, arXiv 1908.10400, section 4.3)."""

from __future__ import annotations

from typing import Any

from torch import nn

from fewstep.functional import Loss
from fewstep.learner import Learner
from fewstep.updates import SGD


def hf_maml(model: nn.Module, loss: Loss, *, lr: float, steps: int = 1, **options: Any) -> Learner:
    """MAML whose Hessian-vector products are differences of two gradients.

        H v  ~  (grad L(theta + d v) - grad L(theta - d v)) / 2d

    Derivatives: first order only, so any differentiable operator works, also one without a second derivative (fused
    attention, cuDNN RNNs, CTC). The error is O(d^2); it keeps MAML's convergence guarantee. Gradient evaluations per
    task: 3 steps + 1. Memory: the parameters of each step. Arguments as for `maml`.

    >>> import torch
    >>> from fewstep import Task
    >>> model = torch.nn.Linear(1, 1, bias=False, dtype=torch.float64)
    >>> _ = torch.nn.init.constant_(model.weight, 1.0)
    >>> x, y = torch.ones(1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, dtype=torch.float64)
    >>> learner = hf_maml(model, torch.nn.functional.mse_loss, lr=0.1)
    >>> learner(Task(support=(x, y), query=(x, y))).sum().backward()   # as for MAML: 1.28
    >>> round(model.weight.grad.item(), 6)
    1.28
    """
    return Learner(model, loss, SGD(lr), steps=steps, derivative="finite_difference", **options)
