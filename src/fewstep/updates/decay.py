"""Weight decay for any update rule."""

from __future__ import annotations

from typing import Any

from fewstep.functional import Tensors
from fewstep.updates.common import Rule, positive
from fewstep.updates.wrapper import Wrapper


class WeightDecay(Wrapper):
    """g' = g + lambda * theta, which `rule` takes as the gradient.

    The gradient of lambda/2 * |theta|^2 (Krogh & Hertz 1991), as `weight_decay` of `torch.optim.SGD`; for the decoupled
    one of AdamW see `AdamW`.

    rule : any update rule
    strength : lambda, above 0

    >>> import torch
    >>> from fewstep.updates import SGD
    >>> WeightDecay(SGD(0.1), 0.5)({"w": torch.full((1, 1), 2.0)}, {"w": torch.ones(1, 1)}, None, 0)[0]  # 2 - 0.1 * 2
    {'w': tensor([[1.8000]])}
    """

    def __init__(self, rule: Rule, strength: float) -> None:
        super().__init__(rule)
        self.strength = positive(strength, "the strength of weight decay")

    def forward(self, theta: Tensors, gradient: Tensors, state: Any, step: int) -> tuple[Tensors, Any]:
        """The step of the rule inside, as `Update` describes it."""
        decayed = {name: value.add(theta[name], alpha=self.strength) for name, value in gradient.items()}
        return self.rule(theta, decayed, state, step)
