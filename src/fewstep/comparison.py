"""What `fewstep compare` does: two runs on the same test tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fewstep.errors import InputError
from fewstep.judge import JudgedRun
from fewstep.protocol import Protocol
from fewstep.tables import words
from fewstep.task import Task

LEAST = 30  # tasks; the mean of fewer is not normal enough for a p


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


def compare_runs(first: Path, second: Path, weights: str = "best", episodes: int | None = None,
                 asked: Mapping[str, int] | None = None) -> list[dict[str, Any]]:  # fmt: skip
    """Two runs on the same episodes, under the protocols that their recipes share. Nothing is written.

    asked : other test tasks, and other steps, than the recipes', see `fewstep.judge.asked_for`
    Raises `InputError` where they were made for different tasks, or where some tasks failed.
    """
    runs = [JudgedRun.of(path, weights, episodes, asked) for path in (first, second)]
    ways = [[run.told(protocol) for protocol in run.recipe.protocols()] for run in runs]
    drawn = [[(protocol, protocol.tasks[0]) for protocol in own] for own in ways]
    pairs = [(p, q) for p, one in drawn[0] for q, other in drawn[1] if _kind(p) == _kind(q) and _same(one, other)]
    if not pairs:
        (one, *_), (other, *_) = ways
        raise InputError(
            f"{first} is judged on {one.name} ({', '.join(words(one.about))}), {second} on {other.name} "
            f"({', '.join(words(other.about))}), or their data differ; only runs on the same test tasks can be compared"
        )
    found = []
    for one, other in pairs:
        if one.episodes != other.episodes:
            counts = f"{one.episodes} test tasks, and {second} on {other.episodes}"
            raise InputError(f"{first} is judged on {counts}; say on how many both: --episodes")
        if one.episodes < LEAST:
            raise InputError(
                f"a comparison needs at least {LEAST} test tasks, but {one.episodes} came; say how many: --episodes"
            )
        results = []
        for run, protocol in zip(runs, (one, other), strict=True):
            results.append(run.judge(protocol, run.learners(protocol.normalisation, 1), at=[protocol.steps]))
            if failed := protocol.episodes - results[-1].episodes:  # the others would be paired with wrong tasks
                raise InputError(
                    f"{failed} of {protocol.episodes} test tasks failed in {run.run.path}, and were left out; runs can "
                    "only be compared where none fails: mend the environment, or end such trajectories"
                )
        shared = {key: value for key, value in results[0].protocol.items() if results[1].protocol.get(key) == value}
        values = [result.values[-1] for result in results if result.values is not None]
        found.append({"name": one.name, "metric": results[0].metric, "episodes": one.episodes,
                      "protocol": shared, "results": [result.last for result in results],
                      "difference": Difference.of(*values)})  # fmt: skip
    return found


def _kind(protocol: Protocol) -> tuple[Any, ...]:
    """How it judges, beside the tasks."""
    world = map(protocol.about.get, ("world", "horizon", "trajectories"))
    return protocol.normalisation, protocol.permutations, *world


def _same(one: Task, other: Task) -> bool:
    """Whether the tasks are equal."""
    pairs = zip(tree_leaves(one), tree_leaves(other), strict=False)
    return all(a.shape == b.shape and torch.equal(a.cpu(), b.cpu()) for a, b in pairs)
