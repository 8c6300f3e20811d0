"""One trajectory of one task of an environment, as a Gymnasium environment: for any agent that takes such."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fewstep.errors import InputError
from fewstep.rl import environments
from fewstep.rl.environments import WORLDS, Environment, Runner
from fewstep.rl.environments.camera import TOO_LATE, Camera, choose_opengl
from fewstep.rl.environments.gym import gymnasium


class Single(gymnasium.Env[Any, Any]):
    """`world` with one task, which `set_task` or each `reset` without one chooses.

    Actions are in -1..1, or one of some. An episode is terminated where the trajectory ends, and truncated after
    `world.horizon` steps. Of bodies that run, render_mode "rgb_array" gives pictures; where there is no screen, MuJoCo
    reads the environment variable MUJOCO_GL for that.

    >>> env = Single(environments.Navigation(horizon=3))
    >>> env.set_task([0.3, 0.0])
    >>> observation, _ = env.reset(seed=0)
    >>> env.step(np.array([1.0, 0.0]))[0]
    array([0.1, 0. ])
    """

    metadata: dict[str, Any] = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012  (Gymnasium's own form)

    def __init__(self, world: Environment, render_mode: str | None = None) -> None:
        if render_mode is not None and (render_mode != "rgb_array" or not isinstance(world, Runner)):
            drawn = "as rgb_array" if isinstance(world, Runner) else "in no way"
            raise InputError(f"this world is drawn {drawn}, but the render_mode {render_mode!r} came")
        if world.horizon < 1:
            raise InputError(f"the horizon must be at least 1, but {world.horizon} came")
        self.world, self.render_mode = world, render_mode
        self._camera: Camera | None = None
        if isinstance(world, Runner) and render_mode:
            self.metadata = {**self.metadata, "render_fps": round(1 / world.build(1).dt)}
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (world.observations,), np.float64)
        spaces = gymnasium.spaces
        self.action_space: gymnasium.Space[Any] = (
            spaces.Discrete(world.actions) if world.discrete else spaces.Box(-1.0, 1.0, (world.actions,), np.float64)
        )
        self._chosen: Tensor | None = None
        self._left = 0

    def sample_tasks(self, count: int, seed: int | None = None) -> Any:
        """Tasks [count, ...] of the distribution; the same for the same seed."""
        return self.world.sample_tasks(count, self._generator(seed)).double().numpy()

    def set_task(self, task: Any) -> None:
        """What to do from the next `reset` on; None draws a task at each."""
        chosen = None if task is None else torch.as_tensor(np.asarray(task), dtype=torch.float64)
        expected = self.world.sample_tasks(1, torch.Generator())[0].shape
        if chosen is not None and chosen.shape != expected:
            raise InputError(f"a task has the shape {tuple(expected)}, but {tuple(chosen.shape)} came")
        if chosen is not None and not chosen.isfinite().all():
            raise InputError(f"a task is of finite numbers, but {chosen.tolist()} came")
        self._chosen = chosen

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        generator = self._generator(None)
        drawn = self.world.sample_tasks(1, generator).double()
        self.task = drawn if self._chosen is None else self._chosen[None]
        self._left = self.world.horizon
        seen = self.world.reset(self.task, 1, [generator])
        return self._plain(seen), {"task": self.task[0].numpy()}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        if not self._left:
            raise InputError(f"reset comes first, and again after {self.world.horizon} steps")
        kind, shape = (torch.int64, (1, 1)) if self.world.discrete else (torch.float64, (1, 1, -1))
        seen, rewards, ended = self.world.step(torch.as_tensor(action, dtype=kind).reshape(shape))
        self._left -= 1
        return self._plain(seen), float(rewards), bool(ended), not self._left, {}

    def render(self) -> Any:
        """A picture uint8 [height, width, 3] of the present state, or None without a render_mode."""
        if self.render_mode is None:
            return None
        if not hasattr(self, "task"):
            raise InputError("reset comes first")
        assert isinstance(self.world, Runner)
        self._camera = self._camera or Camera(self.world.physics.model)
        return self._camera.frame(self.world.physics.positions[0])

    def close(self) -> None:
        if self._camera is not None:
            self._camera.close()
            self._camera = None

    def _generator(self, seed: int | None) -> torch.Generator:
        number = int(self.np_random.integers(2**60)) if seed is None else seed
        return torch.Generator().manual_seed(number)

    def _plain(self, seen: Tensor) -> Any:
        return seen.double().numpy().reshape(-1).copy()


def register() -> None:
    """Make the worlds above known to `gymnasium.make`, with their options."""
    for name, world in WORLDS.items():
        if name not in gymnasium.registry:
            gymnasium.register(name, f"{__name__}:made", kwargs={"world": world.__name__})


def made(world: str, render_mode: str | None = None, **options: Any) -> Single:
    """One of fewstep.rl.environments by the name of its class, with its options."""
    if render_mode and not choose_opengl():
        raise InputError(TOO_LATE)
    return Single(getattr(environments, world)(**options), render_mode)
