"""A network of linear layers with weights of each task's own, without the detours that `vmap` takes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fewstep.functional import Tensors

BY_ROW = nn.Flatten, nn.ReLU  # what `mlp` has beside linear layers


def stacked(network: nn.Sequential, theta: Tensors) -> Callable[[Tensor], Tensor] | None:
    """The network as a function of rows [K, M, inputs], with `theta`, each [K, ...] and by its name in the network.

    None where the network has other layers, or hooks, of which nothing is known here.

    >>> network = nn.Sequential(nn.Linear(1, 1))
    >>> theta = {"0.weight": torch.tensor([[[2.0]], [[3.0]]]), "0.bias": torch.tensor([[0.0], [1.0]])}
    >>> stacked(network, theta)(torch.ones(2, 1, 1)).flatten()     # 2 * 1 and 3 * 1 + 1
    tensor([2., 4.])
    """
    if type(network) is not nn.Sequential or any(m._forward_pre_hooks or m._forward_hooks for m in network.modules()):
        return None
    layers: list[Callable[[Tensor], Tensor]] = []
    for name, layer in network.named_children():
        weight, bias = theta.get(f"{name}.weight"), theta.get(f"{name}.bias")
        if type(layer) is nn.Linear and weight is not None and bias is not None:
            layers.append(_affine(weight.mT.contiguous(), bias.unsqueeze(1)))
        elif type(layer) not in BY_ROW:
            return None
        elif not isinstance(layer, nn.Flatten):  # rows are flat
            layers.append(layer)

    def forward(rows: Tensor) -> Tensor:
        for layer in layers:
            rows = layer(rows)
        return rows

    return forward


def _affine(weight: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda rows: torch.baddbmm(bias, rows, weight)
