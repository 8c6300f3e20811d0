"""Peak memory of one meta-step against the number of inner steps: ours beside the naive autograd loop.

python -m benchmarks.memory [--steps 5 50] [--engines "ours" "naive loop"] [--images 5 75] [--size 84] [--threads T]

Each figure comes from a fresh process, in two ways that should agree: the peak of the resident set over what it was
before the step (the kernel counts it, so it holds all scratch space), and the peak of torch's own allocations. The
profiler that counts these needs much memory itself: leave it out for 1,000 steps (`--no-allocations`).
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from benchmarks.workloads import Contender, miniimagenet, origin
from fewstep.engine import Engine
from fewstep.footprint import process_status, reset_resident_peak

Name = Literal["ours", "ours, segments", "ours, offload", "ours, compiled", "naive loop"]
OPTIONS: dict[Name, dict[str, Any]] = {
    "ours": {}, "ours, segments": {"segment": "sqrt"}, "ours, offload": {"offload": True},
    "ours, compiled": {"engine": Engine(compile="pieces")},
}  # fmt: skip
MIB = 2**20
# Without these glibc keeps freed memory for later, and a process looks larger than what it holds.
MALLOC = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
KEEP = {"MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_MMAP_MAX_": "0", "MALLOC_TOP_PAD_": str(2**26)}
QUIET = {"KINETO_LOG_LEVEL": "99"}  # the profiler's


@dataclass(frozen=True)
class Peak:
    """Bytes above what the process held before the step, and the step's time."""

    resident: int
    allocated: int | None
    seconds: float


def measure(name: Name, steps: int, images: tuple[int, int], size: int, threads: int, allocations: bool = True) -> Peak:
    """One meta-step after a warm-up of at most 2 inner steps, which runs all the code that more steps run."""
    if threads:
        torch.set_num_threads(threads)
    workload = miniimagenet(steps, *images, size)
    short = replace(workload, steps=min(steps, 2))
    if name == "naive loop":
        contender: Contender = workload.naive
        short.meta_step(short.naive)
    else:
        contender = learner = workload.ours(**OPTIONS[name])
        learner.steps = short.steps
        short.meta_step(learner)
        learner.steps = steps
    workload.model.zero_grad()
    gc.collect()
    base = reset_resident_peak()
    start = time.perf_counter()
    workload.meta_step(contender)
    seconds = time.perf_counter() - start
    resident = process_status("VmHWM") - base
    if not allocations:
        return Peak(resident, None, seconds)
    workload.model.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        workload.meta_step(contender)
    return Peak(resident, peak_allocated(profiler), seconds)


def peak_allocated(profiler: profile) -> int:
    """The largest sum of live allocations, in the order of the profiler's memory events."""
    results: Any = profiler.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(accumulate((int(event.nbytes()) for event in events), initial=0))


@contextmanager
def fresh_process() -> Iterator[ProcessPoolExecutor]:
    """A process that starts from nothing, under `MALLOC`."""
    before = dict(os.environ)
    os.environ.update(MALLOC | QUIET)
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            yield pool
    finally:
        os.environ.clear()
        os.environ.update(before)


def in_cells(now: int | None, then: int | None) -> tuple[str, str]:
    """Mebibytes, and the growth in percent."""
    return (f"{now / MIB:.1f}", f"{100 * (now / then - 1):+.1f} %") if now and then else ("", "")


def main(steps: tuple[int, ...] = (5, 50), engines: tuple[Name, ...] = ("ours", "ours, segments", "naive loop"),
         images: tuple[int, int] = (5, 75), size: int = 84, allocations: bool = True,
         threads: int = 0) -> None:  # fmt: skip
    """Measure the peak memory of one meta-step on a task of Mini-ImageNet's size.

    Args:
        steps: Numbers of inner steps; growth is told against the first.
        engines: What to measure. On a CPU, offload moves nothing out of the memory that is counted here.
        images: Support and query images of the task.
        size: Height and width of the images.
        allocations: Also count torch's own allocations, in a second meta-step under the profiler.
        threads: Threads for torch; 0 leaves them as they are.
    """
    if threads:
        torch.set_num_threads(threads)
    console = Console()
    console.print(origin("benchmarks.memory"), highlight=False)
    table = Table(
        "engine", title=f"conv4 on 3x{size}x{size}, one task, {images[0]} support and {images[1]} query images"
    )
    for heading in ("steps", "resident MiB", "growth", "allocated MiB", "growth", "seconds"):
        table.add_column(heading, justify="right")
    for name in engines:
        first: Peak | None = None
        for count in steps:
            with fresh_process() as pool:
                peak = pool.submit(measure, name, count, images, size, threads, allocations).result()
            first = first or peak
            pairs = [(peak.resident, first.resident), (peak.allocated, first.allocated)]
            cells = [cell for now, then in pairs for cell in in_cells(now, then)]
            table.add_row(name, str(count), *cells, f"{peak.seconds:.2f}")
    console.print(table)


if __name__ == "__main__":
    tyro.cli(main)
