"""A function of each task that is computed in two parts, and what the first one keeps for the second."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.compilation import compiled_in_two
from fewstep.engine import Function, Runner, dense


class InTwo:
    """`early` gives the first results of `function(*tensors, *late)` for all tasks, `finish(late)` the others.

    tensors [B, ...], or without a task axis where `stacked` is False;  late [B, ...]
    early_outputs : how many results do not need `late`
    summed : which of the others are summed over the tasks
    Whether it can be compiled so is told by `ran`; nothing is computed where it cannot.
    """

    def __init__(self, runner: Runner, key: Any, function: Function, tensors: Sequence[Tensor], stacked: Sequence[bool],
                 late: Sequence[Tensor], early_outputs: int, summed: Sequence[bool]) -> None:  # fmt: skip
        self.summed, self.size = summed, 1
        self.parts: list[tuple[Function, list[Tensor], tuple[Tensor, ...]]] = []
        count = next(tensor.shape[0] for tensor, has in zip(tensors, stacked, strict=True) if has)
        self.size = 1 if runner.engine.method == "loop" else min(runner.engine.chunk or count, count)
        axis, sums = [*stacked, *[True] * len(late)], [*[False] * early_outputs, *summed]
        key = (key, tuple(stacked), tuple(summed), "in two")
        early = []
        self.ran = True
        for low in range(0, count, self.size):
            cut = slice(low, low + self.size)
            piece = [dense(t.detach()[cut] if has else t.detach()) for t, has in zip(tensors, stacked, strict=True)]
            pair = runner.recorded(key, piece, lambda piece=piece, cut=cut: compiled_in_two(
                lambda *inputs: runner.over_tasks(function, inputs, axis, sums),
                [*piece, *[part[cut] for part in late]], len(late), early_outputs))  # fmt: skip
            if pair is None:
                self.ran = False
                return
            results = pair[0](*piece)
            early.append(results[:early_outputs])
            self.parts.append((pair[1], piece, results[early_outputs:]))
        self.early = [torch.cat(column) for column in zip(*early, strict=True)]

    def finish(self, late: Sequence[Tensor]) -> list[Tensor]:
        """The other results; what was kept is let go of part by part."""
        results = []
        for number in range(len(self.parts)):
            later, piece, kept = self.parts[number]
            cut = slice(number * self.size, (number + 1) * self.size)
            results.append(later(*piece, *[dense(part.detach()[cut]) for part in late], *kept))
        columns = zip(*results, strict=True)
        return [
            torch.stack(column).sum(0) if is_sum else torch.cat(column)
            for column, is_sum in zip(columns, self.summed, strict=True)
        ]
