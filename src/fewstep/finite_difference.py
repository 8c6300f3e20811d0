"""Gradients on both sides of a point: the Hessian-free product of HF-MAML (Fallah, Mokhtari, Ozdaglar 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fewstep.errors import InputError
from fewstep.problem import Problem
from fewstep.replay import Moment


def two_sided(problem: Problem, tensors: Sequence[Tensor], moving: Sequence[int], directions: Sequence[Tensor],
              wanted: tuple[int, ...], moment: Moment) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """Mean and slope of (L, dL/d(wanted)) along `directions`, [B, ...] each.

    mean  = (f(x + d u) + f(x - d u)) / 2  = f(x) + O(d^2)
    slope = (f(x + d u) - f(x - d u)) / 2d = f'(x) u + O(d^2)

    For each task d |u| = eps^(1/3) (1 + |x|), which balances truncation against rounding.
    """
    count = tensors[-1].shape[0]
    axis = problem.task_axis
    full = [tensor if has else tensor.expand(count, *tensor.shape) for tensor, has in zip(tensors, axis, strict=True)]
    along = [u if axis[i] or u.dim() > tensors[i].dim() else u.expand_as(full[i])
             for i, u in zip(moving, directions, strict=True)]  # fmt: skip
    start, length = norms([full[i] for i in moving]), norms(along)
    info = torch.finfo(length.dtype)
    if info.eps > 1e-6:
        raise InputError(
            f"finite differences of {length.dtype} are noise; use float32 or float64, or another derivative"
        )
    d = info.eps ** (1 / 3) * (1 + start) / length.clamp_min(info.tiny)

    sides = []
    for signed in (d, -d):
        moved = [*full]
        for i, u in zip(moving, along, strict=True):
            moved[i] = full[i] + scaled(signed, u)
        with moment.again():
            sides.append(replace(problem, all_stacked=True).gradient(moved, wanted))
    mean = [(plus + minus) / 2 for plus, minus in zip(*sides, strict=True)]
    slope = [scaled((length > 0) / (2 * d), plus - minus) for plus, minus in zip(*sides, strict=True)]
    return mean, slope


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """The length [B] of each task's tensors, taken as one long vector."""
    return torch.stack([tensor.reshape(len(tensor), -1).square().sum(1) for tensor in tensors]).sum(0).sqrt()


def scaled(factor: Tensor, tensor: Tensor) -> Tensor:
    """`tensor` [B, ...] times one number [B] for each task."""
    return factor.reshape(-1, *[1] * (tensor.dim() - 1)) * tensor
