"""Convolutions in the channels-last memory format, closed under differentiation.

With y = x * w + b, the number <g, y> is linear in g, in x and in (w, b). So its derivatives by these three are each
other's derivatives: three operators, for every order. PyTorch's own second derivative by w is a convolution with a
kernel as large as the picture, and its sum for b reads the memory in leaps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fewstep.convolution import pair

How = tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]  # stride, padding, dilation, groups
Slopes = tuple[Tensor | None, ...]


def conv2d_channels_last(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
                         dilation: Any = 1, groups: int = 1) -> Tensor:  # fmt: skip
    """`torch.conv2d` with its image and its weight in the channels-last memory format; same arguments, same result.

    >>> x, weight = torch.arange(9.0).reshape(1, 1, 3, 3), torch.ones(1, 1, 2, 2)
    >>> conv2d_channels_last(x, weight)
    tensor([[[[ 8., 12.],
              [20., 24.]]]])
    """
    if x.dim() != 4 or isinstance(padding, str):
        return torch.conv2d(x, weight, bias, stride, padding, dilation, groups)
    if torch.is_autocast_enabled(x.device.type):  # which does not reach into the operators
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return _convolve(x, weight, bias, (pair(stride), pair(padding), pair(dilation), groups))


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, how: How) -> Tensor:
    y: Tensor = _Convolution.apply(x, weight, bias, how)  # type: ignore[no-untyped-call]
    return y


def _by_image(slope: Tensor, weight: Tensor, like: Tensor, how: How) -> Tensor:
    x: Tensor = _ByImage.apply(slope, weight, like.detach(), how)  # type: ignore[no-untyped-call]
    return x


def _by_weight(slope: Tensor, x: Tensor, like: Tensor, biased: bool, how: How) -> tuple[Tensor, Tensor | None]:
    found: tuple[Tensor, Tensor | None] = _ByWeight.apply(slope, x, like.detach(), biased, how)  # type: ignore[no-untyped-call]
    return found


class _Convolution(torch.autograd.Function):
    """(x, w, b) -> y, the derivative of <g, y> by g."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, how: How) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.biased, ctx.how = bias is not None, how
        return torch.conv2d(_last(x), _last(weight), bias, *how)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Slopes:
        x, weight = ctx.saved_tensors
        image, *rest = ctx.needs_input_grad
        by_x = _by_image(slope, weight, x, ctx.how) if image else None
        by_weight = _by_weight(slope, x, weight, ctx.biased, ctx.how) if any(rest) else (None, None)
        return by_x, *by_weight, None


class _ByImage(torch.autograd.Function):
    """(g, w) -> the derivative of <g, y> by x, of the shape of `like`."""

    @staticmethod
    def forward(ctx: Any, slope: Tensor, weight: Tensor, like: Tensor, how: How) -> Tensor:
        ctx.save_for_backward(slope, weight)
        ctx.how = how
        return _derivative(slope, like, weight, how, 0)

    @staticmethod
    def backward(ctx: Any, x: Tensor) -> Slopes:
        slope, weight = ctx.saved_tensors
        first, second, *_ = ctx.needs_input_grad
        by_slope = _convolve(x, weight, None, ctx.how) if first else None
        by_weight = _by_weight(slope, x, weight, False, ctx.how)[0] if second else None
        return by_slope, by_weight, None, None


class _ByWeight(torch.autograd.Function):
    """(g, x) -> the derivatives of <g, y> by w, of the shape of `like`, and if `biased` by b."""

    @staticmethod
    def forward(ctx: Any, slope: Tensor, x: Tensor, like: Tensor, biased: bool, how: How) -> Slopes:
        ctx.save_for_backward(slope, x)
        ctx.how = how
        return _derivative(slope, x, like, how, 1), _sum_by_channel(slope) if biased else None

    @staticmethod
    def backward(ctx: Any, weight: Tensor, bias: Tensor | None) -> Slopes:
        slope, x = ctx.saved_tensors
        first, second, *_ = ctx.needs_input_grad
        by_slope = _convolve(x, weight, bias, ctx.how) if first else None
        by_x = _by_image(slope, weight, x, ctx.how) if second else None
        return by_slope, by_x, None, None, None


def _derivative(slope: Tensor, x: Tensor, weight: Tensor, how: How, which: int) -> Tensor:
    """The derivative of <slope, x * weight> by x (0) or by the weight (1)."""
    *window, groups = how
    mask = [which == 0, which == 1, False]
    backward: Any = torch.ops.aten.convolution_backward
    found: Tensor = backward(_last(slope), _last(x), _last(weight), None, *window, False, (0, 0), groups, mask)[which]
    return found


def _sum_by_channel(x: Tensor) -> Tensor:
    """The sum over images and pixels, as a matrix product, which reads the memory in order."""
    rows = _last(x).permute(0, 2, 3, 1).reshape(-1, x.shape[1])
    return (rows.new_ones(1, len(rows)) @ rows)[0]


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)
