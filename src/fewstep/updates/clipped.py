"""Gradient clipping for any update rule, of each task by itself."""

from __future__ import annotations

from typing import Any

import torch

from fewstep.errors import InputError
from fewstep.functional import Tensors
from fewstep.updates.common import Rule, along, positive, squared_norms
from fewstep.updates.wrapper import Wrapper


class Clipped(Wrapper):
    """g' = g * min(1, c / |g|), or with `value` each element of g between -c and c; `rule` takes g' as the gradient.

    |g| is the norm of a task's whole gradient, over all its tensors (Pascanu et al. 2013, arXiv 1211.5063, Algorithm
    1). Each task is clipped by its own norm. The derivative is that of the formula: through |g| as well, and 0 for a
    clipped element.

    rule : any update rule
    norm, value : c, above 0; one of the two

    >>> import torch
    >>> from fewstep.updates import SGD
    >>> zero, gradient = {"w": torch.zeros(2)}, {"w": torch.tensor([[3.0, 4.0], [0.3, 0.4]])}
    >>> Clipped(SGD(1.0), norm=1.0)(zero, gradient, None, 0)[0]["w"]
    tensor([[-0.6000, -0.8000],
            [-0.3000, -0.4000]])
    """

    def __init__(self, rule: Rule, *, norm: float | None = None, value: float | None = None) -> None:
        super().__init__(rule)
        if (norm is None) == (value is None):
            raise InputError(f"clipping needs either norm or value, but norm={norm} and value={value} came")
        self.norm = None if norm is None else positive(norm, "the norm to clip to")
        self.value = None if value is None else positive(value, "the value to clip to")

    def forward(self, theta: Tensors, gradient: Tensors, state: Any, step: int) -> tuple[Tensors, Any]:
        """The step of the rule inside, as `Update` describes it."""
        return self.rule(theta, self._clipped(gradient), state, step)

    def _clipped(self, gradient: Tensors) -> Tensors:
        if self.norm is None:
            assert self.value is not None
            return {name: value.clamp(-self.value, self.value) for name, value in gradient.items()}
        squared = squared_norms(gradient)
        # The root is taken where it counts only: at a gradient of 0 its derivative would be infinite.
        scale = self.norm / squared.clamp(min=self.norm**2).sqrt()
        scale = torch.where(squared > self.norm**2, scale, 1.0)
        return {name: value * along(scale, value) for name, value in gradient.items()}
