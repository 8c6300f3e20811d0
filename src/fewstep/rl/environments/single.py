"""One trajectory of one task of an environment, as a Gymnasium environment: for any agent that takes such."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.errors import InputError
from fewstep.rl.environments import Ant, Bandits, HalfCheetah, Humanoid, Navigation, TabularMDP, Walker
from fewstep.rl.environments.base import Environment
from fewstep.rl.environments.gym import gymnasium

WORLDS: dict[str, Callable[..., Environment]] = {
    "fewstep/Navigation-v0": Navigation,
    "fewstep/HalfCheetah-v0": HalfCheetah,
    "fewstep/Ant-v0": Ant,
    "fewstep/Walker-v0": Walker,
    "fewstep/Humanoid-v0": Humanoid,
    "fewstep/Bandits-v0": Bandits,
    "fewstep/TabularMDP-v0": TabularMDP,
}


class Single(gymnasium.Env[Any, Any]):
    """`world` with one task, which `set_task` or each `reset` without one chooses.

    Actions are in -1..1, or one of some. An episode is terminated where the trajectory ends, and truncated after
    `world.horizon` steps.

    >>> env = Single(Navigation(horizon=3))
    >>> env.set_task([0.3, 0.0])
    >>> observation, _ = env.reset(seed=0)
    >>> env.step(np.array([1.0, 0.0]))[0]
    array([0.1, 0. ])
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012  (Gymnasium's own form)

    def __init__(self, world: Environment) -> None:
        self.world = world
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (world.observations,), np.float64)
        spaces = gymnasium.spaces
        self.action_space: gymnasium.Space[Any] = (
            spaces.Discrete(world.actions) if world.discrete else spaces.Box(-1.0, 1.0, (world.actions,), np.float64)
        )
        self._chosen: Tensor | None = None
        self._steps = 0

    def sample_tasks(self, count: int, seed: int | None = None) -> Any:
        """Tasks [count, ...] of the distribution; the same for the same seed."""
        return self.world.sample_tasks(count, self._generator(seed)).double().numpy()

    def set_task(self, task: Any) -> None:
        """What to do from the next `reset` on; None draws a task at each."""
        chosen = None if task is None else torch.as_tensor(np.asarray(task), dtype=torch.float64)
        expected = self.world.sample_tasks(1, torch.Generator())[0].shape
        if chosen is not None and chosen.shape != expected:
            raise InputError(f"a task has the shape {tuple(expected)}, but {tuple(chosen.shape)} came")
        self._chosen = chosen

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        generator = self._generator(None)
        drawn = self.world.sample_tasks(1, generator).double()
        self.task = drawn if self._chosen is None else self._chosen[None]
        self._steps = 0
        seen = self.world.reset(self.task, 1, [generator])
        return self._plain(seen), {"task": self.task[0].numpy()}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        kind, shape = (torch.int64, (1, 1)) if self.world.discrete else (torch.float64, (1, 1, -1))
        seen, rewards, ended = self.world.step(torch.as_tensor(action, dtype=kind).reshape(shape))
        self._steps += 1
        return self._plain(seen), float(rewards), bool(ended), self._steps >= self.world.horizon, {}

    def _generator(self, seed: int | None) -> torch.Generator:
        number = int(self.np_random.integers(2**60)) if seed is None else seed
        return torch.Generator().manual_seed(number)

    def _plain(self, seen: Tensor) -> Any:
        return seen.double().numpy().reshape(-1).copy()


def register() -> None:
    """Make the worlds above known to `gymnasium.make`, with their options."""
    for name, world in WORLDS.items():
        if name not in gymnasium.registry:
            gymnasium.register(name, entry_point=_made(world))


def _made(world: Callable[..., Environment]) -> Callable[..., Single]:
    return lambda **options: Single(world(**options))
