"""What drawing episodes costs beside a meta-step, and what judging many at once saves beside one at a time.

python -m benchmarks.episodes [--recipes NAME ...] [--episodes N] [--rounds N] [--procs N]
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import torch
import tyro
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.contenders.matrix_product import MatrixProduct, flops
from benchmarks.ranks import alone, in_ranks, together
from benchmarks.workloads import origin
from fewstep import Learner
from fewstep.data import ClassEpisodes
from fewstep.distributed import is_first, joined, ranks
from fewstep.engine import Engine
from fewstep.evaluate import METRICS, evaluate
from fewstep.footprint import keep_freed_memory
from fewstep.meta_step import MetaStep
from fewstep.modes import in_eval_mode
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
    procs: int = 2
    """Processes of one thread that share the batches of episodes; one at a time, an episode has as many threads."""


def main(options: Options) -> None:
    """Print a row for each recipe: medians, ratios, and what an episode's products take at the machine's rate."""
    if "WORLD_SIZE" not in os.environ:
        print(origin("benchmarks.episodes"))
        print("| recipe | drawing, ms | meta-step, ms | share | judging, ms an episode: one at a time | batched, one "
              f"process | {options.procs} processes | times as fast | the products alone |")  # fmt: skip
        print("|---|---:|---:|---:|---:|---:|---:|---:|---:|", flush=True)
        if options.procs > 1:
            in_ranks("episodes", f"main({options!r})", options.procs)
            return
    keep_freed_memory()
    with joined():
        for name in options.recipes:
            cells = _row(name, options)
            if is_first():
                print(f"| {name} | {' | '.join(cells)} |", flush=True)


def _row(name: str, options: Options) -> list[str]:
    torch.set_num_threads(1)
    recipe = RECIPES[name]
    engine = LARGE if name.startswith("mini") else PIECES
    engine = engine if options.compiled else replace(engine, compile="no")
    learner, tasks = recipe.learner(), recipe.episodes("train")
    learner.engine = engine
    step = MetaStep(learner, torch.optim.Adam(learner.parameters()), None, None)
    step(tasks[0], 1e-3)
    drawn = 1000 * median(alone(partial(tasks.__getitem__, index)) for index in range(4 * options.rounds))
    stepped = 1000 * median(alone(partial(step, tasks[0], 1e-3)) for _ in range(options.rounds))
    test = recipe.protocols()[0].tasks
    assert isinstance(test, ClassEpisodes)
    judge = partial(evaluate, learner, test, metric="accuracy", steps=recipe.test_steps)
    judge(count=ranks() * test.tasks)  # compiles
    batched = together(partial(judge, count=options.episodes))
    by_one = alone(lambda: _judged(learner, test, range(0, options.episodes, test.tasks), recipe.test_steps))
    product = MatrixProduct("cpu")
    product.step()
    rate = ranks() * flops("cpu") / median(together(product.step) for _ in range(options.rounds))
    learner.engine = Engine(method="loop")
    torch.set_num_threads(options.procs)
    single = replace(test, tasks=1)
    with FlopCounterMode(display=False) as counter:
        _judged(learner, single, range(1), recipe.test_steps)
    one = alone(lambda: _judged(learner, single, range(options.episodes), recipe.test_steps))
    each = [1000 * seconds / options.episodes for seconds in (one, by_one, batched)]
    return [f"{drawn:.2f}", f"{stepped:.1f}", f"{100 * drawn / stepped:.1f} %",
            *(f"{cell:.1f}" for cell in each), f"{one / batched:.1f}",
            f"{1000 * counter.get_total_flops() / rate:.1f}"]  # fmt: skip


def _judged(learner: Learner, episodes: ClassEpisodes, indices: Iterable[int], steps: int) -> list[Tensor]:
    """What `evaluate` computes, by this process alone."""
    of = METRICS["accuracy"].of
    with in_eval_mode(learner):
        drawn = (episodes[index] for index in indices)
        return [of(point, tasks.query) for tasks in drawn for point in learner.path(tasks, steps)]


if __name__ == "__main__":
    main(tyro.cli(Options))
