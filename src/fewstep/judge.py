"""What `fewstep evaluate` and `fewstep compare` do: runs under the protocols of their recipe."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fewstep.baselines import Baseline, Contender, contend
from fewstep.calibrate import calibrate
from fewstep.commands import judging_engine, recipe_of
from fewstep.data.episodes import Episodes
from fewstep.errors import InputError
from fewstep.evaluate import Evaluation
from fewstep.learner import Learner
from fewstep.normalisation import MEANINGS, Policy
from fewstep.progress import narrate
from fewstep.protocol import Protocol
from fewstep.recipes import Recipe
from fewstep.run import Run, checkpoint_name
from fewstep.tables import shown, words
from fewstep.task import Task


def evaluate_run(
    path: Path, weights: str = "best", baselines: bool = True, episodes: int | None = None,
    normalisation: Policy | None = None, first_only: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Judge a run under the protocols of its recipe, beside the baselines, and write evaluation.json.

    normalisation : by which statistics batch norm goes, in the learner and in the baselines; by default as the
        protocols say
    first_only : of all test protocols only the first, the paper's own
    """
    judged = _Judged.of(path, weights, episodes)
    recipe, started = judged.recipe, time.monotonic()
    protocols = recipe.protocols()[: 1 if first_only else None]
    if normalisation is not None:
        protocols = _under(normalisation, protocols)
    policy = protocols[0].normalisation
    learner = judged.learners(policy, 1)
    contenders = contenders_of(recipe, judged.run, policy) if baselines else []
    results = []
    for place, protocol in enumerate(protocols):
        entry = protocol.judge(learner, recipe.metric, _looked_at(protocol, place)).to_json()
        unadapted = {**entry, "by_step": entry["by_step"][:1]}
        entry["baselines"] = {"the same net without adaptation": unadapted}
        for c in contenders:
            own = dataclasses.replace(protocol, steps=c.baseline.steps, about=c.told(protocol.about))
            judgement = own.judge([c.learner], recipe.metric, _looked_at(own, place), c.baseline.view).to_json()
            entry["baselines"][c.baseline.name] = {**judgement, **c.about}
        results.append({"name": protocol.name, **entry})
    content = {**judged.about, **results[0], "seconds": round(time.monotonic() - started, 1),
               "other_protocols": results[1:]}  # fmt: skip
    judged.run.write_json("evaluation.json", content)
    return content


def _looked_at(protocol: Protocol, place: int) -> list[int] | None:
    """The inner steps to judge after: all; in further protocols with many queries, where these take most of the time,
    those that tables show."""
    few = not place or protocol.about.get("queries_per_class", 1) == 1
    return None if few else shown(range(protocol.steps + 1))


def evaluate_all(path: Path, weights: str = "best", episodes: int | None = None) -> dict[str, Any]:
    """Judge a run, without its baselines, under every protocol that people use, and write protocols.json.

    episodes : the most to take under any of them
    Each distinct way of judging runs once; fewer episodes are the first ones of more.
    """
    judged = _Judged.of(path, weights, None)
    protocols = judged.recipe.all_protocols(episodes)
    found: dict[Any, Evaluation] = {}
    entries = {}
    for place, protocol in sorted(enumerate(protocols), key=lambda pair: -pair[1].episodes):
        if protocol.checkpoints > 1:
            there = len(judged.checkpoints(protocol.checkpoints))
            if there < 2:
                narrate(f"without the ensemble: it is of several checkpoints, and the run has kept {there}")
                continue
            which: Literal["best", "last"] = "best" if weights == "best" else "last"
            protocol = dataclasses.replace(protocol, checkpoints=there, which=which)
        way = id(protocol.tasks), protocol.normalisation, protocol.checkpoints, protocol.permutations
        if way not in found:
            narrate(f"{protocol.name}, {protocol.episodes:,} episodes")
            learners = judged.learners(protocol.normalisation, protocol.checkpoints)
            found[way] = protocol.judge(learners, judged.recipe.metric, at=sorted({0, protocol.steps}))
        entries[place] = {"name": protocol.name, **found[way].first(protocol.episodes).to_json()}
    content = {**judged.about, "protocols": [entries[place] for place in sorted(entries)]}
    judged.run.write_json("protocols.json", content)
    return content


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
    runs = [_Judged.of(path, weights, episodes) for path in (first, second)]
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


@dataclass(frozen=True)
class _Judged:
    """A run whose weights are to be judged."""

    run: Run
    name: str
    recipe: Recipe
    weights: str
    file: str
    """Of the weights."""

    @classmethod
    def of(cls, path: Path, weights: str, episodes: int | None) -> _Judged:
        name, recipe = recipe_of(run := Run(path))
        if episodes is not None:
            recipe = dataclasses.replace(recipe, test_episodes=episodes)
        return cls(run, name, recipe, weights, run.weights_file(weights))

    @property
    def about(self) -> dict[str, Any]:
        iterations = self.run.step_of(self.file)
        return {"recipe": self.name, "seed": self.recipe.seed, "iterations": iterations, "weights": self.weights}

    def checkpoints(self, count: int) -> list[str]:
        """The files of the `count` best validated or last weights; all there are where those are fewer."""
        best = (self.run.load_state() or {"best": []})["best"]
        names = [checkpoint_name(each["step"]) for each in best if isinstance(each, dict)]
        if self.weights == "model":  # runs of before the last ones were kept have gaps
            names = [checkpoint_name(event["step"]) for event in self.run.metrics()[::-1] if "best_step" in event]
            names = [*takewhile(lambda name: (self.run.path / name).exists(), names)]
        return [name for name in names if (self.run.path / name).exists()][:count]

    def learners(self, policy: Policy | None, count: int) -> list[Learner]:
        """The learner with the chosen weights, or one for each of several checkpoints."""
        names: Iterable[str] = [self.file]
        if count > 1:
            names = self.checkpoints(count)
        found = []
        for name in names:
            learner = self.recipe.learner()
            self.run.restore(name, learner)
            _prepare(policy, partial(self.recipe.episodes, "train"), self.recipe.test_steps, learner)
            learner.engine = judging_engine(self.recipe, self.run)
            found.append(learner)
        return found


def _under(normalisation: Policy, protocols: Sequence[Protocol]) -> list[Protocol]:
    """The protocols of the first one's normalisation with another one, where it knows any."""
    if (own := protocols[0].normalisation) is None:
        raise InputError(
            f"the net of this recipe has no batch normalisation; leave out --normalisation {normalisation}"
        )
    same = [protocol for protocol in protocols if protocol.normalisation == own]
    return [dataclasses.replace(protocol, normalisation=normalisation) for protocol in same]


def _prepare(policy: Policy | None, training: Callable[[], Episodes], steps: int, learner: Learner) -> None:
    """Have a learner judged under a policy, by the statistics of training tasks where it needs any."""
    learner.normalisation = policy
    if policy in ("running", "per_step"):
        narrate(f"measuring {MEANINGS[policy]}")
        calibrate(learner, training(), steps=steps)


def contenders_of(recipe: Recipe, run: Run, policy: Policy | None = None) -> list[Contender]:
    """The recipe's baselines under a policy: out of the run's folder, or trained and kept there."""
    validation = recipe.episodes("validation")

    def training(baseline: Baseline) -> Episodes:
        return baseline.view(recipe.episodes("train"))

    return [
        contend(
            baseline,
            run,
            recipe.loss,
            validation,
            recipe.metric,
            episodes=recipe.validation_episodes,
            seen_by=recipe.seen_by,
            adapt=recipe.adapt,
            engine=judging_engine(recipe, run),
            **recipe.learner_options,
            prepare=partial(_prepare, policy, partial(training, baseline), baseline.steps),
        )
        for baseline in recipe.baselines()
    ]
