"""Fully connected networks: the paper's sinusoid regressor and its Omniglot net without convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from fewstep.errors import InputError
from fewstep.models.layers import Initialisation, OffsetNorm, initialise


def mlp(
    inputs: int = 1,
    outputs: int = 1,
    hidden: Sequence[int] = (40, 40),
    *,
    norm: bool = False,
    init: Initialisation = "truncated_normal",
) -> nn.Sequential:
    """ReLU layers; by default the paper's sinusoid net, 1-40-40-1 (section 5.1).

    x [batch, ...] with `inputs` numbers an example -> [batch, outputs]
    norm : offset-only batch normalisation before each ReLU, as in the authors' non-convolutional Omniglot net,
        `mlp(784, 5, (256, 128, 64, 64), norm=True)`

    >>> sum(p.numel() for p in mlp().parameters())   # 80 + 1640 + 41
    1761
    """
    widths = [inputs, *hidden, outputs]
    if min(widths) < 1:
        raise InputError(f"every layer needs at least one unit, but the widths are {widths}")
    layers: list[nn.Module] = [nn.Flatten()]
    for wide, narrow in pairwise(widths):
        linear = nn.Linear(wide, narrow)
        initialise(linear, init)
        layers += [linear, OffsetNorm(narrow), nn.ReLU()] if norm else [linear, nn.ReLU()]
    return nn.Sequential(*layers[: -2 if norm else -1])
