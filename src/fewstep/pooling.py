"""Max pooling by comparisons, which a compiler fuses with what stands around it, in all derivatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fewstep.convolution import pair


def max_pool2d_by_comparison(x: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
                             ceil_mode: bool = False, return_indices: bool = False) -> Tensor:  # fmt: skip
    """`functional.max_pool2d`; same arguments, result and gradient. Windows that overlap or are padded are left to it.

    >>> max_pool2d_by_comparison(torch.arange(12.0).reshape(1, 1, 3, 4), 2)
    tensor([[[[5., 7.]]]])
    """
    kh, kw = pair(kernel_size)
    oh, ow = x.shape[-2] // kh, x.shape[-1] // kw
    special = pair(padding) != (0, 0) or pair(dilation) != (1, 1) or ceil_mode or return_indices
    if special or pair(stride or kernel_size) != (kh, kw) or min(oh, ow) < 1:
        pool: Any = functional.max_pool2d  # typed without calls by position
        pooled: Tensor = pool(x, kernel_size, stride, padding, dilation, ceil_mode, return_indices)
        return pooled
    windows = x[..., : oh * kh, : ow * kw].reshape(*x.shape[:-2], oh, kh, ow, kw)
    first, *others = [tap for row in windows.unbind(-3) for tap in row.unbind(-1)]
    largest: Tensor = first
    for other in others:  # of equal ones the first, as PyTorch does; what differs from itself, NaN, is the largest
        largest = torch.where((other > largest) | (other != other), other, largest)
    return largest
