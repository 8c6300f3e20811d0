"""Meta-learned inner learning rates: Meta-SGD, and the per-layer per-step rates of MAML++."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fewstep.errors import InputError
from fewstep.functional import Tensors
from fewstep.updates.common import check_names, check_parameters, count, key, of_step, positive

Per = Literal["tensor", "element"]


class LearnedRates(nn.Module):
    """theta' = theta - alpha * g, where alpha is meta-learned

        per="element"          one rate for each element: Meta-SGD (Li et al. 2017, arXiv 1707.09835, equation 2)
        per="tensor", steps=n  one rate for each named tensor and step: LSLR of MAML++ (Antoniou et al. 2019,
                               arXiv 1810.09502)
        per="tensor"           one rate for each named tensor

    All rates start as `lr`, so that the rule starts as SGD; Meta-SGD's paper draws them from [0.005, 0.1]. They may
    become negative unless `bounds` keep them from it.

    parameters : those that adapt, named as in theta: "model.NAME". Only their names, shapes, dtype and device matter
    lr : alpha at the start
    steps : how many steps have rates of their own; later ones use the last step's. None: all share one set
    bounds : (low, high), to which rates are clamped where they are used. The derivative passes as if they were not,
        so that a rate outside can come back

    `InputError` where theta has a name that is not in `parameters`.

    >>> one = {"model.w": torch.ones(1, 1)}
    >>> round(LearnedRates(one, lr=0.1)(one, one, None, 0)[0]["model.w"].item(), 4)
    0.9
    >>> [(name, rate.shape) for name, rate in LearnedRates(one, 0.1, per="element", steps=3).named_parameters()]
    [('rates.model/w', torch.Size([3, 1, 1]))]
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        lr: float,
        *,
        per: Per = "tensor",
        steps: int | None = None,
        bounds: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        check_parameters(parameters)
        positive(lr, "the inner learning rate")
        if per not in get_args(Per):
            raise InputError(f"per must be one of {get_args(Per)}, but {per!r} came")
        if bounds is not None and not (len(bounds) == 2 and bounds[0] <= lr <= bounds[1] and bounds[0] < bounds[1]):
            raise InputError(f"bounds must be (low, high) with the rate {lr} between them, but {bounds} came")
        self.names, self.steps, self.bounds = tuple(parameters), count(steps), bounds
        axis = [] if steps is None else [steps]
        self.rates = nn.ParameterDict()
        for name, value in parameters.items():
            shape = [*axis, *(value.shape if per == "element" else [])]
            self.rates[key(name)] = nn.Parameter(torch.full(shape, lr, dtype=value.dtype, device=value.device))

    def rate(self, name: str, step: int) -> Tensor:
        """alpha of a tensor in a step, as it is used: a single number, or in the shape of the tensor."""
        alpha: Tensor = of_step(self.rates[key(name)], step, self.steps)
        return alpha if self.bounds is None else alpha + (alpha.clamp(*self.bounds) - alpha).detach()

    def forward(self, theta: Tensors, gradient: Tensors, state: Any, step: int) -> tuple[Tensors, Any]:
        """One step, as `Update` describes it; no state."""
        check_names(self.names, theta)
        return {name: value - self.rate(name, step) * gradient[name] for name, value in theta.items()}, state
