"""Any Gymnasium environment with tasks: one for each trajectory, in Gymnasium's own vector environment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.errors import InputError
from fewstep.rl.environments.gym import gymnasium

Make = Callable[[], "gymnasium.Env[Any, Any]"]
HUGE = 1e30  # a bound beyond it is none: many write float32's largest number


class Vectorised:
    """Environments by `make`, each stepped by itself: for what has no batched physics here. Slow where there are many.

    make : builds one, with `sample_tasks(count, seed)` -> array [count, ...] and `set_task(task)`
    horizon : steps of a trajectory at most; one that is terminated or truncated ends before
    Observations are flattened. Actions from -1 to 1 are stretched to the bounds of a box that has both, and cut at a
    single one.

    >>> from fewstep.rl.environments import Navigation
    >>> from fewstep.rl.environments.single import Single
    >>> world = Vectorised(lambda: Single(Navigation()), horizon=3)
    >>> _ = world.reset(torch.tensor([[0.3, 0.0]]), 2, [torch.Generator()])
    >>> world.step(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]))[0]
    tensor([[[0.1000, 0.0000],
             [0.0000, 0.1000]]], dtype=torch.float64)
    """

    def __init__(self, make: Make, horizon: int) -> None:
        flat: Any = gymnasium.wrappers.FlattenObservation
        self._make: Make = lambda: flat(make())
        self._first = self._make()
        for name in ("sample_tasks", "set_task"):
            if not hasattr(self._first.unwrapped, name):
                raise InputError(
                    f"{type(self._first.unwrapped).__name__} has no {name}: an environment with tasks has "
                    "sample_tasks(count, seed) and set_task(task); add them to a subclass"
                )
        seen, space = self._first.observation_space, self._first.action_space
        self.discrete = isinstance(space, gymnasium.spaces.Discrete)
        flat_box = isinstance(space, gymnasium.spaces.Box) and len(space.shape) == 1
        if not self.discrete and not (flat_box and np.issubdtype(space.dtype, np.floating)):
            raise InputError(f"actions must be a Discrete or a Box of one dimension of real numbers, but {space} came")
        if not isinstance(seen, gymnasium.spaces.Box):
            raise InputError(f"observations must always be of as many numbers, but {seen} came; pad them to a Box")
        self.observations = int(np.prod(seen.shape or (1,)))
        self.actions = int(space.n) if isinstance(space, gymnasium.spaces.Discrete) else int(np.prod(space.shape or ()))
        self.horizon = horizon
        self._all: Any = None

    def sample_tasks(self, count: int, generator: torch.Generator) -> Tensor:
        seed = int(torch.randint(2**31, (), generator=generator))
        drawn: Any = self._first.unwrapped
        try:
            tasks = np.asarray(drawn.sample_tasks(count, seed), float)
        except (TypeError, ValueError) as error:
            wanted = (
                "sample_tasks(count, seed) must give an array of numbers [count, ...], of which set_task takes a row"
            )
            raise InputError(f"{wanted}; but: {error}") from error
        return torch.as_tensor(tasks).to(torch.get_default_dtype())

    def reset(self, tasks: Tensor, trajectories: int, generators: Sequence[torch.Generator]) -> Tensor:
        count, self._shape = len(tasks) * trajectories, (len(tasks), trajectories)
        if self._all is None or self._all.num_envs != count:
            self.close()
            self._all = gymnasium.vector.SyncVectorEnv([self._make] * count)
        for number, env in enumerate(self._all.envs):
            env.unwrapped.set_task(tasks[number // trajectories].cpu().numpy())
        drawn = [torch.randint(2**31, (trajectories,), generator=own).tolist() for own in generators]
        seen, _ = self._all.reset(seed=[seed for row in drawn for seed in row])
        return self._by_task(seen)

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        chosen = actions.cpu().numpy().reshape(self._all.num_envs, *actions.shape[2:])
        space = self._all.single_action_space
        if self.discrete:
            chosen = chosen + space.start  # a policy counts from 0
        else:
            bounded = (np.abs(space.low) < HUGE) & (np.abs(space.high) < HUGE)
            low, high = np.where(bounded, space.low, -1), np.where(bounded, space.high, 1)
            inside = low + (chosen.clip(-1, 1) + 1) / 2 * (high - low)
            chosen = np.where(bounded, inside, chosen).clip(space.low, space.high).astype(space.dtype)
        seen, rewards, terminated, truncated, _ = self._all.step(chosen)
        return self._by_task(seen), self._by_task(rewards), self._by_task(terminated | truncated)

    def close(self) -> None:
        """Let go of the environments."""
        if self._all is not None:
            self._all.close()

    def _by_task(self, rows: Any) -> Tensor:
        return torch.from_numpy(np.array(rows)).reshape(*self._shape, *rows.shape[1:])
