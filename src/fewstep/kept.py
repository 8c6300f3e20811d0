"""A function of each task that is computed in two parts: the second one takes what the first one kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fewstep.compilation import compiled_in_two
from fewstep.engine import Function, Runner, dense, joined

Finish = Callable[[Sequence[Tensor], Sequence[Tensor]], list[Tensor]]


def in_two(runner: Runner, key: Any, function: Function, tensors: Sequence[Tensor], stacked: Sequence[bool],
           late: int, summed: Sequence[bool]) -> tuple[list[Tensor], Finish] | None:  # fmt: skip
    """The first results of `function(*tensors, c, *u)` for all tasks, and `finish(tensors, [c, *u])` for the others.

    tensors [B, ...], or without a task axis where `stacked` is False
    late : how many tensors are known at last, and how many first results there are, which do not depend on those:
        c [B], and u like the first ones of `tensors`, with a task axis
    summed : which of the others are summed over the tasks
    `finish` runs once. None where this cannot be compiled.
    """
    axis, sums = [*stacked, *[True] * late], [*[False] * late, *summed]

    def whole(*inputs: Tensor) -> tuple[Tensor, ...]:
        return runner.over_tasks(function, inputs, axis, sums)

    def record(known: Sequence[Tensor]) -> tuple[Function, Function]:
        unknown = [
            known[0].new_zeros(known[-1].shape[0]),
            *[torch.zeros(part.shape, dtype=part.dtype, device=part.device) for part in known[: late - 1]],
        ]
        return compiled_in_two(whole, [*known, *unknown], late, partial(runner.without, "keep"))

    early, parts = [], []
    for piece in runner.chunks(tensors, stacked):
        known = [dense(tensor.detach()) for tensor in piece]
        pair = runner.recorded("keep", (key, tuple(axis), tuple(sums)), known, partial(record, known))
        if pair is None:
            return None
        results = pair[0](*known)
        early.append(results[:late])
        parts.append(([tensor.stride() for tensor in known], pair[1], results[late:], known[-1].shape[0]))

    def finish(tensors: Sequence[Tensor], unknown: Sequence[Tensor]) -> list[Tensor]:
        others, low = [], 0
        while parts:  # each lets go of what it kept
            strides, later, kept, count = parts.pop(0)
            cut, low = slice(low, low + count), low + count
            piece = [t.detach()[cut] if has else t.detach() for t, has in zip(tensors, stacked, strict=True)]
            known = [_strided(dense(tensor), stride) for tensor, stride in zip(piece, strides, strict=True)]
            others.append(later(*known, *[part.detach()[cut].contiguous() for part in unknown], *kept))
        return joined(others, summed)

    return joined(early, None), finish


def _strided(tensor: Tensor, stride: Sequence[int]) -> Tensor:
    """The tensor as compiled code expects it; hooks for saved tensors may give it back in another form."""
    if tensor.stride() == tuple(stride):
        return tensor
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
