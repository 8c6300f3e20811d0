"""2D navigation (Finn et al. 2017, section 5.3): a point walks to a goal that it is not told."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SPEED = 0.1  # of a step along each axis at most
NEAR = 0.01  # along each axis: there it ends


class Navigation:
    """The goal g is uniform in [-0.5, 0.5]^2, the point starts at 0, and sees where it is.

        s' = s + 0.1 clip(a, -1, 1);  r = -|s' - g|;  the end where |s' - g| < 0.01 along both axes

    The reward is that of the authors' code; the paper's text says the squared distance.

    >>> world = Navigation()
    >>> _ = world.reset(torch.tensor([[0.3, 0.0]]), 1, [torch.Generator()])
    >>> world.step(torch.tensor([[[5.0, 0.0]]]))      # an action of 5 counts as 1
    (tensor([[[0.1000, 0.0000]]]), tensor([[-0.2000]]), tensor([[False]]))
    """

    observations, actions, discrete = 2, 2, False

    def __init__(self, horizon: int = 100) -> None:
        self.horizon = horizon

    def sample_tasks(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.rand(count, 2, generator=generator) - 0.5

    def reset(self, tasks: Tensor, trajectories: int, generators: Sequence[torch.Generator]) -> Tensor:
        self._goals = tasks[:, None]
        self._places = torch.zeros(len(tasks), trajectories, 2, dtype=tasks.dtype, device=tasks.device)
        return self._places

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self._places = self._places + SPEED * actions.clamp(-1, 1)
        away = self._places - self._goals
        return self._places, -away.norm(dim=-1), (away.abs() < NEAR).all(-1)
