"""Layers as the MAML authors built them in TensorFlow 1."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Initialisation = Literal["xavier", "truncated_normal", "normal"]


class OffsetNorm(nn.Module):
    """Batch normalisation with an offset but no scale, always by the statistics of the batch at hand.

    x [batch, features, ...] -> the same shape. eps is 1e-3, the default of tf.contrib.layers.batch_norm.
    pool : 2x2 max pooling of what comes out, done before the offset: the same, on a quarter of the map

    >>> OffsetNorm(2)(torch.tensor([[1.0, 0.0], [3.0, 0.0]])).round(decimals=2)
    tensor([[-1.,  0.],
            [ 1.,  0.]], grad_fn=<RoundBackward1>)
    """

    def __init__(self, features: int, eps: float = 1e-3, *, pool: bool = False) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.zeros(features))
        self.eps, self.pool = eps, pool

    def forward(self, x: Tensor) -> Tensor:
        # Added outside: batch_norm(weight=None, bias=offset) loses the derivative of the offset's own gradient.
        normal = functional.batch_norm(x, None, None, training=True, eps=self.eps)
        normal = functional.max_pool2d(normal, 2) if self.pool else normal
        return normal + self.offset.reshape(-1, *[1] * (x.dim() - 2))


def initialise(layer: nn.Linear | nn.Conv2d, how: Initialisation) -> None:
    """Zero bias, and the weight by Glorot's uniform rule, a normal cut at 2 sigma with sigma 0.01, or N(0, 1)."""
    if how == "xavier":
        nn.init.xavier_uniform_(layer.weight)
    elif how == "truncated_normal":
        nn.init.trunc_normal_(layer.weight, std=0.01, a=-0.02, b=0.02)
    else:
        nn.init.normal_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
