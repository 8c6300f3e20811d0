"""ALFA: a small network sets step size and weight decay of each inner step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.functional import Tensors
from fewstep.updates.common import along, check_names, check_parameters, count, means, of_step, positive, two_layers


class ALFA(nn.Module):
    """theta' = beta * theta - alpha * g;  alpha = alpha_0 * a, beta = beta_0 * b, (a, b) = MLP(mean g, mean theta)

    "Meta-Learning with Adaptive Hyperparameters" (Baik et al. 2020, arXiv 2011.00209): one alpha and one beta for each
    task, step and each of L named tensors. The network sees the mean of each tensor's gradient and of its weights, 2L
    numbers, has two layers and ReLU, and gives 2L numbers. It is meta-learned, and so are alpha_0 and beta_0. At the
    start a = b = 1, alpha_0 = `lr` and beta_0 = 1: SGD.

    parameters : those that adapt, named as in theta: "model.NAME". Only their names, dtype and device matter
    lr : alpha_0 at the start
    steps : how many steps have alpha_0 and beta_0 of their own, as in the paper; later ones use the last step's. None:
        all share one set

    `InputError` where theta has other names.

    >>> one = {"model.w": torch.ones(1, 1)}
    >>> rule = ALFA(one, lr=0.1)
    >>> _ = torch.nn.init.constant_(rule.beta, 0.5)
    >>> round(rule(one, one, None, 0)[0]["model.w"].item(), 4)  # 0.5 * 1 - 0.1 * 1
    0.4
    """

    def __init__(self, parameters: Mapping[str, Tensor], lr: float, *, steps: int | None = None) -> None:
        super().__init__()
        check_parameters(parameters)
        positive(lr, "the inner learning rate")
        self.names, self.steps = tuple(parameters), count(steps)
        like, size = next(iter(parameters.values())), len(self.names)
        shape = [size] if steps is None else [steps, size]
        self.alpha = nn.Parameter(torch.full(shape, lr, dtype=like.dtype, device=like.device))
        self.beta = nn.Parameter(torch.ones(shape, dtype=like.dtype, device=like.device))
        self.network = two_layers(2 * size, 2 * size, 1.0, like)

    def forward(self, theta: Tensors, gradient: Tensors, state: Any, step: int) -> tuple[Tensors, Any]:
        """One step, as `Update` describes it; no state."""
        check_names(self.names, theta, every=True)
        stacked = {name: value.expand_as(gradient[name]) for name, value in theta.items()}  # at step 0 no task axis yet
        seen = torch.cat([means(gradient, self.names), means(stacked, self.names)], 1)
        a, b = self.network(seen).chunk(2, 1)
        alpha = (of_step(self.alpha, step, self.steps) * a).unbind(1)
        beta = (of_step(self.beta, step, self.steps) * b).unbind(1)
        result = {}
        for index, name in enumerate(self.names):
            g = gradient[name]
            result[name] = along(beta[index], g) * theta[name] - along(alpha[index], g) * g
        return result, state
