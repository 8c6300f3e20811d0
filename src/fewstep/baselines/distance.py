"""The distance that metric learners go by."""

from __future__ import annotations

from torch import Tensor


def squared_distances(left: Tensor, right: Tensor) -> Tensor:
    """|l_i - r_j|^2 for left [L, F] and right [R, F] -> [L, R].

    Multiplied out, which needs no [L, R, F], around the mean of `right`, without which it would cancel.

    >>> import torch
    >>> squared_distances(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0], [1.0, 0.0]]))
    tensor([[25.,  1.]])
    """
    centre = right.mean(0)
    left, right = left - centre, right - centre
    return left.square().sum(1)[:, None] + right.square().sum(1) - 2 * left @ right.T
