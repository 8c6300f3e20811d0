"""What all bodies that run have in common: what is not told to them, and two flavours of physics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from fewstep.errors import InputError
from fewstep.rl.environments.physics import Physics, model_file, modules, parts_of

Goal = Literal["velocity", "direction", "mass", "friction"]
Flavour = Literal["paper", "gymnasium"]


class Runner(ABC):
    """A body that runs. Raises `InputError` where the extra `fewstep[rl]` is not installed.

    task : what is not told. "velocity" along x, and "direction", are what the reward asks for. With "mass" and
        "friction" it is for running along x, and each body's mass and inertia, or each geom's friction, is the model's
        times 1.5^u, u uniform in [-3, 3]: the range of rand_param_envs (taken by Rakelly et al. 2019), which draws
        these, apart, and damping all at once
    Where a simulation diverges, observation and reward are NaN: an `Explorer` names the task, or leaves it out. What
    has ended stands still, and costs nothing.
    flavour : by default the first of `sizes`
    file : the model;  sizes : numbers in an observation, by flavour;  fastest : velocities are uniform from 0 to this
    strength : the control of an action of 1;  weight : of running well in the reward
    """

    actions: int
    discrete = False
    file: ClassVar[str]
    sizes: ClassVar[Mapping[str, int]]
    fastest: ClassVar[float] = 2.0
    strength: ClassVar[float] = 1.0
    weight: ClassVar[float] = 1.0

    def __init__(self, task: Goal = "velocity", flavour: Flavour | None = None, horizon: int = 200) -> None:
        flavours = list(self.sizes)
        chosen = flavour or flavours[0]
        if task not in get_args(Goal) or chosen not in flavours:
            expected = f"task must be one of {', '.join(get_args(Goal))} and the flavour of {', '.join(flavours)}"
            raise InputError(f"the {expected}, but {task!r} and {chosen!r} came")
        modules(), model_file(self.file)  # or say at once what to install
        self.task, self.flavour, self.horizon = task, chosen, horizon
        self.observations = self.sizes[chosen]
        self._simulations: Physics | None = None

    @property
    def physics(self) -> Physics:
        """All simulations, after `reset`."""
        assert self._simulations is not None, "reset comes first"
        return self._simulations

    def sample_tasks(self, count: int, generator: torch.Generator) -> Tensor:
        if self.task in ("mass", "friction"):
            return 1.5 ** (6 * torch.rand(count, parts_of(self.file, self.task), generator=generator) - 3)
        drawn = torch.rand(count, 1, generator=generator)
        return self.fastest * drawn if self.task == "velocity" else self.direction(drawn)

    def reset(self, tasks: Tensor, trajectories: int, generators: Sequence[torch.Generator]) -> Tensor:
        count = len(tasks) * trajectories
        if self._simulations is None or self._simulations.count != count:
            self._simulations = self.build(count)
        self.goals = tasks.double().cpu().numpy().repeat(trajectories, 0)
        if self.task in ("mass", "friction"):
            self.physics.multiply(self.task, self.goals)
        self._shape, self._going = (len(tasks), trajectories), np.ones(count, bool)
        self.physics.start(*self.start(trajectories, generators))
        return self._by_task(self.seen())

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        controls = actions.double().cpu().numpy().reshape(self.physics.count, self.actions)
        controls = self.strength * controls.clip(-1, 1)
        before = self.place().copy()
        self.physics.step(controls, self._going)
        with np.errstate(over="ignore", invalid="ignore"):  # of simulations that diverge, whose numbers go no further
            if self.flavour == "paper":
                velocity = self.physics.centre_velocity
            else:
                velocity = (self.place() - before) / self.physics.dt
            rewards, seen = self.weight * self._wanted(velocity) + self.bonus(controls), self.seen()
            lost, ended = self.physics.lost, self.ended()
        self._going &= ~ended
        rewards[lost], seen[lost] = np.nan, np.nan
        return self._by_task(seen), self._by_task(rewards), self._by_task(ended)

    def _wanted(self, velocity: Any) -> Any:
        """How well it runs [count], at velocities [count, axes]."""
        if self.task == "velocity":
            return -abs(velocity[:, 0] - self.goals[:, 0])
        if self.task == "direction":
            return (self.goals * velocity[:, : self.goals.shape[1]]).sum(1)
        return velocity[:, 0]

    def direction(self, drawn: Tensor) -> Tensor:
        """Directions [count, axes] of numbers in [0, 1): along x, or against it."""
        return torch.where(drawn < 0.5, -1.0, 1.0)

    def place(self) -> Any:
        """Where it is [count, axes]."""
        return self.physics.positions[:, :1]

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

    def out_of(self, *ranges: tuple[int, float, float]) -> Any:
        """Whether the simulation [count] has diverged, or one of some positions is not within its range."""
        positions, fine = self.physics.positions, ~self.physics.lost
        for index, least, most in ranges:
            fine &= (positions[:, index] >= least) & (positions[:, index] <= most)
        return ~fine

    def _by_task(self, rows: Any) -> Tensor:
        return torch.from_numpy(rows.reshape(*self._shape, *rows.shape[1:]))
