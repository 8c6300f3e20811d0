"""The sinusoid regression of the paper (section 5.1): y = A sin(x - phase), each task a wave of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fewstep.data.episodes import Episodes
from fewstep.errors import InputError
from fewstep.task import Task


@dataclass(frozen=True, kw_only=True)
class SinusoidEpisodes(Episodes):
    """Amplitude A ~ U[0.1, 5], phase ~ U[0, pi], x ~ U[-5, 5] (Finn et al. 2017, section 5.1).

    support : x, y [tasks, shots, 1];  query : x, y [tasks, queries, 1], float32
    With `oracle`, x is [..., 3]: the input, the amplitude and the phase, for the paper's oracle baseline.

    >>> tasks = SinusoidEpisodes(tasks=25, shots=10, queries=10)[0]
    >>> tasks.support[0].shape, bool(tasks.query[1].abs().max() <= 5)
    (torch.Size([25, 10, 1]), True)
    """

    shots: int = 10
    queries: int = 10
    oracle: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shots < 1 or self.queries < 1:
            raise InputError(f"shots and queries must be at least 1, but {self.shots} and {self.queries} came")

    def draw(self, generator: torch.Generator) -> Task:
        amplitude = 0.1 + 4.9 * torch.rand(self.tasks, 1, 1, generator=generator)
        phase = math.pi * torch.rand(self.tasks, 1, 1, generator=generator)
        x = 10 * torch.rand(self.tasks, self.shots + self.queries, 1, generator=generator) - 5
        y = amplitude * torch.sin(x - phase)
        if self.oracle:
            x = torch.cat([x, amplitude.expand_as(x), phase.expand_as(x)], dim=-1)
        x, y = x.to(self.device), y.to(self.device)
        return Task(support=(x[:, : self.shots], y[:, : self.shots]), query=(x[:, self.shots :], y[:, self.shots :]))
