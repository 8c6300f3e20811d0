"""What drawing episodes costs beside a meta-step, and what judging many at once saves beside one at a time.

python -m benchmarks.episodes [--recipes NAME ...] [--episodes N] [--rounds N]
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import torch
import tyro

from benchmarks.workloads import origin
from fewstep.data import ClassEpisodes
from fewstep.engine import Engine
from fewstep.evaluate import evaluate
from fewstep.footprint import keep_freed_memory
from fewstep.meta_step import MetaStep
from fewstep.recipes import RECIPES

PIECES = Engine(compile="pieces", chunk=1, convolution="matmul")
LARGE = Engine(compile="pieces", method="loop", convolution="channels_last")


@dataclass(frozen=True)
class Options:
    """What to time."""

    recipes: tuple[str, ...] = ("omniglot-5way-1shot", "omniglot-20way-1shot", "miniimagenet-5way-1shot")
    """Recipes of classification."""
    episodes: int = 100
    """Test episodes that are judged in each way."""
    rounds: int = 5
    """Meta-steps that are timed."""
    compiled: bool = True
    """Whether meta-steps and batches of episodes are compiled."""


def main(options: Options) -> None:
    """Print a row for each recipe: the medians, and the ratio."""
    keep_freed_memory()
    torch.set_num_threads(1)
    print(origin("benchmarks.episodes"))
    print("| recipe | drawing, ms | meta-step, ms | share | one at a time, ms an episode | batched | times as fast |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name in options.recipes:
        recipe = RECIPES[name]
        engine = LARGE if name.startswith("mini") else PIECES
        engine = engine if options.compiled else replace(engine, compile="no")
        learner, tasks = recipe.learner(), recipe.episodes("train")
        learner.engine = engine
        step = MetaStep(learner, torch.optim.Adam(learner.parameters()), None, None)
        step(tasks[0], 1e-3)
        drawn = _median([partial(tasks.__getitem__, index) for index in range(4 * options.rounds)])
        stepped = _median([partial(step, tasks[0], 1e-3)] * options.rounds)
        test = recipe.protocols()[0].tasks
        assert isinstance(test, ClassEpisodes)
        each = []
        for judged, size in ((Engine(method="loop"), 1), (engine, test.tasks)):
            learner.engine = judged
            own = replace(test, tasks=size)
            evaluate(learner, own, metric="accuracy", steps=recipe.test_steps, count=max(size, 2))
            start = time.perf_counter()
            evaluate(learner, own, metric="accuracy", steps=recipe.test_steps, count=options.episodes)
            each.append(1000 * (time.perf_counter() - start) / options.episodes)
        alone, batched = each
        cells = [f"{drawn:.2f}", f"{stepped:.1f}", f"{100 * drawn / stepped:.1f} %", f"{alone:.1f}", f"{batched:.1f}"]
        print(f"| {name} | {' | '.join(cells)} | {alone / batched:.1f} |", flush=True)


def _median(runs: Sequence[Callable[[], object]]) -> float:
    """Milliseconds."""
    times = []
    for run in runs:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1000 * median(times)


if __name__ == "__main__":
    main(tyro.cli(Options))
