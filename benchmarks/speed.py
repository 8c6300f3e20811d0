"""Time of one second-order meta-step with Adam: ours beside the peers, in turns, with equal weights and data.

python -m benchmarks.speed [--workload NAME|all] [--repeats N] [--out FOLDER]

docs/speed.md tells how the comparison is made.
"""

from __future__ import annotations

import sys
import tempfile
import time
from concurrent.futures import Executor, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from typing import Literal

import torch
import tyro
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import contenders, workloads
from benchmarks.charts import chart
from benchmarks.contenders.matrix_product import flops
from benchmarks.memory import KEEP, MALLOC
from benchmarks.results import LAYOUTS, Entry, Fresh, Layout, Result, load
from benchmarks.tables import as_markdown, as_table
from benchmarks.workers import FailureError, Group, Job, agreement, usable_cores
from benchmarks.workloads import TASKS, WORKLOADS, Workload

YARDSTICK, MACHINE = "autograd loop", "matrix product"
HOPELESS = 3  # times slower than the fastest so far: not worth more turns
LONGEST = 2.0  # seconds of a turn of many steps
Name = Literal[
    "sinusoid", "omniglot-5way-1shot", "omniglot-5way-1shot-15q", "omniglot-20way-1shot", "miniimagenet-5way-1shot",
    "transformer", "all",
]  # fmt: skip


@dataclass(frozen=True)
class Options:
    """What to time, and how."""

    workload: Name = "all"
    """What to time."""
    repeats: int = 10
    """Rounds in which each contender has its turn."""
    out: Path = Path("runs/speed")
    """Folder for NAME.json, speed.md and speed.png, which show all workloads whose json is there."""
    only: tuple[str, ...] = ()
    """Contenders (by default all): of 'autograd loop', 'torch.func', 'torch.func, compiled', 'higher', 'torchopt',
    'jax', 'fewstep', 'fewstep, compiled'. They get ready in this order. The autograd loop always takes part."""
    tasks: int = 0
    """Tasks in a meta-step; 0 takes as many as the workload says."""
    cores: int = 2
    """Threads, or processes of one thread each."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to compute."""
    fresh: bool = True
    """Also measure the first step and the peak memory, in processes of their own."""
    limit: float = 180.0
    """Seconds in which a contender must have compiled and done its first step."""
    ready: float = inf
    """Seconds after which the rounds begin on a GPU, where all get ready at once, with the variants that are ready."""
    peers_keep: bool = False
    """Let the peers keep freed memory too, as this library does: see docs/speed.md."""
    patience: int = 3
    """How often a turn is taken again because others kept more than a tenth of the machine busy meanwhile."""


@dataclass
class Runner:
    """One contender in one layout, alive."""

    entry: Entry
    group: Group
    workload: Workload
    patience: int
    count: int = 1
    foreign: list[float] = field(default_factory=list)

    def take_turn(self, what: Literal["step", "meta_gradient"]) -> float:
        """Seconds per step of the least disturbed of a few tries."""
        turns = [self.group.turn(what, self.count)]
        while turns[-1].foreign > 0.1 and len(turns) <= self.patience:
            turns.append(self.group.turn(what, self.count))
        best = min(turns, key=lambda turn: turn.foreign)
        self.foreign.append(best.foreign)
        return best.seconds


@dataclass
class Comparison:
    """The best variants of all contenders on a workload in each layout, as soon as they are found."""

    result: Result
    workload: Workload
    found: list[Future[Runner | None]]

    @classmethod
    def start(cls, name: str, options: Options, end: float, console: Console, pool: Executor) -> Comparison:
        """Have the pool find them until `end`, by `time.monotonic`."""
        tasks = options.tasks or TASKS[name]
        workload = WORKLOADS[name](tasks)
        operations = meta_step_flops(workload)
        workload = workload.to(options.device)
        rounding = workload.rounding(2 if options.repeats == 1 else 8)
        result = Result(name, tasks, options.cores, operations, rounding)
        comparison = cls(result, workload, [])
        for family in _families(options):
            if reason := contenders.missing(family):
                result.skipped[family] = reason
                continue
            for layout in _layouts(options):
                about = (family, layout, workload, options, end, result, console)
                comparison.found.append(pool.submit(_best_variant, *about))
        return comparison

    @property
    def runners(self) -> list[Runner]:
        """All that are alive."""
        return [runner for each in self.found if (runner := each.result()) is not None]

    def go(self, options: Options, console: Console) -> None:
        """Let all take turns, with nothing else on the machine."""
        result, runners = self.result, self.runners
        truth = next(runner.group.gradient for runner in runners if runner.entry.family != MACHINE)
        for entry, group in [(runner.entry, runner.group) for runner in runners]:
            if entry.family != MACHINE:
                entry.error = result.rounding if entry.family == YARDSTICK else agreement(group.gradient, truth)
        _rounds(runners, options.repeats, console)
        result.entries = [runner.entry for runner in runners]
        seen = [share for runner in runners for share in runner.foreign]
        result.foreign = sum(seen) / len(seen)
        self.close()
        if options.fresh:
            _measure_fresh(result, options, console)

    def close(self) -> None:
        """End all processes."""
        for each in self.found:
            if each.done() and not each.cancelled() and not each.exception() and (runner := each.result()):
                runner.group.close()


def _layouts(options: Options) -> tuple[Layout, ...]:
    """A GPU has no use for several processes."""
    if options.device == "cuda":
        return ("threads",)
    return LAYOUTS if options.cores > 1 else LAYOUTS[:1]


def _families(options: Options) -> list[str]:
    unknown = set(options.only) - set(contenders.FAMILIES)
    if unknown:
        raise SystemExit(f"no contender {', '.join(unknown)}; there are: {', '.join(contenders.FAMILIES)}")
    wanted, always = options.only or contenders.FAMILIES, [YARDSTICK, MACHINE]  # these are ready first
    return always + [family for family in wanted if family not in always]


def _best_variant(family: str, layout: Layout, workload: Workload, options: Options, end: float, result: Result,
                  console: Console) -> Runner | None:  # fmt: skip
    """The fastest of a few turns each, on a CPU alone; after one step where that is hopeless. Others end."""
    best: Runner | None = None
    heats = result.heats.setdefault(family, {})
    before = next(iter(heats.values()), {})
    own = heats.setdefault(layout, {})
    for variant, choice in contenders.variants(family, workload).items():
        job = Job(workload.name, workload.tasks.size, family, choice, device=options.device)
        known = [seconds for found in heats.values() for seconds in found.values()]
        fastest = min(known) if known and family != MACHINE else inf
        if before and before.get(variant, inf) > HOPELESS * fastest:  # nor has it a chance in another layout
            continue
        try:
            if (left := end - time.monotonic()) <= 0:
                raise FailureError(f"not ready after {options.ready:.0f} s")
            limit = min(options.limit, left)
            group = Group(job, layout, options.cores, limit, KEEP if options.peers_keep else {})
            first = group.turn("step", 1).seconds  # a slow one
            count = 1 if family == MACHINE else max(1, min(workload.turn, int(LONGEST / first)))
            runner = Runner(Entry(family, layout, variant, choice), group, workload, options.patience, count)
            seconds = runner.take_turn("step") if workload.tiny else first
            if seconds < HOPELESS * fastest:
                seconds = min(seconds, *(runner.take_turn("step") for _ in range(2)))
        except FailureError as error:
            result.skipped[f"{family}, {variant}, {layout}"] = str(error)
            continue
        console.log(f"{workload.name}: {family}, {variant}, {layout}: {1000 * seconds:.2f} ms")
        own[variant] = seconds
        beaten = group if seconds > HOPELESS * fastest or seconds > min(own.values()) else None
        if beaten is None:
            beaten, best = best.group if best else None, runner
        if beaten:
            beaten.close()
    return best


def _rounds(runners: list[Runner], repeats: int, console: Console) -> None:
    for round_ in range(repeats):
        for runner in runners:
            runner.entry.step.append(runner.take_turn("step"))
            if runner.workload.tiny and runner.entry.family != MACHINE:  # elsewhere Adam's part is too small
                runner.entry.meta_gradient.append(runner.take_turn("meta_gradient"))
        console.log(f"round {round_ + 1} of {repeats}")


def _measure_fresh(result: Result, options: Options, console: Console) -> None:
    """The first step of a new process with an empty and with a filled cache of compiled code; the peak memory."""
    for family in dict.fromkeys(entry.family for entry in result.entries if entry.family != MACHINE):
        entry = result.of(family)[0]
        job = Job(result.workload, result.tasks, family, entry.options, device=options.device)
        with tempfile.TemporaryDirectory() as folder:
            caches = {
                "TMPDIR": folder,  # where Inductor keeps PyTorch's compiled header
                "TORCHINDUCTOR_CACHE_DIR": folder,
                "JAX_COMPILATION_CACHE_DIR": folder,
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            }
            first = []
            peak = 0
            for environment in (caches, caches | MALLOC):
                try:
                    group = Group(job, "threads", options.cores, options.limit, environment)
                except FailureError as error:
                    result.skipped[f"{family} (fresh)"] = str(error)
                    break
                first.append(group.first_step)
                counted = options.device == "cuda" or Path("/proc/self/clear_refs").exists()
                if environment is not caches and counted:
                    peak = group.peak()
                group.close()
        if len(first) == 2:
            result.fresh[family] = Fresh(entry.variant, first[0], first[1], peak)
            console.log(f"{family}: first step {first[0]:.1f} s, again {first[1]:.1f} s, {peak / 2**20:.0f} MiB")


def meta_step_flops(workload: Workload) -> int:
    """Operations in the matrix products and convolutions of the plain loop's meta-step; tasks cost the same each.

    By hand, 9 forward passes a step on the support set (5 less of the first layer), and 3 on the query set (1 less).
    """
    one = replace(workload, tasks=workload.tasks.select(slice(0, 1)))
    with FlopCounterMode(display=False) as counter:
        one.meta_step(one.naive)
    return int(counter.get_total_flops()) * workload.tasks.size


def finish(comparison: Comparison, options: Options, console: Console, origin: str) -> None:
    """Time, write and print one, or say why not."""
    result = comparison.result
    if YARDSTICK in [runner.entry.family for runner in comparison.runners]:
        comparison.go(options, console)
        result.origin = origin
        result.save(options.out, flops(options.device))
        console.print(as_table(result))
    else:
        console.print(f"{result.workload}: not measured without the {YARDSTICK}; see --ready and --limit")
    for who, why in result.skipped.items():
        console.print(f"{who}: {why}", highlight=False)


def main(options: Options) -> None:
    """Time one second-order meta-step with Adam: ours beside the peers that are installed."""
    if options.cores > len(usable_cores()):
        raise SystemExit(f"there are {len(usable_cores())} cores, but --cores {options.cores} came")
    torch.set_num_threads(options.cores)
    torch.backends.cudnn.allow_tf32 = False
    console = Console(width=None if sys.stdout.isatty() else 150)
    options.out.mkdir(parents=True, exist_ok=True)
    origin = workloads.origin("benchmarks.speed")
    names = list(WORKLOADS) if options.workload == "all" else [options.workload]
    on_gpu = options.device == "cuda"  # then all get ready at once, two on a core, before the first is timed
    end = time.monotonic() + options.ready if on_gpu else inf
    for some in [names] if on_gpu else [[name] for name in names]:
        pool = ThreadPoolExecutor(2 * len(usable_cores()) if on_gpu else 1)
        comparisons: list[Comparison] = []
        try:
            comparisons += [Comparison.start(name, options, end, console, pool) for name in some]
            wait([each for comparison in comparisons for each in comparison.found])
            for comparison in comparisons:
                finish(comparison, options, console, origin)
        finally:
            pool.shutdown(cancel_futures=True)
            for comparison in comparisons:
                comparison.close()
    results = [load(path) for known in WORKLOADS if (path := options.out / f"{known}.json").exists()]
    if not results:
        raise SystemExit("nothing was measured")
    (options.out / "speed.md").write_text("\n\n".join(as_markdown(result) for result in results) + "\n")
    chart(results, options.out / "speed.png")
    console.print(f"{options.out}/speed.md, {options.out}/speed.png", highlight=False)


if __name__ == "__main__":
    tyro.cli(main, config=(tyro.conf.OmitArgPrefixes,))
