"""Meta-Curvature (Park & Oliva 2019, arXiv 1902.03356, section 3 and Algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from fewstep.functional import Loss
from fewstep.learner import Learner
from fewstep.patterns import adapted_parameters
from fewstep.updates import MetaCurvature


def meta_curvature(model: nn.Module, loss: Loss, *, lr: float, steps: int = 1, adapt: str | Sequence[str] = "*",
                   **options: Any) -> Learner:  # fmt: skip
    """MAML whose inner gradients are transformed by meta-learned matrices, one for each axis of each tensor.

        theta_i' = theta - alpha * MC(grad L_i(theta; support)),   MC(G) = G x_1 M_o x_2 M_i x_3 M_f
        minimise  sum_i L_i(theta_i'; query)  over theta and all M

    The matrices mix the outputs, the inputs and the kernel positions of a gradient. They start as the identity, so that
    the method starts as MAML, and are as large as the sides squared; `fewstep.updates.MetaCurvature` says more.

    Derivatives: second order, by Hessian-vector products. Gradient evaluations per task: steps + 1, and `steps`
    products. Memory: the parameters of each step. Meta-learned: theta, all shared parameters and the matrices.

    lr, steps : alpha and the inner steps in training
    adapt : patterns of what adapts
    options : as for `fewstep.Learner`

    >>> import torch
    >>> from fewstep import Task
    >>> model = nn.Linear(1, 1, bias=False)                # L = w^2, w' = w - alpha M_o M_i 2 w = 0.8
    >>> _ = nn.init.constant_(model.weight, 1.0)
    >>> learner = meta_curvature(model, nn.functional.mse_loss, lr=0.1)
    >>> x, y = torch.ones(1, 1, 1), torch.zeros(1, 1, 1)
    >>> learner(Task(support=(x, y), query=(x, y))).sum().backward()
    >>> [round(value.grad.item(), 4) for value in learner.parameters()]   # of w as in MAML; 2 w' (-alpha 2 w) twice
    [1.28, -0.32, -0.32]
    """
    rule = MetaCurvature(adapted_parameters(model, adapt), lr)
    return Learner(model, loss, rule, steps=steps, adapt=adapt, **options)
