"""Smaller steps after the first, as the paper tests its policies (Finn et al. 2017, section 5.3)."""

from __future__ import annotations

from typing import Any

from fewstep.functional import Tensors
from fewstep.updates.common import Rule, positive
from fewstep.updates.wrapper import Wrapper


class Slowed(Wrapper):
    """The rule inside, which sees `factor` times the gradient in every step but the first `after`.

    >>> import torch
    >>> from fewstep.updates import SGD
    >>> rule, theta, gradient = Slowed(SGD(0.1), 0.5), {"w": torch.tensor([[1.0]])}, {"w": torch.tensor([[2.0]])}
    >>> [rule(theta, gradient, None, step)[0]["w"].item() for step in (0, 1)]
    [0.800000011920929, 0.8999999761581421]
    """

    def __init__(self, rule: Rule, factor: float = 0.5, after: int = 1) -> None:
        super().__init__(rule)
        self.factor, self.after = positive(factor, "the factor of later steps"), after

    def forward(self, theta: Tensors, gradient: Tensors, state: Any, step: int) -> tuple[Tensors, Any]:
        factor = self.factor if step >= self.after else 1.0
        return self.rule(theta, {name: factor * value for name, value in gradient.items()}, state, step)
