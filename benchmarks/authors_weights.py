"""The MAML authors' own Mini-ImageNet weights under their protocol, and by 15 queries of each class.

FEWSTEP_DATA=FOLDER python -m benchmarks.authors_weights --weights FILE.npz [--episodes N] [--seeds N]
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro

import fewstep
from benchmarks.workloads import origin
from fewstep.data import ClassEpisodes, load_mini_imagenet
from fewstep.engine import Engine
from fewstep.evaluate import evaluate
from fewstep.footprint import keep_freed_memory
from fewstep.losses import summed_over_ways

STEPS = (0, 1, 5, 10)
ENGINE = Engine(method="loop", convolution="channels_last")


@dataclass(frozen=True)
class Options:
    """Which weights, and how many episodes."""

    weights: Path
    """The authors' weights, see `fewstep.models.load_authors_conv4`."""
    episodes: int = 600
    """Test episodes of each seed."""
    seeds: int = 2
    """Seeds of the episodes, from 0."""
    queries: tuple[int, ...] = (1, 15)
    """Query pictures of each class."""


def main(options: Options) -> None:
    """Print one row for each number of queries."""
    keep_freed_memory()  # as the command line does
    print(origin("benchmarks.authors_weights"))
    model = fewstep.models.load_authors_conv4(options.weights)
    learner = fewstep.maml(model, summed_over_ways, lr=0.01, steps=5, adapt="~*.offset", engine=ENGINE)
    images = load_mini_imagenet("test")
    print(f"| queries per class | {' | '.join(f'{step} steps' for step in STEPS)} |\n|---:|{'---:|' * len(STEPS)}")
    for queries in options.queries:
        found = []
        for seed in range(options.seeds):
            tasks = ClassEpisodes(images=images, ways=5, shots=1, queries=queries, tasks=10, seed=seed)
            result = evaluate(learner, tasks, metric="accuracy", steps=10, count=options.episodes, at=STEPS)
            assert result.values is not None
            found.append(result.values)
        together = replace(result, values=torch.cat(found, 1)).first(options.seeds * options.episodes)
        cells = [f"{100 * point.mean:.2f} ± {100 * point.ci95:.2f}" for point in together.by_step]
        print(f"| {queries} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Options))
