"""The ant, which walks at a velocity or in a direction that it is not told (Finn et al. 2017, section 5.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fewstep.errors import InputError
from fewstep.rl.environments.physics import Physics, normal, uniform

STANDING = [0, 0, 0.55, 1, 0, 0, 0, 0, 1, 0, -1, 0, -1, 0, 1]  # rllab's start
HEALTHY = 0.2, 1.0  # the torso's height: outside, it ends


class Ant:
    """`velocity`: r = 1 - |v - g| + costs, g uniform in [0, 3].  `direction`: r = d v + costs, d one of -1 and 1

        costs = 0.05 - 0.005 |a|^2 - 0.0005 |f|^2

    a : the action, cut to [-1, 1], which is full torque;  f : contact forces on all bodies, each cut to [-1, 1]
    It ends where the torso is not between 0.2 and 1 m high, or its state is not finite.
    flavour : "paper", rllab's physics, a step of 0.02 s, v that of the centre of mass, 125 observations: positions,
        velocities, f, the torso's rotation, and the centre; "gymnasium", Ant-v5's model, a step of 0.05 s, v that of
        the torso over the step, 105 observations: positions but for x and y, velocities, f. Returns of the two do not
        compare.
    Needs the extra `fewstep[rl]`; `InputError` without it.
    """

    actions = 8

    def __init__(self, task: Literal["velocity", "direction"] = "velocity",
                 flavour: Literal["paper", "gymnasium"] = "paper", horizon: int = 200) -> None:  # fmt: skip
        if task not in ("velocity", "direction") or flavour not in ("paper", "gymnasium"):
            raise InputError(
                "the task must be 'velocity' or 'direction' and the flavour 'paper' or 'gymnasium', but "
                f"{task!r} and {flavour!r} came"
            )
        self.task, self.flavour, self.horizon = task, flavour, horizon
        self.observations = 125 if flavour == "paper" else 105
        self._physics: Physics | None = None

    def sample_tasks(self, count: int, generator: torch.Generator) -> Tensor:
        drawn = 3 * torch.rand(count, 1, generator=generator)
        return drawn if self.task == "velocity" else torch.where(drawn < 1.5, -1.0, 1.0)

    def reset(self, tasks: Tensor, trajectories: int, generators: Sequence[torch.Generator]) -> Tensor:
        count, paper = len(tasks) * trajectories, self.flavour == "paper"
        if self._physics is None or self._physics.count != count:
            change = _as_in_rllab if paper else _as_it_is
            self._physics = Physics("ant.xml", "torso", count, 1 if paper else 5, contacts=True, change=change)
        self._goals = tasks.double().cpu().numpy().repeat(trajectories, 0)[:, 0]
        self._shape = (len(tasks), trajectories)
        if paper:
            positions = normal((trajectories, 15), 0.01, generators) + STANDING - self._physics.rest
        else:
            positions = uniform((trajectories, 15), 0.1, generators)
        self._physics.start(positions, normal((trajectories, 14), 0.1, generators))
        return self._seen()

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        physics = self._physics
        assert physics is not None
        controls = actions.double().cpu().numpy().reshape(physics.count, 8).clip(-1, 1)
        before = physics.positions[:, 0].copy()
        physics.step(controls)
        if self.flavour == "paper":
            velocity = physics.centre_velocity[:, 0]
        else:
            velocity = (physics.positions[:, 0] - before) / physics.dt
        wanted = self._goals * velocity if self.task == "direction" else 1 - abs(velocity - self._goals)
        rewards = wanted + 0.05 - 0.005 * (controls**2).sum(1) - 0.0005 * (self._forces() ** 2).sum((1, 2))
        height = physics.positions[:, 2]
        finite = np.isfinite(physics.positions).all(1) & np.isfinite(physics.velocities).all(1)
        ended = ~(finite & (height >= HEALTHY[0]) & (height <= HEALTHY[1]))
        return self._seen(), self._by_task(rewards), self._by_task(ended)

    def _forces(self) -> Any:
        physics: Any = self._physics
        return physics.contacts.clip(-1, 1)

    def _seen(self) -> Tensor:
        physics: Any = self._physics
        rows, forces = physics.count, self._forces()
        if self.flavour == "paper":
            parts = [physics.positions, physics.velocities, forces.reshape(rows, -1), physics.turned, physics.centre]
        else:
            parts = [physics.positions[:, 2:], physics.velocities, forces[:, 1:].reshape(rows, -1)]
        return self._by_task(np.concatenate(parts, 1))

    def _by_task(self, rows: Any) -> Tensor:
        return torch.from_numpy(rows.reshape(*self._shape, *rows.shape[1:]))


def _as_in_rllab(spec: Any) -> None:
    """Longer physics steps, and softer contacts."""
    spec.option.timestep = 0.02
    for geom in spec.geoms:
        geom.solref, geom.solimp = [0.02, 1], [0.8, 0.8, 0.01, 0.5, 2]


def _as_it_is(spec: Any) -> None:
    pass
