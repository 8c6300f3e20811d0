"""Convolutions as batched matrix products.

Under vmap, a convolution with weights of its own for each task becomes a grouped convolution, for which many back ends
are slow. Unfolded into patches it is a matrix product, and over tasks a batched one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def conv2d_by_matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
                     dilation: Any = 1, groups: int = 1) -> Tensor:  # fmt: skip
    """`torch.conv2d` by unfolding x [n, c, h, w] into patches [n, oh, ow, kh kw c]; same arguments, same result.

    >>> x, weight = torch.arange(9.0).reshape(1, 1, 3, 3), torch.ones(1, 1, 2, 2)
    >>> conv2d_by_matmul(x, weight)
    tensor([[[[ 8., 12.],
              [20., 24.]]]])
    """
    if x.dim() != 4 or groups != 1 or isinstance(padding, str):
        return torch.conv2d(x, weight, bias, stride, padding, dilation, groups)
    (sh, sw), (ph, pw), (dh, dw) = pair(stride), pair(padding), pair(dilation)
    out, channels, kh, kw = weight.shape
    n, _, height, width = x.shape
    oh, ow = (height + 2 * ph - dh * (kh - 1) - 1) // sh + 1, (width + 2 * pw - dw * (kw - 1) - 1) // sw + 1
    if oh < 1 or ow < 1:
        return torch.conv2d(x, weight, bias, stride, padding, dilation, groups)  # for its error
    # Cut by the phase of a stride, each tap reads a plain block, whose derivative is a plain block too.
    x = functional.pad(x, (pw, pw + -(width + 2 * pw) % sw, ph, ph + -(height + 2 * ph) % sh))
    x = x.permute(0, 2, 3, 1).reshape(n, x.shape[2] // sh, sh, x.shape[3] // sw, sw, channels)
    phases = [rows.unbind(3) for rows in x.unbind(2)]
    shifted = []
    for i in range(0, dh * kh, dh):
        for j in range(0, dw * kw, dw):
            shifted.append(phases[i % sh][j % sw][:, i // sh : i // sh + oh, j // sw : j // sw + ow])
    patches = torch.stack(shifted, 3).reshape(n * oh * ow, kh * kw * channels)
    y = patches @ weight.permute(2, 3, 1, 0).reshape(kh * kw * channels, out)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.reshape(n, oh, ow, out).permute(0, 3, 1, 2)


def pair(value: Any) -> tuple[int, int]:
    """A number for each of the two dimensions of an image, from one for both or from two."""
    if isinstance(value, int):
        return value, value
    return (value[0], value[-1])
