"""Update rules: what an inner step does with a gradient. A rule is any callable of the form `Update`."""

from __future__ import annotations

from typing import Any, Protocol

from fewstep.functional import Tensors
from fewstep.updates.adam import Adam, AdamW
from fewstep.updates.alfa import ALFA
from fewstep.updates.clipped import Clipped
from fewstep.updates.common import evaluations
from fewstep.updates.curvature import MetaCurvature
from fewstep.updates.decay import WeightDecay
from fewstep.updates.forget import Forget
from fewstep.updates.momentum import Momentum
from fewstep.updates.proximal import Proximal
from fewstep.updates.rates import LearnedRates
from fewstep.updates.rmsprop import RMSprop
from fewstep.updates.sgd import SGD
from fewstep.updates.sharp import Sharp
from fewstep.updates.slowed import Slowed

__all__ = [
    "ALFA",
    "SGD",
    "Adam",
    "AdamW",
    "Clipped",
    "Forget",
    "LearnedRates",
    "MetaCurvature",
    "Momentum",
    "Proximal",
    "RMSprop",
    "Sharp",
    "Slowed",
    "Update",
    "WeightDecay",
    "evaluations",
]


class Update(Protocol):
    """`theta, state = update(theta, gradient, state, step)`.

    theta : tensors by name, [B, ...]; at step 0 the meta-parameters themselves, [...], which broadcast
    gradient : the same names, [B, ...]
    state : what the rule returned at the call before, any nesting of tensors; None at first
    step : 0, 1, 2, ...

    A rule with parameters of its own is an `nn.Module`; they are meta-learned with the rest. A rule keeps nothing in
    itself and writes to nothing in place.

    A rule that needs more than one gradient in a step has a method `evaluations(step) -> int` that says how many. It is
    then called as many times in a row with the same `step`, each time with the theta that it returned last and the
    gradient there; it tells the calls apart by its state. `Sharp` is an example.
    """

    def __call__(self, theta: Tensors, gradient: Tensors, state: Any, step: int) -> tuple[Tensors, Any]: ...
