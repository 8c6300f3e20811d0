"""ALFA: adaptive hyperparameters in the inner loop (Baik, Choi, Choi, Kim, Lee 2020, arXiv 2011.00209, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from fewstep.functional import Loss
from fewstep.learner import Learner
from fewstep.patterns import adapted_parameters
from fewstep.updates import ALFA


def alfa(model: nn.Module, loss: Loss, *, lr: float, steps: int = 1, adapt: str | Sequence[str] = "*",
         **options: Any) -> Learner:  # fmt: skip
    """MAML whose learning rate and weight decay are set anew in each step, task and tensor, by a small network.

        theta_i' = beta o theta - alpha o grad L_i(theta; support)
        alpha = alpha_0 a,  beta = beta_0 b,  (a, b) = MLP(mean gradient and mean weight of each tensor)
        minimise  sum_i L_i(theta_i'; query)  over theta, the MLP, alpha_0 and beta_0

    It starts as MAML. Each of `steps` has an alpha_0 and a beta_0 of its own for each tensor, and steps beyond those
    use the last ones; the network is one for all. The paper's "ALFA + random init" leaves theta as it was drawn: give
    an optimizer `learner.update.parameters()` only.

    Derivatives: second order, by Hessian-vector products, and through the network, which sees gradients: its part is
    exact too. Gradient evaluations per task: steps + 1, and `steps` products. Memory: the parameters of each step.
    Meta-learned: theta, all shared parameters, and about 8 L^2 numbers for L tensors that adapt.

    lr : alpha_0 at the start
    steps : inner steps in training
    adapt : patterns of what adapts
    options : as for `fewstep.Learner`

    >>> import torch
    >>> from fewstep import Task
    >>> model = nn.Linear(1, 1, bias=False)                # L = w^2, w' = beta w - alpha 2 w
    >>> _ = nn.init.constant_(model.weight, 1.0)
    >>> learner = alfa(model, nn.functional.mse_loss, lr=0.1)
    >>> _ = nn.init.constant_(learner.update.beta, 0.5)    # w' = 0.5 - 0.2
    >>> x, y = torch.ones(1, 1, 1), torch.zeros(1, 1, 1)
    >>> round(learner(Task(support=(x, y), query=(x, y))).item(), 4)
    0.09
    """
    rule = ALFA(adapted_parameters(model, adapt), lr, steps=max(steps, 1))
    return Learner(model, loss, rule, steps=steps, adapt=adapt, **options)
