"""Does an engine compute what the plain loop computes? Its meta-gradient is compared, up to rounding."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fewstep.engine import Engine
from fewstep.learner import Learner
from fewstep.modes import in_eval_mode
from fewstep.task import Task
from fewstep.trial import Bench, Trial

LOOP = Engine(method="loop")
# Relative errors of the whole meta-gradient that raise no doubt. In float32 a ReLU's kink can make more of it.
UNDOUBTED = {torch.float64: 1e-9, torch.float32: 1e-5}
IN_DOUBLE = {"exact": 1e-8, "none": 1e-8, "finite_difference": 1e-4}
# How many times as far off as rounding takes the loop itself an engine may be.
ROUNDINGS = {"full": 10.0, "bfloat16": 3.0}
WORST = 0.5  # an error that no rounding excuses: that of no gradient is 1
ROUNDING = 8  # machine epsilons: what the long sums of a network make of one
DRAWN, CHANCE = 1e-3, 10.0  # a loop that far from itself draws random numbers; how many times as far others may be
AWAY, PLACES = 1e-3, 3  # weights moved by so much of themselves meet other kinks


class Agreement:
    """The judge of the trials of one bench.

    truth : the meta-gradient by the plain loop in full precision
    """

    def __init__(self, bench: Bench, truth: Tensor) -> None:
        self.bench, self.truth = bench, truth
        self._exact: dict[Engine, bool] = {}
        self._rounding: dict[str, float] = {}
        self._double: tuple[Learner, Task, Tensor] | None = None
        self._drawn = -1.0  # how far the loop is from itself, once that is known

    def note(self, trial: Trial) -> None:
        """Write down how far off a trial's meta-gradient is, and let go of it."""
        trial.error = relative_error(trial.gradient, self.truth)
        trial.gradient = self.truth.new_empty(0)

    def holds(self, trial: Trial) -> bool:
        """Whether a trial's engine agrees with the loop.

        Where it is off by more than plain rounding, there are two conditions. Its mathematics has to agree in float64
        on two of the tasks. And what has run has to be off by no more than a few times what rounding does to the loop,
        here or with weights nearby: a kink is at one place, a fault everywhere. A model that draws random numbers is
        judged in eval mode, and not farther off in train mode than chance takes it.
        """
        error, engine = trial.error, trial.engine
        if error <= UNDOUBTED.get(self.truth.dtype, 0.0):
            return True
        if not self._is_exact(Engine(method=engine.method, product=engine.product, convolution=engine.convolution)):
            return False
        if not self._chance():
            return self._within_rounding(trial, error)
        try:
            with in_eval_mode(self.bench.learner):
                fine = self._within_rounding(trial, self._error_here(trial))
        except Exception:  # a model that runs in train mode only
            return error <= min(WORST, CHANCE * self._drawn)
        return fine and error <= CHANCE * self._drawn and trial.runner.engine == engine

    def _within_rounding(self, trial: Trial, error: float) -> bool:
        bound = min(WORST, ROUNDINGS[trial.engine.precision] * self._rounding_of(trial.engine))
        return error <= bound or any(self._error_nearby(trial) <= bound for _ in range(PLACES))

    def _chance(self) -> bool:
        """Whether the model draws random numbers: no two engines draw alike, nor does the loop twice."""
        if self._drawn < 0:
            self._drawn = relative_error(self.bench.run(LOOP).gradient, self.truth)
        return self._drawn > DRAWN

    def _is_exact(self, engine: Engine) -> bool:
        """Whether an engine agrees in float64; taken for granted where float64 does not run."""
        if not self._exact:
            self._exact[LOOP] = True
            self._double = self._in_double()
        if engine not in self._exact and self._double is not None:
            learner, tasks, truth = self._double
            error = relative_error(meta_gradient(learner, tasks, engine), truth)
            self._exact[engine] = error <= IN_DOUBLE[learner.derivative]
        return self._exact.get(engine, True)

    def _in_double(self) -> tuple[Learner, Task, Tensor] | None:
        """A learner in float64 with at most two inner steps, two tasks, and the loop's meta-gradient of these.

        In eval mode where random numbers make a difference. None for a model, or a device, that knows no float64.
        """
        try:
            learner = copy.deepcopy(self.bench.learner).double()
            learner.steps = min(learner.steps, 2)
            tasks = tree_map(_double, self.bench.tasks.select(slice(0, 2)))
            truth = meta_gradient(learner, tasks, LOOP)
            if not torch.equal(truth, meta_gradient(learner, tasks, LOOP)):
                truth = meta_gradient(learner.eval(), tasks, LOOP)
        except Exception:
            return None
        return learner, tasks, truth

    def _rounding_of(self, engine: Engine) -> float:
        """How far off the loop itself is by rounding."""
        precision = engine.precision
        if precision not in self._rounding:
            errors, truth = [], self.bench.run(LOOP).gradient if self._chance() else self.truth
            for _ in range(2 if precision == "full" else 1):
                with self._weights_moved(ROUNDING * self._epsilon() if precision == "full" else 0):
                    gradient = self.bench.run(Engine(method="loop", precision=precision)).gradient
                errors.append(relative_error(gradient, truth))
            self._rounding[precision] = max(errors)
        return self._rounding[precision]

    def _epsilon(self) -> float:
        """Of the arithmetic: PyTorch lets convolutions on a GPU round their float32 factors to 10 bits, by default."""
        rounds = self.truth.is_cuda and self.truth.dtype == torch.float32 and torch.backends.cudnn.allow_tf32
        return 2.0**-10 if rounds else torch.finfo(self.truth.dtype).eps

    def _error_nearby(self, trial: Trial) -> float:
        """How far off a trial's engine is where the weights are somewhat different."""
        with self._weights_moved(AWAY):
            return self._error_here(trial)

    def _error_here(self, trial: Trial) -> float:
        truth = self.bench.run(LOOP).gradient
        return relative_error(self.bench.gradient(trial.runner)[1], truth)

    @contextmanager
    def _weights_moved(self, size: float) -> Iterator[None]:
        """Inside, each weight is off by about `size` of itself."""
        before = [value.detach().clone() for value in self.bench.parameters]
        try:
            for value in self.bench.parameters:
                value.data.mul_(1 + size * torch.randn_like(value))
            yield
        finally:
            for value, own in zip(self.bench.parameters, before, strict=True):
                value.data.copy_(own)


def meta_gradient(learner: Learner, tasks: Task, engine: Engine) -> Tensor:
    """The meta-gradient of the mean loss as one vector."""
    learner.engine = engine
    own = [value for value in learner.parameters() if value.requires_grad]
    grads = torch.autograd.grad(learner(tasks).mean(), own, allow_unused=True, materialize_grads=True)
    return torch.cat([grad.flatten() for grad in grads])


def relative_error(value: Tensor, truth: Tensor) -> float:
    """|value - truth| / |truth| of whole gradients: a single tensor can have a true gradient of 0."""
    away, size = float((value - truth).norm()), float(truth.norm())
    return away / size if size else away


def _double(leaf: Tensor) -> Tensor:
    return leaf.double() if leaf.is_floating_point() else leaf
