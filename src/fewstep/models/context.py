"""Context parameters (CAVIA; Zintgraf et al. 2019, arXiv 1810.03642): a small vector that tells a network its task."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from fewstep.errors import InputError
from fewstep.models.layers import OffsetNorm

Kind = Literal["concat", "film"]
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, OffsetNorm)


class Concat(nn.Module):
    """A linear layer of the input and the context: base(cat([x, context])), written as W x + b + V context.

    x [..., in] -> [..., out];  columns (V) [out, size];  context [size]
    """

    def __init__(self, base: nn.Linear, size: int) -> None:
        super().__init__()
        like = base.weight
        bound = 1 / math.sqrt(base.in_features + size)  # as nn.Linear draws a layer of so many inputs
        self.base = base
        self.columns = nn.Parameter(like.new_empty(base.out_features, size).uniform_(-bound, bound))
        self.context = nn.Parameter(like.new_zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base(x) + functional.linear(self.context, self.columns)
        return result


class Film(nn.Module):
    """A layer whose output channels are scaled by 1 + gamma and shifted by beta, linear maps of the context.

    The channels are the last axis of a linear layer's output, the second one of any other's.  context [size]
    """

    def __init__(self, base: nn.Module, size: int) -> None:
        super().__init__()
        channels, like = _channels(base), next(base.parameters(), torch.empty(()))
        self.base = base
        self.film = nn.Linear(size, 2 * channels, dtype=like.dtype, device=like.device)
        nn.init.zeros_(self.film.bias)
        self.context = nn.Parameter(like.new_zeros(size))
        self.last = isinstance(base, nn.Linear)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base(x)
        gamma, beta = self.film(self.context).chunk(2)
        shape = (-1,) if self.last else (-1, *[1] * (out.dim() - 2))
        result: Tensor = out * (1 + gamma.reshape(shape)) + beta.reshape(shape)
        return result


def add_context(model: nn.Module, size: int, *, layer: str | None = None, kind: Kind | None = None) -> nn.Module:
    """Give one layer of `model` a context of `size` numbers as a further input, in place, and return the model.

        "concat"  a linear layer takes cat([x, context]): its old weight, and new columns drawn as nn.Linear draws
        "film"    the output channels of a layer are scaled and shifted by linear maps of the context

    The one new parameter `context` starts at zero, where the model computes what it did before. Where the model is
    itself the layer, a new module around it comes back. A scale and a shift right before a batch normalisation would
    be undone by it: name the norm layer rather than the convolution.

    layer : its name; by default the first linear layer for "concat", and for "film" the norm layer after the first
        convolution, or the convolution where there is none
    kind : by default "concat" for a linear layer (the model's first layer if none is named), "film" for any other

    `InputError` where the model has a context already, or no such layer.

    >>> model = add_context(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)), 2)
    >>> [(name, tuple(value.shape)) for name, value in model.named_parameters()][:3]
    [('0.columns', (4, 2)), ('0.context', (2,)), ('0.base.weight', (4, 3))]
    """
    if not isinstance(size, int) or size < 1:
        raise InputError(f"the context must have at least 1 number, but {size!r} came")
    if kind is not None and kind not in get_args(Kind):
        raise InputError(f"the kind of a context must be one of {get_args(Kind)}, but {kind!r} came")
    if (known := context_of(model)) is not None:
        raise InputError(f"the model has a context already, '{known}'")
    modules = dict(model.named_modules())
    name = _default(modules, kind) if layer is None else layer
    if name not in modules:
        raise InputError(f"the model has no layer {name!r}; there are: {', '.join(filter(None, modules))}")
    base = modules[name]
    if kind == "concat" and not isinstance(base, nn.Linear):
        raise InputError(f"'concat' needs a linear layer, but {name!r} is a {type(base).__name__}; use kind='film'")
    linear = isinstance(base, nn.Linear) and kind != "film"
    new = Concat(base, size) if linear else Film(base, size)
    if not name:
        return new
    model.set_submodule(name, new)
    return model


def context_of(model: nn.Module) -> str | None:
    """The name of the model's context parameter, or None.

    >>> context_of(add_context(nn.Linear(2, 1), 3))
    'context'
    """
    for name, module in model.named_modules():
        if isinstance(module, Concat | Film):
            return f"{name}.context".removeprefix(".")
    return None


def _default(modules: dict[str, nn.Module], kind: Kind | None) -> str:
    """The name of the layer that takes the context where none is named."""
    convolutions = [name for name, module in modules.items() if isinstance(module, CONVOLUTIONS)]
    linear = [name for name, module in modules.items() if is_called_linear(module)]
    names = list(modules)
    first_is_linear = linear and (not convolutions or names.index(linear[0]) < names.index(convolutions[0]))
    if linear and (kind == "concat" or first_is_linear):
        return linear[0]
    if not convolutions or kind == "concat":
        raise InputError("the model has no layer that could take a context; name one with layer=...")
    after = names[names.index(convolutions[0]) :]
    before_next = after if len(convolutions) == 1 else after[: after.index(convolutions[1])]
    return next((name for name in before_next if isinstance(modules[name], NORMS)), convolutions[0])


def is_called_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer that its model calls: attention reads the weight of its own past `forward`."""
    own = nn.modules.linear.NonDynamicallyQuantizableLinear
    return isinstance(module, nn.Linear) and not isinstance(module, own)


def _channels(layer: nn.Module) -> int:
    """The number of a layer's output channels."""
    for name in ("out_features", "out_channels", "num_features", "num_channels"):
        if isinstance(count := getattr(layer, name, None), int):
            return count
    if isinstance(layer, OffsetNorm):
        return len(layer.offset)
    raise InputError(
        f"'film' needs a linear, convolution or batch, instance or group norm layer, but a {type(layer).__name__} came"
    )
