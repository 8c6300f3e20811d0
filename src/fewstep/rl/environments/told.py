"""An environment in which the policy is told its task: what an oracle sees."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep.rl.environments.base import Environment


class Told:
    """`world` with the task [n] behind each observation.

    >>> from fewstep.rl.environments import Navigation
    >>> Told(Navigation(), 2).reset(torch.tensor([[0.3, 0.1]]), 1, [torch.Generator()])
    tensor([[[0.0000, 0.0000, 0.3000, 0.1000]]])
    """

    def __init__(self, world: Environment, size: int) -> None:
        self.world = world
        self.observations, self.actions, self.horizon = world.observations + size, world.actions, world.horizon
        self.discrete = world.discrete

    def sample_tasks(self, count: int, generator: torch.Generator) -> Tensor:
        return self.world.sample_tasks(count, generator)

    def reset(self, tasks: Tensor, trajectories: int, generators: Sequence[torch.Generator]) -> Tensor:
        self._tasks = tasks.reshape(len(tasks), 1, -1)
        return self._with_task(self.world.reset(tasks, trajectories, generators))

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        seen, rewards, ended = self.world.step(actions)
        return self._with_task(seen), rewards, ended

    def _with_task(self, seen: Tensor) -> Tensor:
        return torch.cat([seen, self._tasks.to(seen).expand(*seen.shape[:-1], -1)], -1)
