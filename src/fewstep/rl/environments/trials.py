"""Several episodes of one task in a row, for policies that remember (Duan et al. 2016, arXiv 1611.02779)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from fewstep.rl.environments.base import Environment


class Trials:
    """`episodes` episodes of `world` as one long trajectory: what begins anew at each, the policy's memory survives.

    Behind each observation stand the last action (one of some as a one-hot row), its reward, and 1 where an episode
    begins, else 0. An episode that ends early stands still, without observations and rewards, until the next begins;
    what the policy does meanwhile is learned from, too, and is only noise.

    >>> from fewstep.rl.environments import Navigation
    >>> trials = Trials(Navigation(horizon=2), episodes=2)
    >>> goal, generators = torch.tensor([[0.3, 0.0]]), [torch.Generator()]
    >>> trials.reset(goal, 1, generators)
    tensor([[[0., 0., 0., 0., 0., 1.]]])
    >>> trials.step(torch.tensor([[[1.0, 0.0]]]))[0]
    tensor([[[ 0.1000,  0.0000,  1.0000,  0.0000, -0.2000,  0.0000]]])
    >>> trials.step(torch.tensor([[[1.0, 0.0]]]))[0]
    tensor([[[ 0.0000,  0.0000,  1.0000,  0.0000, -0.1000,  1.0000]]])
    """

    def __init__(self, world: Environment, episodes: int) -> None:
        self.world, self.episodes = world, episodes
        self._alive: Tensor
        self.actions, self.discrete = world.actions, world.discrete
        self.observations, self.horizon = world.observations + world.actions + 2, episodes * world.horizon

    def sample_tasks(self, count: int, generator: torch.Generator) -> Tensor:
        return self.world.sample_tasks(count, generator)

    def reset(self, tasks: Tensor, trajectories: int, generators: Sequence[torch.Generator]) -> Tensor:
        self._start, self._steps = (tasks, trajectories, generators), 0
        seen = self._begin()
        nothing = seen.new_zeros(*seen.shape[:-1], self.actions)
        return self._told(seen, nothing, seen.new_zeros(seen.shape[:-1]))

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        seen, rewards, ended = self.world.step(actions)
        rewards = torch.where(self._alive, rewards, 0.0)
        self._alive = self._alive & ~ended
        self._steps += 1
        if self._steps % self.world.horizon == 0 and self._steps < self.horizon:
            seen = self._begin()
        else:
            seen = torch.where(self._alive[..., None], seen, 0.0)
        last = one_hot(actions, self.actions) if self.discrete else actions
        return self._told(seen, last, rewards), rewards, torch.zeros_like(ended)

    def _begin(self) -> Tensor:
        seen = self.world.reset(*self._start)
        self._alive = torch.ones(seen.shape[:-1], dtype=torch.bool, device=seen.device)
        return seen

    def _told(self, seen: Tensor, actions: Tensor, rewards: Tensor) -> Tensor:
        begins = torch.full_like(rewards, self._steps % self.world.horizon == 0)
        return torch.cat([seen, actions.to(seen), rewards[..., None].to(seen), begins[..., None].to(seen)], -1)
