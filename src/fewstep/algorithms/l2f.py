"""L2F: learning to forget (Baik, Hong, Lee 2020, arXiv 1906.05859, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from fewstep.functional import Loss
from fewstep.learner import Learner
from fewstep.patterns import adapted_parameters
from fewstep.updates import SGD, Forget


def l2f(model: nn.Module, loss: Loss, *, lr: float, steps: int = 1, adapt: str | Sequence[str] = "*",
        **options: Any) -> Learner:  # fmt: skip
    """MAML in which each task first forgets a part of each tensor of the common start.

        theta_i = gamma_i o theta,  gamma_i = sigmoid(MLP(mean gradient of each tensor)),  at the support set
        theta_i' = theta_i - alpha * grad L_i(theta_i; support),  `steps` times
        minimise  sum_i L_i(theta_i'; query)  over theta and the MLP

    gamma starts as 0.982 for every task and tensor. Without an inner step nothing is forgotten: `adapt(..., steps=0)`
    answers as theta does.

    Derivatives: second order, by Hessian-vector products. Gradient evaluations per task: steps + 2, and steps + 1
    products. Memory: the parameters of each step. Meta-learned: theta, all shared parameters, and 2 L^2 + 2 L numbers
    of the network for L tensors that adapt.

    lr, steps : alpha and the inner steps in training
    adapt : patterns of what adapts
    options : as for `fewstep.Learner`

    >>> import torch
    >>> from fewstep import Task
    >>> model = nn.Linear(1, 1, bias=False)                # L = w^2, w' = (1 - 2 alpha) gamma w
    >>> _ = nn.init.constant_(model.weight, 1.0)
    >>> learner = l2f(model, nn.functional.mse_loss, lr=0.1)
    >>> x, y = torch.ones(1, 1, 1), torch.zeros(1, 1, 1)
    >>> round(learner(Task(support=(x, y), query=(x, y))).item(), 4)   # (0.8 * 0.982)^2
    0.6172
    """
    rule = Forget(SGD(lr), adapted_parameters(model, adapt))
    return Learner(model, loss, rule, steps=steps, adapt=adapt, **options)
