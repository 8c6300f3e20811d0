"""The two-legged walker in a plane, which is not told where to walk, how fast, or what it is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from fewstep.rl.environments.physics import Physics, uniform
from fewstep.rl.environments.runner import Runner

UPRIGHT = (1, 0.8, 2.0), (2, -1.0, 1.0)  # the torso's height and angle: outside, it ends


class Walker(Runner):
    """`direction`: r = d v + 1 - 0.001 |a|^2, d one of -1 and 1, as ProMP's (Rothfuss et al. 2019)

    The 1 is for standing.  `velocity`: -|v - g| in place of d v, g uniform in [0, 2].  `mass`, `friction`: v
    a : the action, cut to [-1, 1], which is full torque
    It ends where the torso is not between 0.8 and 2 m high, or leans by more than 1 rad.
    Walker2d-v5's model, a step of 0.008 s, v that of the root over the step, 17 observations: positions but for x,
    and velocities cut to [-10, 10].
    """

    actions = 6
    file = "walker2d_v5.xml"
    sizes: ClassVar[dict[str, int]] = {"gymnasium": 17}

    def build(self, count: int) -> Physics:
        return Physics(self.file, "torso", count, 4)

    def start(self, trajectories: int, generators: Sequence[torch.Generator]) -> tuple[Any, Any]:
        return uniform((trajectories, 9), 0.005, generators), uniform((trajectories, 9), 0.005, generators)

    def bonus(self, controls: Any) -> Any:
        return ~self.ended() - 0.001 * (controls**2).sum(1)

    def ended(self) -> Any:
        return self.out_of(*UPRIGHT)

    def seen(self) -> Any:
        return np.concatenate([self.physics.positions[:, 1:], self.physics.velocities.clip(-10, 10)], 1)
