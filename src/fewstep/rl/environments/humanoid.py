"""The humanoid, which is not told where to walk, how fast, or what it is made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fewstep.rl.environments.physics import Physics, uniform
from fewstep.rl.environments.runner import Runner

STANDING = (2, 1.0, 2.0)  # the torso's height: outside, it ends


class Humanoid(Runner):
    """`direction`: r = 1.25 d v + 5 - 0.1 |u|^2 - c, d any in the plane, as ProMP's (Rothfuss et al. 2019)

    The 5 are for standing.  `velocity`: -|v - g| in place of d v, g uniform in [0, 2].  `mass`, `friction`: v. Of
    these three v is along x.
    u : the controls, 0.4 of the action cut to [-1, 1], which is full torque
    c : 5e-7 of the squared contact forces on all bodies, at most 10
    It ends where the torso is not between 1 and 2 m high.
    Humanoid-v5's model, a step of 0.015 s, v that of the centre of mass over the step, 45 observations: positions but
    for x and y, and velocities. Gymnasium's own has 348, which follow from these but for the contact forces.
    """

    actions = 17
    file = "humanoid.xml"
    sizes: ClassVar[dict[str, int]] = {"gymnasium": 45}
    strength = 0.4
    weight = 1.25

    def build(self, count: int) -> Physics:
        return Physics(self.file, "torso", count, 5, contacts="before")

    def direction(self, drawn: Tensor) -> Tensor:
        return torch.cat([(2 * math.pi * drawn).cos(), (2 * math.pi * drawn).sin()], -1)

    def place(self) -> Any:
        return self.physics.centre[:, :2]

    def start(self, trajectories: int, generators: Sequence[torch.Generator]) -> tuple[Any, Any]:
        return uniform((trajectories, 24), 0.01, generators), uniform((trajectories, 23), 0.01, generators)

    def bonus(self, controls: Any) -> Any:
        contact = (5e-7 * (self.physics.contacts**2).sum((1, 2))).clip(max=10)
        return 5.0 * ~self.ended() - 0.1 * (controls**2).sum(1) - contact

    def ended(self) -> Any:
        return self.out_of(STANDING)

    def seen(self) -> Any:
        return np.concatenate([self.physics.positions[:, 2:], self.physics.velocities], 1)
