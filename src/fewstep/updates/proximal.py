"""A pull towards where adaptation started, the inner loop of iMAML, for any update rule."""

from __future__ import annotations

from typing import Any

from fewstep.functional import Tensors
from fewstep.updates.common import Rule, positive
from fewstep.updates.wrapper import Wrapper


class Proximal(Wrapper):
    """g' = g + lambda * (theta - theta_0), which `rule` takes as the gradient; theta_0 is theta of step 0.

    The gradient of L(theta) + lambda/2 * |theta - theta_0|^2 (iMAML: Rajeswaran et al. 2019, arXiv 1909.04630, equation
    3). The inner loop only: the learner differentiates through its steps, by theta_0 as well. The state is theta_0 and
    the state of the rule.

    rule : any update rule
    strength : lambda, above 0

    >>> import torch
    >>> from fewstep.updates import SGD
    >>> rule, one = Proximal(SGD(0.1), 2.0), {"w": torch.ones(1, 1)}
    >>> theta, state = rule(one, one, None, 0)                 # 1 - 0.1
    >>> rule(theta, one, state, 1)[0]                          # 0.9 - 0.1 * (1 + 2 * (0.9 - 1))
    {'w': tensor([[0.8200]])}
    """

    def __init__(self, rule: Rule, strength: float) -> None:
        super().__init__(rule)
        self.strength = positive(strength, "the strength of the pull")

    def forward(self, theta: Tensors, gradient: Tensors, state: Any, step: int) -> tuple[Tensors, Any]:
        """The step of the rule inside, as `Update` describes it."""
        start, inner = (dict(theta), None) if state is None else state
        pulled = {name: value + self.strength * (theta[name] - start[name]) for name, value in gradient.items()}
        theta, inner = self.rule(theta, pulled, inner, step)
        return theta, (start, inner)
