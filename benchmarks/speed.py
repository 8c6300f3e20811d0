"""Time of one second-order meta-step: ours beside the naive autograd loop, in turns, with equal weights and data.

python -m benchmarks.speed [--workload sinusoid|omniglot-5way-1shot|all] [--repeats N] [--threads T]
"""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from statistics import median
from typing import Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.workloads import Contender, Workload, omniglot, origin, sinusoid

Name = Literal["sinusoid", "omniglot-5way-1shot"]


@dataclass(frozen=True)
class Timing:
    """A contender's seconds per meta-step in each round, and how far its meta-gradient is from the naive loop's.

    The naive loop's own error is `Workload.rounding`: no smaller error of another means anything.
    """

    contender: str
    error: float
    seconds: list[float]

    def times_faster_than(self, other: Timing) -> float:
        """The median over the rounds, so that what slows a whole round cancels out."""
        return median(theirs / own for theirs, own in zip(other.seconds, self.seconds, strict=True))


def contenders(name: Name, workload: Workload, compiled: bool = True) -> dict[str, Contender]:
    """The naive loop first, then the others."""
    chunks = [None] if name == "sinusoid" else [None, 4, 8]
    found: dict[str, Contender] = {"naive loop": workload.naive}
    if name == "sinusoid":
        found["loop by hand"] = workload.by_hand
    for chunk in chunks:
        part = f", chunk {chunk}" if chunk else ""
        found[f"ours{part}"] = workload.ours(chunk=chunk)
    if compiled:
        for chunk in chunks[:2]:
            part = f", chunk {chunk}" if chunk else ""
            found[f"ours{part}, compiled"] = workload.ours(chunk=chunk, compile=True)
    return found


def compare(workload: Workload, contestants: dict[str, Contender], repeats: int, turn: int = 1) -> list[Timing]:
    """Gradients first (which also compiles), then `repeats` rounds in which each takes `turn` meta-steps in a row.

    Turns are of several steps where steps are short, as in training: right after another's turn the caches are cold.
    """
    gradients = {name: workload.meta_gradient(contender) for name, contender in contestants.items()}
    truth = next(iter(gradients.values()))
    for contender in contestants.values():
        workload.meta_step(contender)
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats):
        gc.collect()
        for name, contender in contestants.items():
            start = time.perf_counter()
            for _ in range(turn):
                workload.meta_step(contender)
            seconds[name].append((time.perf_counter() - start) / turn)
    errors = {name: float((gradient - truth).norm() / truth.norm()) for name, gradient in gradients.items()}
    errors[next(iter(errors))] = workload.rounding()
    return [Timing(name, errors[name], seconds[name]) for name in contestants]


def as_table(title: str, timings: list[Timing]) -> Table:
    """One row for each contender, one column for each yardstick."""
    yardsticks = [timing for timing in timings if "loop" in timing.contender]
    table = Table("contender", title=title)
    for heading in ["gradient error", "median ms", "min ms", *[f"against {y.contender}" for y in yardsticks]]:
        table.add_column(heading, justify="right")
    for timing in timings:
        ratios = [f"{timing.times_faster_than(yardstick):.2f}x" for yardstick in yardsticks]
        times = [f"{1000 * pick(timing.seconds):.2f}" for pick in (median, min)]
        table.add_row(timing.contender, f"{timing.error:.1e}", *times, *ratios)
    return table


def main(workload: Literal[Name, "all"] = "all", repeats: int = 0, threads: int = 0, compiled: bool = True) -> None:
    """Time one second-order meta-step of ours beside the naive autograd loop.

    Args:
        workload: What to time.
        repeats: Rounds; 0 takes 30 of 10 steps for the sinusoid and 10 of one step for Omniglot.
        threads: Threads for torch; 0 leaves them as they are.
        compiled: Also time the compiled learners.
    """
    if threads:
        torch.set_num_threads(threads)
    console = Console()
    console.print(origin("benchmarks.speed"), highlight=False)
    names: list[Name] = ["sinusoid", "omniglot-5way-1shot"] if workload == "all" else [workload]
    for name in names:
        chosen = sinusoid() if name == "sinusoid" else omniglot()
        rounds, turn = (repeats or 30, 10) if name == "sinusoid" else (repeats or 10, 1)
        timings = compare(chosen, contenders(name, chosen, compiled), rounds, turn)
        console.print(as_table(f"{name}, {chosen.tasks.size} tasks, {rounds} rounds of {turn} steps", timings))


if __name__ == "__main__":
    tyro.cli(main)
