"""The ant, which walks at a velocity or in a direction that it is not told (Finn et al. 2017, section 5.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from fewstep.rl.environments.physics import Physics, normal, uniform
from fewstep.rl.environments.runner import Runner

STANDING = [0, 0, 0.55, 1, 0, 0, 0, 0, 1, 0, -1, 0, -1, 0, 1]  # rllab's start
HEALTHY = 0.2, 1.0  # the torso's height: outside, it ends


class Ant(Runner):
    """`velocity`: r = 1 - |v - g| + costs, g uniform in [0, 3].  `direction`: r = d v + costs, d one of -1 and 1

        costs = 0.05 - 0.005 |a|^2 - 0.0005 |f|^2

    `mass`, `friction`: v in place of d v.
    a : the action, cut to [-1, 1], which is full torque;  f : contact forces on all bodies, each cut to [-1, 1]
    It ends where the torso is not between 0.2 and 1 m high.
    flavour : "paper", rllab's physics, a step of 0.02 s, v that of the centre of mass, 125 observations: positions,
        velocities, f, the torso's rotation, and the centre; "gymnasium", Ant-v5's model, a step of 0.05 s, v that of
        the torso over the step, 105 observations: positions but for x and y, velocities, f. Returns of the two do not
        compare.
    """

    actions = 8
    file = "ant.xml"
    fastest = 3.0
    sizes: ClassVar[dict[str, int]] = {"paper": 125, "gymnasium": 105}

    def build(self, count: int) -> Physics:
        if self.flavour == "paper":
            return Physics(self.file, "torso", count, 1, contacts="after", change=_as_in_rllab)
        return Physics(self.file, "torso", count, 5, contacts="before")

    def start(self, trajectories: int, generators: Sequence[torch.Generator]) -> tuple[Any, Any]:
        if self.flavour == "paper":
            positions = normal((trajectories, 15), 0.01, generators) + STANDING - self.physics.rest
        else:
            positions = uniform((trajectories, 15), 0.1, generators)
        return positions, normal((trajectories, 14), 0.1, generators)

    def bonus(self, controls: Any) -> Any:
        alive = 1.05 if self.task == "velocity" else 0.05
        return alive - 0.005 * (controls**2).sum(1) - 0.0005 * (self._forces() ** 2).sum((1, 2))

    def ended(self) -> Any:
        return self.out_of((2, *HEALTHY))

    def seen(self) -> Any:
        physics, forces = self.physics, self._forces()
        if self.flavour == "paper":
            felt = forces.reshape(physics.count, -1)
            return np.concatenate([physics.positions, physics.velocities, felt, physics.turned, physics.centre], 1)
        felt = forces[:, 1:].reshape(physics.count, -1)
        return np.concatenate([physics.positions[:, 2:], physics.velocities, felt], 1)

    def _forces(self) -> Any:
        return self.physics.contacts.clip(-1, 1)


def _as_in_rllab(spec: Any) -> None:
    """Longer physics steps, and softer contacts."""
    spec.option.timestep = 0.02
    for geom in spec.geoms:
        geom.solref, geom.solimp = [0.02, 1], [0.8, 0.8, 0.01, 0.5, 2]
