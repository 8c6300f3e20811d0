"""The planner's choice beside a fixed grid of engines: is it within 10 % of the best of them?

python -m benchmarks.planner [--workload NAME|all] [--seconds S] [--rounds N] [--threads T] [--no-compiled]

Each engine takes whole meta-steps with Adam at the rate 0, as in training; the engines take turns, and the median of a
round's times counts. An engine of the grid that is more than three times as slow as the choice takes one turn.
"""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.workloads import TASKS, WORKLOADS, Workload, origin
from fewstep import Engine, FallbackWarning, Plan, plan
from fewstep.footprint import keep_freed_memory
from fewstep.meta_step import MetaStep

Name = Literal[
    "sinusoid", "omniglot-5way-1shot", "omniglot-5way-1shot-15q", "omniglot-20way-1shot", "miniimagenet-5way-1shot",
    "transformer", "all",
]  # fmt: skip


@dataclass(frozen=True)
class Options:
    """What to plan, and how to judge it."""

    workload: Name = "all"
    """What to plan for."""
    seconds: float = 120.0
    """What planning may take."""
    rounds: int = 7
    """Turns of each engine."""
    threads: int = 1
    """Threads for torch."""
    compiled: bool = True
    """Also compile, in the plan and in the grid."""


@dataclass
class Runner:
    """One engine with a learner and an Adam of its own."""

    workload: Workload
    engine: Engine
    seconds: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        learner = self.workload.ours(engine=self.engine)
        self.step = MetaStep(learner, torch.optim.Adam(learner.parameters()))
        with warnings.catch_warnings():
            warnings.simplefilter("error", FallbackWarning)
            self.step(self.workload.tasks, 0.0)
        self.take_turn()  # warm

    def take_turn(self) -> float:
        """Seconds of a meta-step."""
        start = time.perf_counter()
        for _ in range(self.workload.turn):
            self.step(self.workload.tasks, 0.0)
        return (time.perf_counter() - start) / self.workload.turn


def judge(workload: Workload, options: Options, console: Console) -> tuple[Plan, list[Runner]]:
    """The plan, and the runners: that of its engine first, then those of the grid, the fastest first."""
    fixed: dict[str, Any] = {} if options.compiled else {"compile": "no"}
    chosen = plan(workload.ours(), workload.tasks, seconds=options.seconds, **fixed)
    console.print(f"{workload.name}: {chosen}", highlight=False)
    runners = [Runner(workload, chosen.engine)]
    limit = 3 * runners[0].take_turn()
    for engine in grid(workload, options.compiled):
        try:
            runner = Runner(workload, engine)
        except Exception as error:  # a grid is not for every model
            console.print(f"  {engine}: {str(error).splitlines()[0]}", highlight=False, style="dim")
            continue
        runner.seconds.append(runner.take_turn())
        runners.append(runner)
    near = [runner for runner in runners if not runner.seconds or runner.seconds[0] < limit]
    for _ in range(options.rounds):
        for runner in near:
            runner.seconds.append(runner.take_turn())
    return chosen, [runners[0], *sorted(runners[1:], key=lambda runner: median(runner.seconds))]


def grid(workload: Workload, compiled: bool) -> list[Engine]:
    """Engines that do not know what the planner does; whole steps only where they compile in minutes."""
    convolves = any(isinstance(module, nn.Conv2d) for module in workload.model.modules())
    chunks = [None, *(size for size in (1, 4, 8) if size < workload.tasks.size and not workload.tiny)]
    found = [Engine(method="loop"), *(Engine(chunk=size) for size in chunks)]
    if convolves:
        found.append(Engine(chunk=chunks[-1], convolution="matmul"))
    kinds: list[Literal["step", "pieces"]] = ["step", "pieces"] if workload.steps <= 3 else ["pieces"]
    for kind in kinds if compiled else []:
        found += [Engine(compile=kind), Engine(compile=kind, method="loop")]
        if convolves:
            found += [Engine(compile=kind, chunk=size, convolution="matmul") for size in (1, 2, 4)]
            found.append(Engine(compile=kind, method="loop", convolution="channels_last"))
    return [*found, *(replace(engine, keep=True) for engine in found if engine.compile == "pieces")]


def ratio(runners: list[Runner]) -> float:
    """How many times as long the choice takes as the best of the grid."""
    return median(runners[0].seconds) / median(runners[1].seconds)


def as_table(workload: Workload, runners: list[Runner]) -> Table:
    """One row for each engine."""
    table = Table("engine", title=f"{workload.name}, {workload.tasks.size} tasks")
    for heading in ("ms/step", "against the best"):
        table.add_column(heading, justify="right")
    best = median(runners[1].seconds)
    for runner in runners:
        name = f"{runner.engine}{' (the choice)' if runner is runners[0] else ''}"
        table.add_row(name, f"{1000 * median(runner.seconds):.3g}", f"{median(runner.seconds) / best:.2f}")
    return table


def main(options: Options) -> None:
    """Plan for each workload, and judge the choice."""
    torch.set_num_threads(options.threads)
    keep_freed_memory()  # as the command line does
    console = Console()
    console.print(origin("benchmarks.planner"), highlight=False)
    ratios = {}
    for name in WORKLOADS if options.workload == "all" else [options.workload]:
        workload = WORKLOADS[name](TASKS[name])
        _, runners = judge(workload, options, console)
        ratios[name] = ratio(runners)
        console.print(as_table(workload, runners))
    for name, value in ratios.items():
        console.print(f"{name}: the choice takes {value:.2f}x the time of the best of the grid", highlight=False)


if __name__ == "__main__":
    main(tyro.cli(Options))
