"""What rules around another rule share: they change the gradient or theta, and leave the step to the rule inside."""

from __future__ import annotations

from typing import Any

from torch import nn

from fewstep.errors import InputError
from fewstep.functional import Tensors
from fewstep.updates.common import Rule, evaluations


class Wrapper(nn.Module):
    """A rule around `rule`. It is a module, so that parameters of the rule inside are meta-learned.

    >>> from fewstep.updates import SGD
    >>> Wrapper(SGD(0.1)).evaluations(0)
    1
    """

    rule: Rule

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        if not callable(rule):
            raise InputError(f"the rule inside must be callable, such as SGD(0.1), but a {type(rule).__name__} came")
        self.rule = rule

    def evaluations(self, step: int) -> int:
        """How many gradients this step takes: as many as the rule inside takes."""
        return evaluations(self.rule, step)

    def forward(self, theta: Tensors, gradient: Tensors, state: Any, step: int) -> tuple[Tensors, Any]:
        """What the rule inside does."""
        return self.rule(theta, gradient, state, step)
