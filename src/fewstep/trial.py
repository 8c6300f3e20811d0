"""Engines tried on a batch of tasks: does each run, how fast is it, how much memory does it take?"""

from __future__ import annotations

import copy
import time
import warnings
from dataclasses import dataclass, field, replace
from statistics import median

import torch
from torch import Tensor

from fewstep.engine import Engine, Runner
from fewstep.errors import FallbackWarning, FewstepError
from fewstep.footprint import footprint
from fewstep.learner import Learner
from fewstep.meta_step import Average, MetaStep
from fewstep.task import Task

TURN = 0.05  # seconds: several time slices on a busy machine
FAR = 1.5

clock = time.perf_counter


@dataclass(eq=False)
class Trial:
    """One engine on the tasks.

    first, seconds : of the first meta-step, compilation included, and of the fastest later one
    gradient : the meta-gradient, up to a factor that all trials share;  error : how far off it is, relative
    peak : bytes that a meta-step takes at most beyond what was held before; None where nobody counts them
    """

    engine: Engine
    runner: Runner
    first: float
    gradient: Tensor = field(repr=False)
    error: float = float("nan")
    seconds: float = float("inf")
    peak: int | None = None


class Bench:
    """A copy of a learner to try engines on, step by step as training would: the learner itself stays as it is."""

    def __init__(self, learner: Learner, tasks: Task, clip: float | None, average: Average | None) -> None:
        frozen = {id(value): value for value in learner.parameters() if not value.requires_grad}
        self.learner = copy.deepcopy(learner, memo=frozen)
        self.iteration = max(learner.iteration or 0, learner.exact_from)  # with the derivative that takes long
        self.parameters = [value for value in self.learner.parameters() if value.requires_grad]
        self.tasks = tasks
        self.device = self.parameters[0].device
        self.optimizer = torch.optim.Adam(self.learner.parameters())
        self.step = MetaStep(self.learner, self.optimizer, clip, average)

    def run(self, engine: Engine) -> Trial:
        """The first meta-step by an engine; raises whatever keeps it from running."""
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", FallbackWarning)
            self.learner.engine = engine
            runner = self.learner.runner
            first, gradient = self.gradient(runner)
        if runner.engine != engine:
            raise FewstepError(str(told[-1].message))
        return Trial(engine, runner, first, gradient)

    def gradient(self, runner: Runner) -> tuple[float, Tensor]:
        """The seconds of a meta-step that is Adam's first, and the meta-gradient up to a factor.

        Where Adam is compiled in, only its moving average tells the gradient.
        """
        self.learner.runner = runner
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()  # in place: a CUDA graph has their addresses
        seconds = self._timed(1)
        moments = [self.optimizer.state.get(value, {}).get("exp_avg") for value in self.parameters]
        pairs = zip(self.parameters, moments, strict=True)
        parts = [(torch.zeros_like(own) if mean is None else mean).flatten() for own, mean in pairs]
        return seconds, torch.cat(parts).detach()

    def weigh(self, trial: Trial) -> None:
        """Measure time and memory of a meta-step that is not the first."""
        self.learner.runner = trial.runner
        seconds: list[float] = []
        trial.peak = footprint(lambda: seconds.append(self._timed(1)), self.device)
        trial.seconds = seconds[0]
        if trial.engine.graph:  # it holds what it takes all the time, unseen: as much as the same work without it
            trial.runner.engine = replace(trial.engine, graph=False)
            trial.peak = footprint(lambda: self._timed(1), self.device)
            trial.runner.engine = trial.engine

    def compare(self, trial: Trial, known: Trial, rounds: int) -> None:
        """Time a trial against another one, in turns, as what disturbs the machine then disturbs both.

        The middle of the ratios counts. Two that agree are enough for a trial that is far slower.
        """
        ratios: list[float] = []
        while len(ratios) < rounds and not (len(ratios) == 2 and min(ratios) > FAR):
            ratios.append(self._turn(trial) / self._turn(known))
        if ratios:
            trial.seconds = known.seconds * median(ratios)

    def _turn(self, trial: Trial) -> float:
        """Seconds of a meta-step, in a turn of several where they are short."""
        self.learner.runner = trial.runner
        count = max(1, round(TURN / trial.seconds))
        return self._timed(count) / count

    def _timed(self, count: int) -> float:
        """Seconds of some meta-steps of one iteration, at the rate 0: nothing moves, each has the same to do."""
        self._wait()
        start = clock()
        for _ in range(count):
            self.learner.iteration = self.iteration
            self.step(self.tasks, 0.0)
        self._wait()
        return clock() - start

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.get_device_module(self.device).synchronize()
