"""Update rules: what an inner step does with a gradient. A rule is any callable of the form `Update`."""

from __future__ import annotations

from typing import Any, Protocol

from fewstep.functional import Tensors
from fewstep.updates.sgd import SGD

__all__ = ["SGD", "Update"]


class Update(Protocol):
    """`theta, state = update(theta, gradient, state, step)`.

    theta : tensors by name, [B, ...]; at step 0 the meta-parameters themselves, [...], which broadcast
    gradient : the same names, [B, ...]
    state : what the rule returned at the step before; None at step 0
    step : 0, 1, 2, ...

    A rule with parameters of its own is an `nn.Module`; they are meta-learned with the rest.
    """

    def __call__(self, theta: Tensors, gradient: Tensors, state: Any, step: int) -> tuple[Tensors, Any]: ...
