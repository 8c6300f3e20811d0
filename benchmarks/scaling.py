"""Meta-steps of several processes beside one, in turns, and beside what the cost model of docs/scaling.md predicts.

python -m benchmarks.scaling [--what steps|link] [--procs N] [--rounds N] [--tasks B] [--chunk C]
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from statistics import median
from typing import Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.ranks import alone, in_ranks, together
from benchmarks.workers import busy_seconds, usable_cores
from benchmarks.workloads import origin
from fewstep import Learner, Task, losses, maml, models
from fewstep.data import ClassEpisodes
from fewstep.distributed import average_gradients, gathered, is_first, joined, ranks, share, start_alike
from fewstep.engine import Convolution, Engine
from fewstep.meta_step import MetaStep


def all_reduce_seconds(size: int, count: int, latency: float, bandwidth: float) -> float:
    """A ring of `count` ranks: 2 (n - 1) messages one after another, each of size / n bytes.

    size : bytes;  latency : seconds of one message;  bandwidth : bytes per second
    """
    return 2 * (count - 1) * (latency + size / count / bandwidth)


def step_seconds(tasks: int, count: int, per_task: float, overhead: float, all_reduce: float) -> float:
    """One meta-step of `count` ranks: its slowest rank has ceil(tasks / count) tasks."""
    return per_task * ceil(tasks / count) + overhead + all_reduce


@dataclass(frozen=True)
class Round:
    """Seconds of one round, and the share of the machine that other programs took meanwhile.

    one, part : the first rank alone, others idle, with all tasks, and with its share of them
    all : the ranks together, a share each;  apart : the same without the all-reduce;  message : the all-reduce alone
    """

    one: float
    part: float
    all: float
    apart: float
    message: float
    foreign: float


@dataclass(frozen=True)
class Bench:
    """The Omniglot shape, 5 ways 1 shot, on random pictures, with everything that a step of `train` does."""

    learner: Learner
    episodes: ClassEpisodes
    apart: MetaStep
    averaged: MetaStep

    @classmethod
    def omniglot(cls, tasks: int, engine: Engine) -> Bench:
        torch.manual_seed(0)
        images = torch.randint(256, (1200, 20, 1, 28, 28), dtype=torch.uint8)
        episodes = ClassEpisodes(images=images, ways=5, shots=1, queries=1, tasks=tasks, rotate=True)
        learner = maml(models.conv4(5), losses.summed_over_ways, lr=0.4, adapt="~*.offset", engine=engine)
        start_alike(learner)
        optimizer = torch.optim.Adam(learner.parameters())

        def average(loss: Tensor, count: int) -> Tensor:
            return average_gradients(learner.parameters(), count, loss, False)[0]

        apart = MetaStep(learner, optimizer, average=lambda loss, count: loss)  # else Adam could be compiled in
        return cls(learner, episodes, apart, MetaStep(learner, optimizer, average=average))

    def step(self, choose: Callable[[Task], Task] = lambda tasks: tasks, average: bool = False) -> None:
        (self.averaged if average else self.apart)(choose(self.episodes[0]), 1e-3)

    def average(self) -> None:
        average_gradients(self.learner.parameters(), 1, torch.zeros(()), False)

    def round(self) -> Round:
        start, busy, own = time.perf_counter(), busy_seconds(), time.process_time()
        times = (
            alone(self.step),
            alone(lambda: self.step(share)),
            together(lambda: self.step(share, average=True)),
            together(lambda: self.step(share)),
            together(self.average),
        )
        elapsed, busy = time.perf_counter() - start, busy_seconds() - busy
        foreign = busy - sum(gathered(time.process_time() - own))
        return Round(*times, foreign=max(foreign, 0.0) / (elapsed * len(usable_cores())))

    def measure(self, rounds: int) -> list[Round]:
        """The less disturbed half of twice as many rounds."""
        self.step(share, average=True)
        self.step()  # both compile, where they do
        return sorted((self.round() for _ in range(2 * rounds)), key=lambda one: one.foreign)[:rounds]


def rows(rounds: list[Round], tasks: int, size: int) -> list[tuple[str, str]]:
    """What was measured, and what follows from it."""
    one, part, all_, message, foreign = (
        median(getattr(each, name) for each in rounds) for name in ("one", "part", "all", "message", "foreign")
    )
    per_task = (one - part) / (tasks - ceil(tasks / ranks()))
    overhead = one - tasks * per_task
    predicted = step_seconds(tasks, ranks(), per_task, overhead, message)
    speed_up = median(each.one / each.all for each in rounds)
    slower = median(each.apart / each.part for each in rounds)
    return [
        ("one process, a step", f"{1000 * one:.1f} ms"),
        ("a task", f"{1000 * per_task:.2f} ms"),
        ("overhead", f"{1000 * overhead:.1f} ms"),
        (f"all-reduce of {size / 1000:.0f} kB", f"{1000 * message:.2f} ms"),
        (f"{ranks()} processes, a step, predicted", f"{1000 * predicted:.1f} ms"),
        (f"{ranks()} processes, a step, measured", f"{1000 * all_:.1f} ms"),
        ("speed-up, predicted", f"{one / predicted:.2f}x"),
        ("speed-up, measured", f"{speed_up:.2f}x"),
        ("a share takes, all at once against alone", f"{slower:.3f}x"),
        ("other programs had of the machine", f"{100 * foreign:.0f} %"),
    ]


def link(rounds: int) -> Table:
    """All-reduces of several sizes: latency from the smallest, bandwidth from the largest, and those between."""
    sizes = [1_000, 448_000, 2_000_000, 12_000_000]
    seconds = []
    for size in sizes:
        value = torch.nn.Parameter(torch.zeros(size // 4))
        value.grad = torch.zeros_like(value)
        times = [together(partial(average_gradients, [value], 1)) for _ in range(rounds + 1)]
        seconds.append(median(times[1:]))
    latency = seconds[0] / (2 * (ranks() - 1))
    bandwidth = 2 * (ranks() - 1) / ranks() * (sizes[-1] - sizes[0]) / (seconds[-1] - seconds[0])
    table = Table("all-reduce", "measured", "predicted")
    for size, measured in zip(sizes, seconds, strict=True):
        predicted = all_reduce_seconds(size, ranks(), latency, bandwidth)
        table.add_row(f"{size / 1000:.0f} kB", f"{1000 * measured:.2f} ms", f"{1000 * predicted:.2f} ms")
    table.caption = f"latency {1000 * latency:.2f} ms, bandwidth {bandwidth / 1e6:.0f} MB/s"
    return table


def steps(rounds: int, tasks: int, engine: Engine) -> Table:
    """The table of one engine."""
    bench = Bench.omniglot(tasks, engine)
    size = 4 * sum(value.numel() for value in bench.learner.parameters())
    table = Table(str(engine), f"{ranks()} processes, {tasks} tasks, {rounds} rounds")
    for row in rows(bench.measure(rounds), tasks, size):
        table.add_row(*row)
    return table


def main(
    what: Literal["steps", "link"] = "steps",
    procs: int = 2,
    rounds: int = 15,
    tasks: int = 32,
    chunk: int | None = 4,
    compiled: bool = True,
    convolution: Convolution = "matmul",
) -> None:
    """Time meta-steps of the Omniglot shape, eager and compiled, or the link between the processes.

    Args:
        what: Meta-steps, or all-reduces of several sizes.
        procs: Processes, at least 2, each with its part of the cores; torchrun's own under torchrun.
        rounds: Rounds of all measurements in turn; of twice as many the less disturbed half is told, in medians.
        tasks: Tasks of a step.
        chunk: Tasks at a time.
        compiled: Also with torch.compile.
        convolution: How the engines compute convolutions; the planner takes matmul for such pictures.
    """
    if "WORLD_SIZE" not in os.environ:
        print(origin("benchmarks.scaling"))
        options = {"what": what, "rounds": rounds, "tasks": tasks, "chunk": chunk, "compiled": compiled,
                   "convolution": convolution}  # fmt: skip
        in_ranks("scaling", f"main(**{options!r})", procs)
        return
    eager = Engine(chunk=chunk, convolution=convolution)
    engines = [eager, replace(eager, compile="pieces"), replace(eager, compile="step")]
    with joined():
        chosen = engines if compiled else engines[:1]
        tables = [link(rounds)] if what == "link" else [steps(rounds, tasks, engine) for engine in chosen]
        if is_first():
            Console().print(f"{torch.get_num_threads()} threads a process", *tables)


if __name__ == "__main__":
    tyro.cli(main)
