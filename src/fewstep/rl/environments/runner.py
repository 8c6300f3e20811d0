"""What half-cheetah and ant have in common: a velocity or a direction that is not told, and two flavours of physics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fewstep.errors import InputError
from fewstep.rl.environments.physics import Physics, model_file, modules

Goal = Literal["velocity", "direction"]
Flavour = Literal["paper", "gymnasium"]


class Runner(ABC):
    """A body that runs along x. Raises `InputError` where the extra `fewstep[rl]` is not installed.

    fastest : goals of velocity are uniform from 0 to this;  sizes : numbers in an observation, by flavour
    """

    actions: int
    discrete = False
    fastest: ClassVar[float]
    sizes: ClassVar[Mapping[str, int]]

    def __init__(self, task: Goal = "velocity", flavour: Flavour = "paper", horizon: int = 200) -> None:
        if task not in ("velocity", "direction") or flavour not in self.sizes:
            raise InputError(
                "the task must be 'velocity' or 'direction' and the flavour 'paper' or 'gymnasium', but "
                f"{task!r} and {flavour!r} came"
            )
        modules(), model_file("ant.xml")  # or say at once what to install
        self.task, self.flavour, self.horizon = task, flavour, horizon
        self.observations = self.sizes[flavour]
        self._simulations: Physics | None = None

    @property
    def physics(self) -> Physics:
        """All simulations, after `reset`."""
        assert self._simulations is not None, "reset comes first"
        return self._simulations

    def sample_tasks(self, count: int, generator: torch.Generator) -> Tensor:
        drawn = self.fastest * torch.rand(count, 1, generator=generator)
        return drawn if self.task == "velocity" else torch.where(drawn < self.fastest / 2, -1.0, 1.0)

    def reset(self, tasks: Tensor, trajectories: int, generators: Sequence[torch.Generator]) -> Tensor:
        count = len(tasks) * trajectories
        if self._simulations is None or self._simulations.count != count:
            self._simulations = self.build(count)
        self.goals = tasks.double().cpu().numpy().repeat(trajectories, 0)[:, 0]
        self._shape = (len(tasks), trajectories)
        self.physics.start(*self.start(trajectories, generators))
        return self._by_task(self.seen())

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        controls = actions.double().cpu().numpy().reshape(self.physics.count, self.actions).clip(-1, 1)
        before = self.physics.positions[:, 0].copy()
        self.physics.step(controls)
        if self.flavour == "paper":
            velocity = self.physics.centre_velocity[:, 0]
        else:
            velocity = (self.physics.positions[:, 0] - before) / self.physics.dt
        wanted = self.goals * velocity if self.task == "direction" else -abs(velocity - self.goals)
        rewards = wanted + self.bonus(controls)
        return self._by_task(self.seen()), self._by_task(rewards), self._by_task(self.ended())

    @abstractmethod
    def build(self, count: int) -> Physics:
        """So many simulations."""

    @abstractmethod
    def start(self, trajectories: int, generators: Sequence[torch.Generator]) -> tuple[Any, Any]:
        """Positions, relative to the model's rest, and velocities [count, ...], each task's by its own generator."""

    @abstractmethod
    def bonus(self, controls: Any) -> Any:
        """What a step's reward [count] has beside how well it runs."""

    @abstractmethod
    def ended(self) -> Any:
        """Whether a trajectory has ended [count]."""

    @abstractmethod
    def seen(self) -> Any:
        """Observations [count, o]."""

    def _by_task(self, rows: Any) -> Tensor:
        return torch.from_numpy(rows.reshape(*self._shape, *rows.shape[1:]))
