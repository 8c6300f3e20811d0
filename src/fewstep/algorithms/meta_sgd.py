"""Meta-SGD (Li, Zhou, Chen, Li 2017, arXiv 1707.09835, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from fewstep.functional import Loss
from fewstep.learner import Learner
from fewstep.patterns import adapted_parameters
from fewstep.updates import LearnedRates


def meta_sgd(model: nn.Module, loss: Loss, *, lr: float, steps: int = 1, adapt: str | Sequence[str] = "*",
             **options: Any) -> Learner:  # fmt: skip
    """MAML with an inner learning rate for each element of theta, which is meta-learned along with theta.

        theta_i' = theta - alpha o grad L_i(theta; support),  alpha in the shape of theta
        minimise  sum_i L_i(theta_i'; query)  over theta and alpha

    Direction and length of the step are learned; a rate may become negative. All start as `lr`, where the paper draws
    them from [0.005, 0.1] and takes one step; `steps` share the rates.

    Derivatives: second order, by Hessian-vector products. Gradient evaluations per task: steps + 1, and `steps`
    products. Memory: the parameters of each step. Meta-learned: theta, all shared parameters and alpha, as many numbers
    as adapt.

    lr : alpha at the start
    steps : inner steps in training
    adapt : patterns of what adapts
    options : as for `fewstep.Learner`

    >>> import torch
    >>> from fewstep import Task
    >>> model = nn.Linear(1, 1, bias=False)                # L = w^2, w' = w - alpha 2 w = 0.8
    >>> _ = nn.init.constant_(model.weight, 1.0)
    >>> learner = meta_sgd(model, nn.functional.mse_loss, lr=0.1)
    >>> x, y = torch.ones(1, 1, 1), torch.zeros(1, 1, 1)
    >>> learner(Task(support=(x, y), query=(x, y))).sum().backward()
    >>> [round(value.grad.item(), 4) for value in learner.parameters()]   # 2 w' (1 - 2 alpha) and 2 w' (-2 w)
    [1.28, -3.2]
    """
    rule = LearnedRates(adapted_parameters(model, adapt), lr, per="element")
    return Learner(model, loss, rule, steps=steps, adapt=adapt, **options)
