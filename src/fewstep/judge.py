"""What `fewstep evaluate` does: a run under the protocols of its recipe."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

from fewstep.baselines import Baseline, Contender, contend
from fewstep.calibrate import calibrate
from fewstep.commands import check_classes, judging_engine, recipe_of
from fewstep.data.episodes import Episodes
from fewstep.errors import InputError
from fewstep.evaluate import Evaluation
from fewstep.heads import Head, other_ways, start_head, steps_from
from fewstep.learner import Learner
from fewstep.normalisation import MEANINGS, Policy
from fewstep.progress import narrate
from fewstep.protocol import Protocol
from fewstep.recipes import Recipe
from fewstep.recipes.classification import ClassificationRecipe
from fewstep.run import Run, checkpoint_name
from fewstep.tables import shown


def evaluate_run(
    path: Path, weights: str = "best", baselines: bool = True, episodes: int | None = None,
    normalisation: Policy | None = None, first_only: bool = False, asked: Mapping[str, int] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Judge a run under the protocols of its recipe, beside the baselines, and write evaluation.json.

    normalisation : by which statistics batch norm goes, in the learner and in the baselines; by default as the
        protocols say
    first_only : of all test protocols only the first, the paper's own
    asked : other test tasks, and other steps, than the recipe's, see `asked_for`; they name the file
    """
    judged = JudgedRun.of(path, weights, episodes, asked)
    recipe, started = judged.recipe, time.monotonic()
    protocols = [judged.told(protocol) for protocol in recipe.protocols()[: 1 if first_only else None]]
    if normalisation is not None:
        protocols = _under(normalisation, protocols)
    policy = protocols[0].normalisation
    learner = judged.learners(policy, 1)
    # What others are trained for is what the run was, whatever is asked; without steps they answer by chance.
    compared = baselines and judged.head is None and protocols[0].steps > 0
    if compared:
        narrate("baselines are trained, once, and judged too; --no-baselines leaves them out")
    contenders = contenders_of(judged.trained, judged.run, policy) if compared else []
    results = []
    for place, protocol in enumerate(protocols):
        entry = judged.judge(protocol, learner, _looked_at(protocol, place)).to_json()
        unadapted = {**entry, "by_step": entry["by_step"][:1], "gains": []}
        entry["baselines"] = {"the same net without adaptation": unadapted} if protocol.steps else {}
        for c in contenders:
            steps = protocol.steps if c.baseline.steps else 0
            own = dataclasses.replace(protocol, steps=steps, about=c.told(protocol.about))
            judgement = own.judge([c.learner], recipe.metric, _looked_at(own, place), c.baseline.view).to_json()
            entry["baselines"][c.baseline.name] = {**judgement, **c.about}
        results.append({"name": protocol.name, **entry})
    content = {**judged.about, **results[0], "seconds": round(time.monotonic() - started, 1),
               "other_protocols": results[1:]}  # fmt: skip
    judged.run.write_json(file_of("evaluation", asked), content)
    return content


def asked_for(ways: int | None, shots: int | None, queries: int | None, steps: int | None) -> dict[str, int]:
    """The fields of a recipe of classification that decide on test tasks and steps, those of them that are given."""
    fields = {"ways": ways, "shots": shots, "test_queries": queries, "test_steps": steps}
    return {name: value for name, value in fields.items() if value is not None}


def file_of(kind: str, asked: Mapping[str, int] | None) -> str:
    """The name of a file of results.

    >>> file_of("evaluation", {}), file_of("evaluation", {"ways": 10, "test_steps": 3})
    ('evaluation.json', 'evaluation-ways-10-steps-3.json')
    """
    return (
        "-".join([kind, *(f"{name.removeprefix('test_')}-{value}" for name, value in (asked or {}).items())]) + ".json"
    )


def _looked_at(protocol: Protocol, place: int) -> list[int] | None:
    """The inner steps to judge after: all; in further protocols with many queries, where these take most of the time,
    those that tables show."""
    few = not place or protocol.about.get("queries_per_class", 1) == 1
    return None if few else shown(range(protocol.steps + 1))


def evaluate_all(path: Path, weights: str = "best", episodes: int | None = None,
                 asked: Mapping[str, int] | None = None) -> dict[str, Any]:  # fmt: skip
    """Judge a run, without its baselines, under every protocol that people use, and write protocols.json.

    episodes : the most to take under any of them;  asked : as in `evaluate_run`
    Each distinct way of judging runs once; fewer episodes are the first ones of more.
    """
    judged = JudgedRun.of(path, weights, None, asked)
    protocols = [judged.told(protocol) for protocol in judged.recipe.all_protocols(episodes)]
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
            found[way] = judged.judge(protocol, learners, sorted({0, protocol.steps}))
        entries[place] = {"name": protocol.name, **found[way].first(protocol.episodes).to_json()}
    content = {**judged.about, "protocols": [entries[place] for place in sorted(entries)]}
    judged.run.write_json(file_of("protocols", asked), content)
    return content


@dataclass(frozen=True)
class JudgedRun:
    """A run whose weights are to be judged."""

    run: Run
    name: str
    trained: Recipe
    recipe: Recipe
    """The same, for the test tasks that were asked for."""
    weights: str
    file: str
    """Of the weights."""
    head: Head | None = None
    """Where the head starts, for another number of classes than in training."""
    steps: int | None = None
    """Inner steps, where not the recipe's."""

    @classmethod
    def of(cls, path: Path, weights: str, episodes: int | None, asked: Mapping[str, int] | None = None) -> JudgedRun:
        name, trained = recipe_of(run := Run(path))
        check_classes(run, trained)
        if episodes is not None:
            trained = dataclasses.replace(trained, test_episodes=episodes)
        changes: dict[str, Any] = dict(asked or {})
        recipe, head, steps = trained, None, changes.pop("test_steps", None)
        if steps is not None and steps < 0:
            raise InputError(f"--steps must be at least 0, but {steps} came")
        if changes:
            if not isinstance(trained, ClassificationRecipe):
                options = ", ".join(f"--{field.removeprefix('test_')}" for field in changes)
                raise InputError(f"{path} is a run of {name}, not of classification; leave out {options}")
            recipe = dataclasses.replace(trained, **changes)
            if recipe.ways != trained.ways:
                head = start_head(trained.learner(), "auto", trained.ways, recipe.ways)
                steps = steps_from(head, trained.test_steps) if steps is None else steps
        return cls(run, name, trained, recipe, weights, run.weights_file(weights), head, steps)

    def told(self, protocol: Protocol) -> Protocol:
        """The protocol with the steps that were asked for, and with what differs from training."""
        about = dict(protocol.about)
        for field in ("ways", "shots"):
            if (before := getattr(self.trained, field, None)) != getattr(self.recipe, field, None):
                about[f"trained_on_{field}"] = before
        if self.head not in (None, "trained"):
            about["head"] = self.head
        if self.steps is None:
            return dataclasses.replace(protocol, about=about)
        return dataclasses.replace(protocol, about=about | ({} if self.steps else {"inner_lr": None}), steps=self.steps)

    def judge(self, protocol: Protocol, learners: Sequence[Learner], at: Collection[int] | None) -> Evaluation:
        """Judge the learners under a protocol; `InputError` with what to do where they take no other ways."""
        with other_ways(self.trained.algorithm, *self.ways, protocol.steps):
            return protocol.judge(learners, self.recipe.metric, at)

    @property
    def ways(self) -> tuple[int, int]:
        """Classes of a task in training and at test; 0 where tasks have none."""
        return getattr(self.trained, "ways", 0), getattr(self.recipe, "ways", 0)

    @property
    def about(self) -> dict[str, Any]:
        iterations = self.run.step_of(self.file)
        return {"recipe": self.name, "seed": self.recipe.seed, "iterations": iterations,
                "begun": self.recipe.begun, "weights": self.weights}  # fmt: skip

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
            learner = self.trained.learner()
            self.run.restore(name, learner)
            if self.head is not None:
                start_head(learner, self.head, *self.ways)
            steps = self.recipe.test_steps if self.steps is None else self.steps
            _prepare(policy, partial(self.recipe.episodes, "train"), steps, learner)
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
            adapt=recipe.adapting,
            engine=judging_engine(recipe, run),
            **recipe.learner_options,
            prepare=partial(_prepare, policy, partial(training, baseline), baseline.steps),
        )
        for baseline in recipe.baselines()
    ]
