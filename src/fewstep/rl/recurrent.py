"""RL^2: a policy that adapts by its memory, without gradient steps (Duan et al. 2016, arXiv 1611.02779)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from fewstep.functional import Tensors
from fewstep.learner import Learner
from fewstep.rl.environments import Environment, Trials
from fewstep.rl.explorer import Explorer
from fewstep.rl.policies import Acting, Policy
from fewstep.task import Point, Task


class RecurrentPolicy(Policy):
    """A GRU, whose state a policy reads. `outputs [..., H, p] = policy(observations [..., H, o])` runs along time.

    head : the policy of the state, which decides what kind of distribution it is;  size : numbers in the state
    In an environment it goes step by step, `outputs [..., p], state = policy(observations [..., o], state)`, by
    `acting`.
    """

    remembers = True

    def __init__(self, observations: int, head: Policy) -> None:
        super().__init__()
        self.observations, self.actions, self.size, self.head = observations, head.actions, head.observations, head
        self.seen = nn.Linear(observations, 3 * self.size)
        self.past = nn.Linear(self.size, 3 * self.size)

    def forward(self, observations: Tensor, state: Tensor | None = None) -> Any:
        if state is not None:
            state = self._next(self.seen(observations), state)
            return self.head(state), state
        state, states = observations.new_zeros(*observations.shape[:-2], self.size), []
        for step in self.seen(observations).unbind(-2):
            state = self._next(step, state)
            states.append(state)
        return self.head(torch.stack(states, -2))

    def _next(self, seen: Tensor, state: Tensor) -> Tensor:
        """The gated recurrent unit (Cho et al. 2014), as PyTorch has it, which `vmap` cannot batch."""
        reset, update, new = seen.chunk(3, -1)
        reset_past, update_past, new_past = self.past(state).chunk(3, -1)
        keep = (update + update_past).sigmoid()
        candidate = (new + (reset + reset_past).sigmoid() * new_past).tanh()
        following: Tensor = candidate + keep * (state - candidate)
        return following

    def acting(self, theta: Tensors) -> Acting:
        def one(own: Tensors, seen: Tensor, state: Tensor) -> Any:
            return functional_call(self, own, (seen, state))

        step: Callable[..., tuple[Tensor, Tensor]] = vmap(one)

        def act(seen: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor]:
            return step(theta, seen, seen.new_zeros(*seen.shape[:-1], self.size) if state is None else state)

        return act

    def noise(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        return self.head.noise(shape, generator)

    def act(self, outputs: Tensor, noise: Tensor) -> Tensor:
        return self.head.act(outputs, noise)

    def log_prob(self, outputs: Tensor, actions: Tensor) -> Tensor:
        return self.head.log_prob(outputs, actions)

    def kl(self, old: Tensor, new: Tensor) -> Tensor:
        return self.head.kl(old, new)

    def fisher(self, outputs: Tensor, tangent: Tensor) -> Tensor:
        return self.head.fisher(outputs, tangent)


class InContext:
    """Judges a recurrent policy: "after n steps" is the return of episode n + 1, with the memory of those before.

    learner : of a `RecurrentPolicy`;  world : of one episode;  trajectories : trials of each task
    skip_failures, limit : as in `Explorer`
    """

    def __init__(self, learner: Learner, world: Environment, trajectories: int, *, skip_failures: bool = False,
                 limit: float | None = None) -> None:  # fmt: skip
        self.learner, self.world, self.trajectories = learner, world, trajectories
        self.skip_failures, self.limit = skip_failures, limit

    def path(self, tasks: Task, steps: int, at: Collection[int] | None = None) -> list[Point]:
        """The return in each episode, with its sign turned, as a loss [K]: of what did not fail."""
        trials = Trials(self.world, steps + 1)
        explorer = Explorer(self.learner, trials, trajectories=self.trajectories, skip_failures=self.skip_failures,
                            limit=self.limit)  # fmt: skip
        (lived,) = explorer.lived(tasks, 0)[1]
        rewards = lived.rewards.reshape(*lived.rewards.shape[:-1], steps + 1, self.world.horizon)
        returns = rewards.sum(-1).mean(1)
        return [Point(-returns[:, step], None) for step in (range(steps + 1) if at is None else sorted(at))]

    def modules(self) -> Iterator[nn.Module]:
        return self.learner.modules()

    def eval(self) -> Any:
        return self.learner.eval()
