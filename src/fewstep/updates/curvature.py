"""Meta-Curvature: gradients are transformed by meta-learned matrices."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.functional import Tensors
from fewstep.updates.common import check_names, check_parameters, key, positive


class MetaCurvature(nn.Module):
    """theta' = theta - alpha * MC(g),  MC(G) = G x_1 M_o x_2 M_i x_3 M_f

    Park & Oliva 2019, arXiv 1902.03356. A tensor's gradient is G [C_out, C_in, d]: of a convolution d is the size of
    its kernel. M_o [C_out, C_out], M_i [C_in, C_in] and M_f [d, d] are meta-learned, and start as the identity, so that
    the rule starts as SGD. A linear layer's weight has d = 1 and no M_f, a vector or a single number has M_o only. They
    are as large as the sides squared: 10 MB for a linear layer with 1600 inputs.

    parameters : those that adapt, named as in theta: "model.NAME". Only their names, shapes, dtype and device matter
    lr : alpha, the step size

    `InputError` where theta has a name that is not in `parameters`.

    >>> rule = MetaCurvature({"model.w": torch.zeros(2)}, lr=0.1)
    >>> _ = rule.out["model/w"].data.copy_(torch.tensor([[0.0, 1.0], [2.0, 0.0]]))
    >>> rule({"model.w": torch.zeros(2)}, {"model.w": torch.tensor([[1.0, 3.0]])}, None, 0)[0]["model.w"].detach()
    tensor([[-0.3000, -0.2000]])
    """

    def __init__(self, parameters: Mapping[str, Tensor], lr: float) -> None:
        super().__init__()
        check_parameters(parameters)
        self.names, self.lr = tuple(parameters), positive(lr, "the inner learning rate")
        self.out, self.into, self.kernel = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()
        for name, value in parameters.items():
            out, into, *kernel = [*value.shape, 1, 1][: max(2, value.dim())]
            self.out[key(name)] = _identity(out, value)
            if value.dim() > 1:
                self.into[key(name)] = _identity(into, value)
            if kernel:
                self.kernel[key(name)] = _identity(prod(kernel), value)

    def forward(self, theta: Tensors, gradient: Tensors, state: Any, step: int) -> tuple[Tensors, Any]:
        """One step, as `Update` describes it; no state."""
        check_names(self.names, theta)
        moves = {name: self._transformed(key(name), value) for name, value in gradient.items()}
        return {name: value.add(moves[name], alpha=-self.lr) for name, value in theta.items()}, state

    def _transformed(self, name: str, gradient: Tensor) -> Tensor:
        """MC(G) of each task's gradient of one tensor."""
        tasks, out = gradient.shape[0], self.out[name].shape[0]
        value: Tensor = self.out[name] @ gradient.reshape(tasks, out, -1)
        if name in self.into:
            into = self.into[name].shape[0]
            value = self.into[name] @ value.reshape(tasks, out, into, -1)
        if name in self.kernel:
            value = value @ self.kernel[name].T
        return value.reshape(gradient.shape)


def _identity(size: int, like: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.eye(size, dtype=like.dtype, device=like.device))
