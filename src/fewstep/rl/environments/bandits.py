"""Slot machines, of which one arm is pulled at a time (Duan et al. 2016, section 3.1)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.errors import InputError


class Bandits:
    """Arm a pays 1 with probability p_a, else 0; the p are uniform in [0, 1], and are the task. Nothing is seen but 1.

    >>> world = Bandits(arms=2, horizon=1)
    >>> seen = world.reset(torch.tensor([[1.0, 0.0]]), 2, [torch.Generator()])
    >>> world.step(torch.tensor([[0, 1]]))[1]      # the first trajectory pulls the arm that always pays
    tensor([[1., 0.]])
    """

    observations, discrete = 1, True

    def __init__(self, arms: int = 5, horizon: int = 10) -> None:
        if arms < 2:
            raise InputError(f"there must be at least 2 arms, but {arms} came")
        self.actions, self.horizon = arms, horizon

    def sample_tasks(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.rand(count, self.actions, generator=generator)

    def reset(self, tasks: Tensor, trajectories: int, generators: Sequence[torch.Generator]) -> Tensor:
        drawn = [torch.rand(self.horizon, trajectories, generator=own) for own in generators]
        self._chance = iter(torch.stack(drawn, 1).to(tasks))
        self._odds, self._seen = tasks, tasks.new_ones(len(tasks), trajectories, 1)
        return self._seen

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pays = next(self._chance) < self._odds.gather(1, actions.to(self._odds.device))
        return self._seen, pays.to(self._odds), torch.zeros_like(pays)
