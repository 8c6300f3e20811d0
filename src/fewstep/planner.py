"""Which engine is the fastest for a learner: found on its first tasks, in agreement with the plain loop."""

from __future__ import annotations

import platform
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from math import inf
from typing import Any

import torch

from fewstep import trial
from fewstep.agreement import LOOP
from fewstep.checks import check_tasks
from fewstep.diagnose import where_not_finite
from fewstep.distributed import ranks
from fewstep.engine import Engine
from fewstep.errors import DivergenceError, FallbackWarning, InputError
from fewstep.footprint import footprint
from fewstep.learner import Learner
from fewstep.replay import Moment
from fewstep.search import Search, Tried
from fewstep.task import Task
from fewstep.trial import Bench

GIB = 2**30


@dataclass(frozen=True)
class Plan:
    """An engine, and what it was chosen by.

    tried : every engine that was tried, the fastest first;  tasks : how many there were in a step
    spent, seconds : what planning took, and might take;  memory : the limit in GiB, None without one
    machine : what the times belong to
    """

    engine: Engine
    tried: tuple[Tried, ...]
    tasks: int
    spent: float
    seconds: float
    memory: float | None
    machine: Mapping[str, Any]

    def peak_of(self, tasks: int) -> float:
        """Bytes that a meta-step of so many tasks takes, at most, by what was measured; 0 where nobody counts them."""
        more = max(1.0, self.engine.at_a_time(tasks) / self.engine.at_a_time(self.tasks))
        return more * (self.chosen.peak or 0)

    @property
    def chosen(self) -> Tried:
        """What was measured of the engine."""
        return self._of(self.engine)

    def __str__(self) -> str:
        seconds, loop = self.chosen.seconds or inf, self._of(LOOP).seconds or inf
        said = [f"{1000 * seconds / self.tasks:.3g} ms a task", f"{loop / seconds:.3g}x as fast as the plain loop"]
        if self.chosen.peak is not None:
            said.append(f"{self.chosen.peak / 2**20:.3g} MiB")
        return f"{self.engine}: {', '.join(said)}; the best of {len(self.tried)} engines in {self.spent:.0f} s"

    def _of(self, engine: Engine) -> Tried:
        return next(entry for entry in self.tried if entry.engine == engine)

    def to_json(self) -> dict[str, Any]:
        """Plain values, from which `from_json` makes the plan again."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Any) -> Plan:
        """Raises `InputError` where the content is no plan."""
        try:
            tried = [Tried(**{**entry, "engine": Engine(**entry["engine"])}) for entry in content["tried"]]
            plan = cls(**{**content, "engine": Engine(**content["engine"]), "tried": tuple(tried)})
            str(plan)
        except (TypeError, KeyError, StopIteration, AttributeError, InputError) as error:
            raise InputError(f"this is no plan of an engine ({error}); delete it to plan anew") from error
        return plan


def plan(learner: Learner, tasks: Task, *, seconds: float = 120.0, memory: float | None = None,
         clip: float | None = None, **fixed: Any) -> Plan:  # fmt: skip
    """The fastest engine for a learner, tried on `tasks`: as many, and of the shapes, as in training.

        learner.engine = fewstep.plan(learner, tasks).engine

    Every engine is timed as `train` runs it, by whole meta-steps with Adam, on a copy of the learner: neither the
    learner nor a random generator changes. One that fails to run is left out, and so is, with a warning, one whose
    meta-gradient is not that of the plain loop. The precision is the learner's; all other choices are free.

    seconds : about how long planning may take. What takes longest is compiling: none begins that by what others took
        would not end in time. The loop itself, and one other engine, are tried in any case.
    memory : GiB that a meta-step may take beyond what is held before it (parameters, Adam's averages, the tasks); on
        CUDA and on the CPU of Linux. `InputError` where nothing takes as little.
    clip : as in training
    fixed : fields of the `Engine` that are not to be chosen: `compile="no"`, `chunk=4`, ...

    >>> import fewstep
    >>> learner = fewstep.maml(fewstep.models.mlp(), torch.nn.functional.mse_loss, lr=0.01)
    >>> plan(learner, fewstep.data.SinusoidEpisodes(tasks=4)[0], compile="no").engine.method
    'vmap'
    """
    _check(learner, tasks, seconds, memory, fixed)
    start = trial.clock()
    average = (lambda loss, count: loss) if ranks() > 1 else None  # then Adam stays out of what is compiled
    limit = None if memory is None else int(memory * GIB)
    with warnings.catch_warnings(), Moment.now(next(learner.parameters()).device).again():
        warnings.simplefilter("ignore")  # training says it all again, of the engine that is chosen
        try:
            search = Search(
                Bench(learner, tasks, clip, average), seconds, limit, {**fixed, "precision": learner.engine.precision}
            )
        except DivergenceError as error:
            raise DivergenceError(f"before training {where_not_finite(learner, tasks)}; {error}") from error
        search.go()
        choice = search.choice()
    tried = search.tried()
    for entry in tried:
        if "disagrees" in entry.dropped:
            text = f"{entry.engine} disagrees with the plain loop (relative error {entry.error:.2g}) and is not used"
            warnings.warn(text, FallbackWarning, stacklevel=2)
    compiled = [entry for entry in tried if entry.engine.compile != "no"]
    if compiled and all("running without" in entry.dropped for entry in compiled):
        warnings.warn(compiled[0].dropped, FallbackWarning, stacklevel=2)
    if choice is None:
        raise InputError(_nothing_fits(tried, memory, fixed))
    device = search.bench.device
    machine = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "processor": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip
    return Plan(choice.engine, tuple(tried), tasks.size, trial.clock() - start, seconds, memory, machine)


def _check(learner: Learner, tasks: Task, seconds: float, memory: float | None, fixed: Mapping[str, Any]) -> None:
    """Raise `InputError` where a plan cannot be what is asked for."""
    if not isinstance(learner, Learner):
        raise InputError(f"engines are planned for a fewstep.Learner, but a {type(learner).__name__} came")
    check_tasks(tasks)
    if not isinstance(seconds, int | float) or not 0 < seconds < inf:
        raise InputError(f"the seconds for planning must be above 0 and finite, but {seconds!r} came")
    if memory is not None and (not isinstance(memory, int | float) or not 0 < memory < inf):
        raise InputError(f"the memory limit must be above 0 GiB and finite, but {memory!r} came")
    names = [field.name for field in fields(Engine) if field.name != "precision"]
    if unknown := set(fixed) - set(names):
        raise InputError(f"an engine's {', '.join(sorted(unknown))} cannot be fixed in a plan, only {', '.join(names)}")
    Engine(**fixed)
    device = next(learner.parameters()).device
    if memory is not None and footprint(lambda: None, device) is None:
        raise InputError(f"memory is not counted on the device {device.type} of this machine; leave out its limit")


def _nothing_fits(tried: Sequence[Tried], memory: float | None, fixed: Mapping[str, Any]) -> str:
    """What to say where no engine can be chosen."""
    peaks = [(entry.peak, entry.engine) for entry in tried if entry.peak is not None]
    if memory is not None and all(peak > memory * GIB for peak, _ in peaks):
        peak, engine = min(peaks, key=lambda pair: pair[0])
        return (
            f"no engine stays within {memory:g} GiB: {engine} takes {peak / GIB:.2g} GiB; "
            "raise the limit, or take fewer tasks or examples"
        )
    reasons = "; ".join(f"{entry.engine}: {entry.dropped}" for entry in tried if entry.dropped)
    wanted = ", ".join(f"{name}={value!r}" for name, value in fixed.items())
    return f"no engine with {wanted} can be used ({reasons}); leave a choice to the planner"
