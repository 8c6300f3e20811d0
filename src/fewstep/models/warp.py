"""Warp layers: linear maps between the layers of a model, which T-net and WarpGrad meta-learn and do not adapt."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from fewstep.errors import InputError
from fewstep.models.context import is_called_linear
from fewstep.patterns import head_of


class Warped(nn.Module):
    """A linear layer or a 2d convolution, and a linear map of its output channels: warp base(x).

    warp [channels, channels], the identity at the start
    """

    def __init__(self, base: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        weight = base.weight
        self.base = base
        self.warp = nn.Parameter(torch.eye(len(weight), dtype=weight.dtype, device=weight.device))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x)
        if isinstance(self.base, nn.Linear):
            return functional.linear(out, self.warp)
        return functional.conv2d(out, self.warp[:, :, None, None])


def add_warp(model: nn.Module) -> nn.Module:
    """Put a linear map, the identity at first, after each linear layer but the head and after each 2d convolution.

    In place; returns the model. The head is the last linear layer. At the start the model computes what it did before.
    Left out is the last layer of `nn.MultiheadAttention`, whose weight is read past the layer.

    `InputError` where the model has warps already, or no layer to take one.

    >>> model = add_warp(nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1)))
    >>> [(name, tuple(value.shape)) for name, value in model.named_parameters()][:2]
    [('0.warp', (2, 2)), ('0.base.weight', (2, 3))]
    """
    if warps_of(model):
        raise InputError("the model has warp layers already")
    modules = dict(model.named_modules(remove_duplicate=False))
    head = modules[head_of(model)] if any(isinstance(module, nn.Linear) for module in modules.values()) else None
    layers = {
        name: module
        for name, module in modules.items()
        if name and module is not head and (is_called_linear(module) or isinstance(module, nn.Conv2d))
    }
    if not layers:
        raise InputError("the model has no layer to warp: no 2d convolution, and no linear layer but the head")
    warped = {id(module): Warped(module) for module in layers.values()}  # one if used twice
    for name, module in layers.items():
        model.set_submodule(name, warped[id(module)])
    return model


def warps_of(model: nn.Module) -> list[str]:
    """The names of the model's warp parameters.

    >>> warps_of(add_warp(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(2, 1))))
    ['0.warp', '1.warp']
    """
    return [f"{name}.warp" for name, module in model.named_modules() if isinstance(module, Warped)]
