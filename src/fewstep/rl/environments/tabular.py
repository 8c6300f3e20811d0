"""Small random worlds of a few states, each wholly known by its tables (Duan et al. 2016, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from fewstep.errors import InputError


class TabularMDP:
    """s' ~ P(. | s, a);  r ~ N(R(s, a), 1). It starts in state 0, and sees which state it is in.

    P is flat Dirichlet, R is N(1, 1). A task [states, actions, states + 1] is P and, behind it, R.

    >>> world = TabularMDP(states=2, actions=1)
    >>> ahead = torch.tensor([[[[0.0, 1.0, 3.0]], [[0.0, 1.0, 5.0]]]])      # to state 1, and there for ever
    >>> world.reset(ahead, 1, [torch.Generator()])
    tensor([[[1., 0.]]])
    >>> world.step(torch.tensor([[0]]))[0]
    tensor([[[0., 1.]]])
    """

    discrete = True

    def __init__(self, states: int = 10, actions: int = 5, horizon: int = 10) -> None:
        if min(states, actions) < 1:
            raise InputError(f"states and actions must be at least 1, but {states} and {actions} came")
        self.observations, self.actions, self.horizon = states, actions, horizon

    def sample_tasks(self, count: int, generator: torch.Generator) -> Tensor:
        shape = (count, self.observations, self.actions)
        weights = -torch.rand(*shape, self.observations, generator=generator).clamp_min(1e-20).log()
        means = 1 + torch.randn(*shape, 1, generator=generator)
        return torch.cat([weights / weights.sum(-1, keepdim=True), means], -1)

    def reset(self, tasks: Tensor, trajectories: int, generators: Sequence[torch.Generator]) -> Tensor:
        shape = (self.horizon, trajectories)
        drawn = [(torch.rand(*shape, generator=own), torch.randn(*shape, generator=own)) for own in generators]
        self._chance = iter(zip(*[torch.stack(part, 1).to(tasks) for part in zip(*drawn, strict=True)], strict=True))
        self._up_to, self._means = tasks[..., :-1].cumsum(-1), tasks[..., -1]
        self._own = torch.arange(len(tasks), device=tasks.device)[:, None]
        self._states = self._own.new_zeros(len(tasks), trajectories)
        return self._seen()

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        uniform, normal = next(self._chance)
        here = (self._own, self._states, actions.to(self._states.device))
        rewards = self._means[here] + normal
        # The last bound is 1 but for rounding.
        self._states = (uniform[..., None] >= self._up_to[here][..., :-1]).sum(-1)
        return self._seen(), rewards, torch.zeros_like(rewards, dtype=torch.bool)

    def _seen(self) -> Tensor:
        return one_hot(self._states, self.observations).to(self._means)
