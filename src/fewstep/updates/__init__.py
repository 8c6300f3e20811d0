"""Update rules: what an inner step does with a gradient. A rule is any callable of the form `Update`."""

from __future__ import annotations

from typing import Any, Protocol

from fewstep.functional import Tensors
from fewstep.updates.sgd import SGD

__all__ = ["SGD", "Update", "evaluations"]


class Update(Protocol):
    """`theta, state = update(theta, gradient, state, step)`.

    theta : tensors by name, [B, ...]; at step 0 the meta-parameters themselves, [...], which broadcast
    gradient : the same names, [B, ...]
    state : what the rule returned the time before; None at step 0
    step : 0, 1, 2, ...

    A rule with parameters of its own is an `nn.Module`; they are meta-learned with the rest. One that needs more than
    one gradient for a step has a method `evaluations(step)`: it is called that many times with the same `step`, each
    time with the gradient at the theta that it returned last.
    """

    def __call__(self, theta: Tensors, gradient: Tensors, state: Any, step: int) -> tuple[Tensors, Any]: ...


def evaluations(update: Update, step: int) -> int:
    """How many gradients a rule takes for a step: 1 unless it says otherwise."""
    asked = getattr(update, "evaluations", None)
    return 1 if asked is None else int(asked(step))
