"""The half-cheetah, which runs at a velocity or in a direction that it is not told (Finn et al. 2017, section 5.3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from fewstep.rl.environments.physics import Physics, normal, uniform
from fewstep.rl.environments.runner import Runner


class HalfCheetah(Runner):
    """`velocity`: r = -|v - g| - 0.05 |a|^2, g uniform in [0, 2].  `direction`: r = d v - 0.05 |a|^2, d one of -1 and 1

    `mass`, `friction`: v in place of d v.
    a : the action, cut to [-1, 1], which is full torque;  it never ends
    flavour : "paper", rllab's physics, a step of 0.01 s, v that of the centre of mass, 20 observations: positions but
        for x, velocities, and the centre; "gymnasium", HalfCheetah-v5, a step of 0.05 s, v that of the root over the
        step, 17 observations: positions but for x, velocities. Returns of the two do not compare.
    """

    actions = 6
    file = "half_cheetah.xml"
    sizes: ClassVar[dict[str, int]] = {"paper": 20, "gymnasium": 17}

    def build(self, count: int) -> Physics:
        return Physics(self.file, "torso", count, 1 if self.flavour == "paper" else 5)

    def start(self, trajectories: int, generators: Sequence[torch.Generator]) -> tuple[Any, Any]:
        shape, paper = (trajectories, 9), self.flavour == "paper"
        positions = normal(shape, 0.01, generators) if paper else uniform(shape, 0.1, generators)
        return positions, normal(shape, 0.1, generators)

    def bonus(self, controls: Any) -> Any:
        return -0.05 * (controls**2).sum(1)

    def ended(self) -> Any:
        return np.zeros(self.physics.count, dtype=bool)

    def seen(self) -> Any:
        parts = [self.physics.positions[:, 1:], self.physics.velocities]
        return np.concatenate([*parts, self.physics.centre] if self.flavour == "paper" else parts, 1)
