"""The search for the fastest engine: from the fastest one to its neighbours, first eagerly, then compiled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import inf
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from fewstep import trial as trials
from fewstep.agreement import LOOP, Agreement
from fewstep.engine import Engine
from fewstep.errors import InputError
from fewstep.footprint import free_memory
from fewstep.long_loop import Memory
from fewstep.trial import Bench, Trial

MOST_UNROLLED = 5  # inner steps that are compiled as one, 1 with convolutions: each makes compilation longer
UNIT = 6.0  # seconds to compile one gradient, until the first has been compiled
EAGER = 0.4  # the part of the time that eager engines may take, where others are to be compiled
SLOW, LATE = 2.5, 1.0  # an engine is not timed whose first step takes this many times as long as the fastest, and 1 s
HOPELESS = 1.5  # a number of tasks at a time is not compiled that takes this many times as long as the best, eagerly
SMALL = 2048  # pixels of an image whose convolutions are fastest as matrix products; 28x28 is, 84x84 is not
KEPT = 0.25  # of what a task takes, each inner step keeps less with `keep`: 0.05 was measured
COMPILED = {"compile", "keep"}  # fields that eager engines have no say in
CACHED = 24 * 2**20  # bytes, eagerly, of the tasks at a time that convolutions are compiled for on a CPU at first


@dataclass(frozen=True)
class Tried:
    """What came of one engine.

    seconds : of a meta-step;  compiling : how much longer the first one took
    peak : bytes that a meta-step takes;  error : of its meta-gradient, relative;  dropped : why it cannot be chosen
    """

    engine: Engine
    seconds: float | None = None
    compiling: float | None = None
    peak: int | None = None
    error: float | None = None
    dropped: str = ""


class Search:
    """The engines that have been tried on a bench.

    seconds : how long the search may take;  limit : bytes that a meta-step may take, None for as many as there are
    fixed : fields of the engine that are not to be chosen
    """

    def __init__(self, bench: Bench, seconds: float, limit: int | None, fixed: Mapping[str, Any]) -> None:
        self.on_cpu = bench.device.type == "cpu"
        on_gpu = bench.device.type == "cuda" and bench.step.average is None
        self.may_record = on_gpu and bench.learner.unrollable and "graph" not in fixed
        self.bench, self.limit, self.fixed = bench, limit, {**fixed, **({"graph": True} if self.may_record else {})}
        start = trials.clock()
        self.ceiling = free_memory(bench.device) if limit is None else limit
        self.chunks = [fixed["chunk"]] if "chunk" in fixed else chunk_sizes(bench.tasks.size)
        self.trials: list[Trial] = []
        self.dropped: dict[Engine, str] = {}
        self.units: list[float] = []  # seconds that it took to compile one gradient
        with _Conv2dSeen() as seen:
            self.loop = bench.run(LOOP)
        self.convolutions = ("native", "matmul", "channels_last") if seen.pixels else ()
        self.pixels = seen.pixels
        self.keeps = bench.learner.derivative == "exact" and bench.learner.memory == Memory()
        most = (1 if seen.pixels else MOST_UNROLLED) if bench.learner.unrollable else -1
        self.kinds = _kinds(bench.learner.steps, most, fixed.get("compile"))
        self.end = start + seconds
        self.eager_end = start + seconds * (EAGER if self.kinds else 1)
        self.agreement = Agreement(bench, self.loop.gradient)
        self._measure(self.loop)

    def go(self) -> None:
        """Try engines as long as there is time, and those without a CUDA graph only where none can have one."""
        self._go()
        if self.may_record and self.choice() is None:
            self.fixed["graph"] = False
            self._go()

    def _go(self) -> None:
        fixed = {name: value for name, value in self.fixed.items() if name not in COMPILED}
        if "chunk" not in fixed:
            self._attempt(_changed(LOOP, **fixed))
        for chunk in (self.chunks[len(self.chunks) // 2], self.chunks[-1]):
            self._attempt(_changed(Engine(), **{**fixed, "chunk": chunk}))
        self._climb(compiled=False)
        start = self.best(compiled=False)
        for engine in self._first_compiled(start.engine) if start is not None else ():
            if self._attempt(engine) and self._ranked(compiled=True):
                break
        self._climb(compiled=True)

    def best(self, *, compiled: bool) -> Trial | None:
        """The fastest engine, eager or compiled, that agrees with the loop and has no other field than those fixed."""
        for trial in self._ranked(compiled=compiled):
            if self.agreement.holds(trial):
                return trial
            self.dropped[trial.engine] = "it disagrees with the plain loop"
        return None

    def choice(self) -> Trial | None:
        """The fastest engine of all, or the fastest compiled one where compilation is fixed."""
        wanted = self.fixed.get("compile")
        found = [self.best(compiled=compiled) for compiled in (False, True) if wanted in (None, "no") or compiled]
        return min((trial for trial in found if trial is not None), key=lambda trial: trial.seconds, default=None)

    def tried(self) -> list[Tried]:
        """What came of every engine, the fastest first."""
        entries = [
            Tried(t.engine, t.seconds, t.first - t.seconds, t.peak, t.error, self.dropped.get(t.engine, ""))
            for t in sorted(self.trials, key=lambda trial: trial.seconds)
        ]
        known = {entry.engine for entry in entries}
        return entries + [Tried(engine, dropped=why) for engine, why in self.dropped.items() if engine not in known]

    def _ranked(self, *, compiled: bool) -> list[Trial]:
        """What may be chosen, the fastest first."""
        kept = [t for t in self.trials if t.engine not in self.dropped and compiled == (t.engine.compile != "no")]
        return sorted((t for t in kept if self._suits(t.engine)), key=lambda trial: trial.seconds)

    def _climb(self, *, compiled: bool) -> None:
        """From the fastest engine to its neighbours, until it has none that is new."""
        while ranked := self._ranked(compiled=compiled):
            if not any(self._attempt(engine) for engine in self._neighbours(ranked[0].engine)):
                return

    def _neighbours(self, engine: Engine) -> Iterator[Engine | None]:
        """Engines that differ in one choice."""
        if engine.method == "vmap":
            at = self.chunks.index(engine.chunk)
            yield from (_changed(engine, chunk=chunk) for chunk in self.chunks[max(0, at - 1) : at + 2])
        yield from (_changed(engine, convolution=convolution) for convolution in self.convolutions)
        if self.bench.learner.derivative == "exact" and engine.compile != "step":
            yield from (_changed(engine, product=product) for product in ("reverse", "forward"))
        if engine.compile != "no":
            yield from (_changed(engine, compile=kind) for kind in self.kinds)
            yield _changed(engine, keep=self.keeps and not engine.keep)
            yield _changed(engine, method="loop", chunk=None, product="reverse")

    def _first_compiled(self, eager: Engine) -> Iterator[Engine | None]:
        """What to compile first, by the fastest eager engine: there may be no time for a second.

        Compiled, convolutions of small images are fastest as matrix products; eagerly they are not, so that it tells
        nothing of them. Those of large images fill the machine one task after another.
        """
        tasks, each = self.bench.tasks.size, _of_one(self._peaks()) or inf
        sizes = [size for size in self.chunks if not self.on_cpu or (size or tasks) * each <= CACHED]
        chunk = [self.chunks[0], *sizes][-1]
        for kind in self.kinds:
            same = {"product": "reverse", "keep": False, **self.fixed, "compile": kind}
            twin = _changed(eager, **same)
            if self.convolutions:
                small: dict[str, Any] = {"method": "vmap", "chunk": chunk, "convolution": "matmul"}
                large: dict[str, Any] = {"method": "loop", "chunk": None, "convolution": "channels_last"}
                likely = small if self.pixels <= SMALL else large
                for keep in (True, False)[not self.keeps :]:
                    yield _changed(Engine(), **{"keep": keep, **self.fixed, **likely, "compile": kind})
            yield twin

    def _attempt(self, engine: Engine | None) -> bool:
        """Whether the engine is new and may be tried; then it has been."""
        if engine is None or not self._suits(engine) or self._is_known(engine):
            return False
        if self._is_hopeless(engine) or not self._is_affordable(engine):
            return False
        try:
            trial = self.bench.run(engine)
            self._measure(trial)
        except Exception as error:  # an engine fails in any way, and another one works
            self.dropped[engine] = (str(error).strip() or type(error).__name__).splitlines()[0]
        return True

    def _measure(self, trial: Trial) -> None:
        """Weigh and time a trial that has run, unless it is far too slow."""
        rivals = self._ranked(compiled=False) + self._ranked(compiled=True)
        fastest = min(rivals, key=lambda rival: rival.seconds, default=trial)
        self.trials.append(trial)
        self.agreement.note(trial)
        if trial.engine.compile == "no" and trial.first > SLOW * fastest.seconds + LATE:
            trial.seconds = trial.first
            self.dropped[trial.engine] = "it is slow"
            return
        self.bench.weigh(trial)
        if trial.engine.compile != "no":
            self.units.append((trial.first - trial.seconds) / self._gradients(trial.engine))
        if self.limit is not None and (trial.peak or 0) > self.limit:
            self.dropped[trial.engine] = "it takes more memory than the limit"
        elif fastest is not trial:
            once, left = trial.seconds + fastest.seconds + 2 * trials.TURN, self.end - trials.clock()
            share = 0.03 if trial.engine.compile == "no" else 0.15  # what took long to compile is worth a longer look
            self.bench.compare(trial, fastest, min(5, max(int(once < left), int(share * left / once))))

    def _suits(self, engine: Engine) -> bool:
        """Whether the engine has what is fixed; eager ones lead to the compiled one where compilation is fixed."""
        aside = COMPILED if engine.compile == "no" else {"compile"}
        return all(getattr(engine, name) == value for name, value in self.fixed.items() if name not in aside)

    def _is_known(self, engine: Engine) -> bool:
        return engine in self.dropped or any(trial.engine == engine for trial in self.trials)

    def _is_hopeless(self, engine: Engine) -> bool:
        """Whether it is not worth compiling so many tasks at a time."""
        eager = {t.engine: t.seconds for t in self.trials if t.engine.compile == "no"}
        twin = replace(engine, compile="no", convolution="native", product="reverse", keep=False)
        return engine.compile != "no" and twin in eager and eager[twin] > HOPELESS * min(eager.values())

    def _is_affordable(self, engine: Engine) -> bool:
        """Whether there are time and memory, by what other engines took. What nothing else can replace has time."""
        if self._peak(engine) > (self.ceiling or inf):
            return False
        ran = [trial.engine for trial in self.trials if self._suits(trial.engine)]
        if not ran or ("compile" in self.fixed and engine.compile != "no" and all(e.compile == "no" for e in ran)):
            return True
        seconds = 2 * min(trial.seconds for trial in self.trials)
        if engine.compile == "no":
            return trials.clock() + seconds < self.eager_end
        return trials.clock() + seconds + self._gradients(engine) * max(self.units, default=UNIT) < self.end

    def _gradients(self, engine: Engine) -> int:
        """How much there is to compile, in gradients: a Hessian-vector product counts as two."""
        forms = 1 if self.bench.tasks.size % (engine.chunk or 1) == 0 or engine.method == "loop" else 2
        return forms * (4 if engine.compile == "pieces" else 3 * self.bench.learner.steps + 1)

    def _peak(self, engine: Engine) -> float:
        """Bytes that an engine will take at most, by those that took fewer tasks at a time."""
        tasks, steps = self.bench.tasks.size, self.bench.learner.steps
        size, known = engine.at_a_time(tasks), self._peaks()
        once = min((peak * max(1.0, size / count) for peak, count in known), default=0.0)
        if engine.keep:
            return once + KEPT * steps * tasks * _of_one(known)
        return once * (steps + 1 if engine.compile == "step" else 1)  # it has the activations of every step

    def _peaks(self) -> list[tuple[int, int]]:
        """Bytes that engines without `keep` took, and for how many tasks at a time."""
        tasks = self.bench.tasks.size
        return [(t.peak, t.engine.at_a_time(tasks)) for t in self.trials if t.peak is not None and not t.engine.keep]


def _of_one(peaks: list[tuple[int, int]]) -> float:
    """Bytes that a task takes, where they were fewest; 0 where nobody counted."""
    return min((peak / count for peak, count in peaks), default=0.0)


def chunk_sizes(tasks: int) -> list[int | None]:
    """Numbers of tasks at a time that are about powers of two, and divide `tasks` where they can; at last all.

    >>> chunk_sizes(25), chunk_sizes(32)
    ([1, 2, 5, 8, 16, None], [1, 2, 4, 8, 16, None])
    """
    sizes: list[int | None] = []
    power = 1
    while power < tasks:
        divisors = [size for size in range(1, tasks) if tasks % size == 0 and power / 1.4 < size < 1.4 * power]
        sizes.append(min(divisors, key=lambda size: abs(size - power), default=power))
        power *= 2
    return [*sizes, None]


def _kinds(steps: int, most: int, fixed: str | None) -> list[str]:
    """The ways to compile that come into question, the most promising first."""
    if fixed is not None:
        return [] if fixed == "no" else [fixed]
    return ["step", "pieces"] if steps <= most else ["pieces"]


def _changed(engine: Engine, **changes: Any) -> Engine | None:
    """The engine with other choices; None where they exclude each other."""
    if changes.get("compile") == "step":
        changes["product"] = "reverse"  # it takes none
    if changes.get("compile") in ("no", "step") or changes.get("product") == "forward":
        changes["keep"] = False
    try:
        return replace(engine, **changes)
    except InputError:
        return None


class _Conv2dSeen(TorchFunctionMode):
    """Notes the pixels of the largest image that a two-dimensional convolution gets; 0 where there is none."""

    pixels = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.conv2d:
            self.pixels = max(self.pixels, args[0].shape[-1] * args[0].shape[-2])
        return func(*args, **(kwargs or {}))
