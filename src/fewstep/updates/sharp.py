"""The inner step of Sharp-MAML: the gradient is taken at the worst point nearby."""

from __future__ import annotations

from typing import Any

import torch

from fewstep.functional import Tensors
from fewstep.updates.common import Rule, along, evaluations, positive, squared_norms
from fewstep.updates.wrapper import Wrapper


class Sharp(Wrapper):
    """theta' = rule(theta, grad L(theta + rho * g / |g|)), with g = grad L(theta)

    Sharpness-aware inner steps (Sharp-MAML_low: Abbas et al. 2022, arXiv 2206.03996). |g| is the norm of a task's whole
    gradient; where it is 0, theta is not moved. The derivative is exact, through g / |g| as well.

    Each gradient of the rule inside takes two: the first call moves theta away and remembers where it was, the second
    one steps from there. The state is that of the rule, and between the two calls theta.

    rule : any update rule
    radius : rho, above 0

    >>> import torch
    >>> from fewstep.updates import SGD
    >>> rule = Sharp(SGD(0.1), radius=0.5)                     # L = w^2, g = 2 w
    >>> moved, state = rule({"w": torch.ones(1, 1)}, {"w": torch.full((1, 1), 2.0)}, None, 0)
    >>> moved, rule(moved, {"w": 2 * moved["w"]}, state, 0)[0]  # 1 + 0.5, then 1 - 0.1 * 3
    ({'w': tensor([[1.5000]])}, {'w': tensor([[0.7000]])})
    """

    def __init__(self, rule: Rule, radius: float) -> None:
        super().__init__(rule)
        self.radius = positive(radius, "the radius")

    def evaluations(self, step: int) -> int:
        """How many gradients this step takes: two for each of the rule inside."""
        return 2 * evaluations(self.rule, step)

    def forward(self, theta: Tensors, gradient: Tensors, state: Any, step: int) -> tuple[Tensors, Any]:
        """Half a step: away from theta, or on from there."""
        inner, start = (None, {}) if state is None else state
        if start:
            theta, inner = self.rule(start, gradient, inner, step)
            return theta, (inner, {})
        squared = squared_norms(gradient)
        here = squared > 0  # at 0 the root has no finite derivative: take it of something else
        scale = torch.where(here, self.radius / torch.where(here, squared, 1.0).sqrt(), 0.0)
        moved = {name: value + along(scale, gradient[name]) * gradient[name] for name, value in theta.items()}
        return moved, (inner, dict(theta))
