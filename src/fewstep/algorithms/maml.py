"""MAML: Model-Agnostic Meta-Learning (Finn, Abbeel, Levine 2017, arXiv 1703.03400, Algorithms 1 and 2)."""

from __future__ import annotations

from typing import Any

from torch import nn

from fewstep.functional import Loss
from fewstep.learner import Learner
from fewstep.updates import SGD


def maml(model: nn.Module, loss: Loss, *, lr: float, steps: int = 1, **options: Any) -> Learner:
    """Gradient descent in the inner loop, differentiated exactly.

        theta_i' = theta - alpha * grad L_i(theta; support),  `steps` times
        minimise  sum_i L_i(theta_i'; query)  over theta

    Derivatives: second order, by Hessian-vector products. Gradient evaluations per task: steps + 1, and `steps`
    products. Memory: the parameters of each step. Meta-learned: the start and all shared parameters.

    lr : alpha, the inner learning rate
    steps : inner steps in training
    options : as for `fewstep.Learner`

    >>> import torch
    >>> from fewstep import Task
    >>> model = torch.nn.Linear(1, 1, bias=False)          # L = (w x - y)^2, so w' = w - 2 alpha x (w x - y)
    >>> _ = torch.nn.init.constant_(model.weight, 1.0)
    >>> learner = maml(model, torch.nn.functional.mse_loss, lr=0.1)
    >>> x, y = torch.ones(1, 1, 1), torch.zeros(1, 1, 1)   # w' = (1 - 2 alpha) w = 0.8
    >>> loss = learner(Task(support=(x, y), query=(x, y)))
    >>> loss.sum().backward()                              # d/dw (0.8 w)^2 = 2 * 0.64
    >>> round(loss.item(), 4), round(model.weight.grad.item(), 4)
    (0.64, 1.28)
    """
    return Learner(model, loss, SGD(lr), steps=steps, **options)
