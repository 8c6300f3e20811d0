"""What the sampler asks of an environment: the trajectories of all tasks step together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Environment(Protocol):
    """K tasks, M trajectories in each.

    observations : numbers in an observation;  horizon : steps of a trajectory at most
    actions : numbers in an action; where `discrete`, an action is one of so many
    """

    observations: int
    actions: int
    horizon: int
    discrete: bool

    def sample_tasks(self, count: int, generator: torch.Generator) -> Tensor:
        """Tasks [count, ...], of the distribution that is learned."""

    def reset(self, tasks: Tensor, trajectories: int, generators: Sequence[torch.Generator]) -> Tensor:
        """Start M trajectories of each task; each task draws from its own generator. Observations [K, M, o]"""

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Observations [K, M, o], rewards and whether each has ended [K, M], by actions [K, M, a], or [K, M]."""
