"""What `fewstep compare` does: two runs on the same test tasks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fewstep.errors import InputError
from fewstep.judge import JudgedRun
from fewstep.tables import words
from fewstep.task import Task


@dataclass(frozen=True)
class Difference:
    """Two runs on the same tasks: first minus second, half its 95 % interval, and the chance of one as large by luck.

    p : two-sided, of the mean of the paired differences, which is nearly normal for this many episodes
    """

    mean: float
    ci95: float
    p: float

    @classmethod
    def of(cls, first: Tensor, second: Tensor) -> Difference:
        """From the metric [episodes] of each.

        >>> import torch
        >>> Difference.of(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 1.0, 1.0])).mean
        1.0
        """
        pairs = (first - second).double()
        error = float(pairs.std()) / math.sqrt(len(pairs))
        mean = float(pairs.mean())
        p = math.erfc(abs(mean) / error / math.sqrt(2)) if error else float(mean == 0)
        return cls(mean, 1.96 * error, p)


def compare_runs(first: Path, second: Path, weights: str = "best", episodes: int | None = None) -> list[dict[str, Any]]:
    """Two runs on the same episodes, under the protocols that their recipes share. Nothing is written.

    Raises `InputError` where they were made for different tasks, or where some tasks failed.
    """
    runs = [JudgedRun.of(path, weights, episodes) for path in (first, second)]
    ways = [run.recipe.protocols() for run in runs]
    found = []
    for one, other in zip(*ways, strict=False):
        worlds = [
            [protocol.about.get(key) for key in ("world", "horizon", "trajectories")] for protocol in (one, other)
        ]
        if one.episodes != other.episodes:
            counts = f"{one.episodes} test tasks, and {second} on {other.episodes}"
            raise InputError(f"{first} is judged on {counts}; say on how many both: --episodes")
        if worlds[0] != worlds[1] or not _same(one.tasks[0], other.tasks[0]):
            raise InputError(
                f"{first} is judged on {one.name} ({', '.join(words(one.about))}), {second} on {other.name} "
                f"({', '.join(words(other.about))}), or their data differ; only runs on the same test tasks can be "
                "compared"
            )
        results = []
        for run, protocol in zip(runs, (one, other), strict=True):
            steps = protocol.steps
            results.append(protocol.judge(run.learners(protocol.normalisation, 1), run.recipe.metric, at=[steps]))
            if failed := protocol.episodes - results[-1].episodes:  # the others would be paired with wrong tasks
                raise InputError(
                    f"{failed} of {protocol.episodes} test tasks failed in {run.run.path}, and were left out; runs can "
                    "only be compared where none fails: mend the environment, or end such trajectories"
                )
        values = [result.values[-1] for result in results if result.values is not None]
        found.append({"name": one.name, "metric": results[0].metric, "episodes": one.episodes,
                      "protocol": results[0].protocol, "results": [result.last for result in results],
                      "difference": Difference.of(*values)})  # fmt: skip
    return found


def _same(one: Task, other: Task) -> bool:
    """Whether the tasks are equal."""
    pairs = zip(tree_leaves(one), tree_leaves(other), strict=False)
    return all(a.shape == b.shape and torch.equal(a.cpu(), b.cpu()) for a, b in pairs)
