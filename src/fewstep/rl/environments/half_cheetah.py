"""The half-cheetah, which runs at a velocity or in a direction that it is not told (Finn et al. 2017, section 5.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fewstep.errors import InputError
from fewstep.rl.environments.physics import Physics, normal, uniform


class HalfCheetah:
    """`velocity`: r = -|v - g| - 0.05 |a|^2, g uniform in [0, 2].  `direction`: r = d v - 0.05 |a|^2, d one of -1 and 1

    a : the action, cut to [-1, 1], which is full torque;  it never ends
    flavour : "paper", rllab's physics, a step of 0.01 s, v that of the centre of mass, 20 observations: positions but
        for x, velocities, and the centre; "gymnasium", HalfCheetah-v5, a step of 0.05 s, v that of the root over the
        step, 17 observations: positions but for x, velocities. Returns of the two do not compare.
    Needs the extra `fewstep[rl]`; `InputError` without it.
    """

    actions = 6

    def __init__(self, task: Literal["velocity", "direction"] = "velocity",
                 flavour: Literal["paper", "gymnasium"] = "paper", horizon: int = 200) -> None:  # fmt: skip
        if task not in ("velocity", "direction") or flavour not in ("paper", "gymnasium"):
            raise InputError(
                "the task must be 'velocity' or 'direction' and the flavour 'paper' or 'gymnasium', but "
                f"{task!r} and {flavour!r} came"
            )
        self.task, self.flavour, self.horizon = task, flavour, horizon
        self.observations = 20 if flavour == "paper" else 17
        self._physics: Physics | None = None

    def sample_tasks(self, count: int, generator: torch.Generator) -> Tensor:
        drawn = 2 * torch.rand(count, 1, generator=generator)
        return drawn if self.task == "velocity" else torch.where(drawn < 1, -1.0, 1.0)

    def reset(self, tasks: Tensor, trajectories: int, generators: Sequence[torch.Generator]) -> Tensor:
        count = len(tasks) * trajectories
        if self._physics is None or self._physics.count != count:
            self._physics = Physics("half_cheetah.xml", "torso", count, 1 if self.flavour == "paper" else 5)
        self._goals = tasks.double().cpu().numpy().repeat(trajectories, 0)[:, 0]
        self._shape = (len(tasks), trajectories)
        if self.flavour == "paper":
            positions = normal((trajectories, 9), 0.01, generators)
        else:
            positions = uniform((trajectories, 9), 0.1, generators)
        self._physics.start(positions, normal((trajectories, 9), 0.1, generators))
        return self._seen()

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        physics = self._physics
        assert physics is not None
        controls = actions.double().cpu().numpy().reshape(physics.count, 6).clip(-1, 1)
        before = physics.positions[:, 0].copy()
        physics.step(controls)
        if self.flavour == "paper":
            velocity = physics.centre_velocity[:, 0]
        else:
            velocity = (physics.positions[:, 0] - before) / physics.dt
        wanted = self._goals * velocity if self.task == "direction" else -abs(velocity - self._goals)
        rewards = wanted - 0.05 * (controls**2).sum(1)
        return self._seen(), self._by_task(rewards), torch.zeros(self._shape, dtype=torch.bool)

    def _seen(self) -> Tensor:
        physics: Any = self._physics
        parts = [physics.positions[:, 1:], physics.velocities]
        return self._by_task(np.concatenate([*parts, physics.centre] if self.flavour == "paper" else parts, 1))

    def _by_task(self, rows: Any) -> Tensor:
        return torch.from_numpy(rows.reshape(*self._shape, *rows.shape[1:]))
