"""Gradient descent with momentum: Polyak's heavy ball, or Nesterov's, as `torch.optim.SGD` has them."""

from __future__ import annotations

from dataclasses import dataclass

from fewstep.errors import InputError
from fewstep.functional import Tensors
from fewstep.updates.common import fraction, positive


@dataclass(frozen=True)
class Momentum:
    """m' = mu * m + g;  theta' = theta - alpha * m', or with Nesterov theta - alpha * (g + mu * m')

    As `torch.optim.SGD` without dampening (Sutskever et al. 2013, "On the importance of initialization and momentum in
    deep learning"): m starts as the first gradient. The state is m, [B, ...] by name.

    lr : alpha, the step size
    momentum : mu, at least 0 and below 1
    nesterov : look ahead

    >>> import torch
    >>> rule, one = Momentum(lr=0.1, momentum=0.5), {"w": torch.ones(1, 1)}
    >>> theta, state = rule(one, one, None, 0)                 # 1 - 0.1
    >>> rule(theta, one, state, 1)[0]                          # 0.9 - 0.1 * 1.5
    {'w': tensor([[0.7500]])}
    """

    lr: float
    momentum: float = 0.9
    nesterov: bool = False

    def __post_init__(self) -> None:
        positive(self.lr, "the inner learning rate")
        fraction(self.momentum, "momentum")
        if self.nesterov and self.momentum == 0:
            raise InputError("Nesterov's look ahead needs a momentum above 0, but 0 came")

    def __call__(self, theta: Tensors, gradient: Tensors, state: Tensors | None, step: int) -> tuple[Tensors, Tensors]:
        if state is None:
            state = dict(gradient)
        else:
            state = {name: gradient[name].add(value, alpha=self.momentum) for name, value in state.items()}
        move = state
        if self.nesterov:
            move = {name: gradient[name].add(value, alpha=self.momentum) for name, value in state.items()}
        return {name: value.add(move[name], alpha=-self.lr) for name, value in theta.items()}, state
