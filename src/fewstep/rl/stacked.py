"""A network of linear layers with weights of each task's own, without the detours that `vmap` takes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fewstep.functional import Tensors
from fewstep.watch import ALL_MODULES_HOOKS, hooks_of


def runs_as_written(module: nn.Module) -> bool:
    """Whether a call of it runs the forward functions of its classes and nothing else: no hooks, none put in place."""
    return not any(ALL_MODULES_HOOKS) and not any(hooks_of(m) or "forward" in vars(m) for m in module.modules())


def stacked(network: nn.Module, theta: Tensors) -> Callable[[Tensor], Tensor] | None:
    """The network as a function of rows [K, M, inputs], with `theta`, each [K, ...] and by its name in the network.

    None where it is no sequence of linear layers, with offsets and all of them in `theta`, and ReLUs (as `mlp` gives).

    >>> network = nn.Sequential(nn.Linear(1, 1))
    >>> theta = {"0.weight": torch.tensor([[[2.0]], [[3.0]]]), "0.bias": torch.tensor([[0.0], [1.0]])}
    >>> stacked(network, theta)(torch.ones(2, 1, 1)).flatten()     # 2 * 1 and 3 * 1 + 1
    tensor([2., 4.])
    """
    if type(network) is not nn.Sequential:
        return None
    layers: list[Callable[[Tensor], Tensor]] = []
    for name, layer in network._modules.items():  # a layer that comes twice, too
        weight, bias = theta.get(f"{name}.weight"), theta.get(f"{name}.bias")
        if type(layer) is nn.Linear and weight is not None and bias is not None:
            layers.append(_affine(weight.mT.contiguous(), bias.unsqueeze(1)))
        elif type(layer) is nn.ReLU:
            layers.append(layer)
        elif type(layer) is not nn.Flatten:  # rows are flat
            return None

    def forward(rows: Tensor) -> Tensor:
        for layer in layers:
            rows = layer(rows)
        return rows

    return forward


def _affine(weight: Tensor, bias: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda rows: torch.bmm(rows, weight) + bias  # `baddbmm` rounds once: in bfloat16 it would be another policy
