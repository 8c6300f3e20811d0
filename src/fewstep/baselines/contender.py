"""A net to compare with under the same evaluation, fine-tuned at the rate that suits it best on validation tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fewstep.data.episodes import Episodes
from fewstep.evaluate import Judged, evaluate
from fewstep.functional import Loss
from fewstep.learner import Learner
from fewstep.run import Run
from fewstep.updates import SGD


@dataclass(frozen=True)
class Baseline:
    """How a net to compare with comes about.

    build : gives the net before training;  train : trains it in place and returns what is worth telling of it
    settings : everything that `train` depends on, so that a net trained with other settings is not taken for this one
    steps : of fine-tuning, at the best of `rates`;  view : turns the test episodes into what this net is given
    """

    name: str
    build: Callable[[], nn.Module]
    train: Callable[[nn.Module], Mapping[str, Any]]
    settings: Mapping[str, Any]
    steps: int
    rates: Sequence[float] = (1.0,)
    view: Callable[[Episodes], Episodes] = lambda episodes: episodes

    @property
    def file(self) -> str:
        return "baselines/" + "".join(c if c.isalnum() else "-" for c in self.name)


@dataclass(frozen=True)
class Contender:
    """A trained baseline, ready to adapt."""

    baseline: Baseline
    learner: Learner
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def rate(self) -> dict[str, Any]:
        """Its inner rate, in the words of a protocol."""
        return {"inner_lr": self.about.get("fine_tuning_lr")}


def trained_net(baseline: Baseline, run: Run) -> tuple[nn.Module, dict[str, Any]]:
    """The baseline's net out of the run's folder, or trained and kept there; and what is worth telling of it."""
    model, settings = baseline.build(), dict(baseline.settings)
    known = run.read_json(f"{baseline.file}.json") if (run.path / f"{baseline.file}.json").exists() else None
    if known is not None and known["settings"] == settings:
        run.restore(f"{baseline.file}.safetensors", model)
        return model, dict(known["told"])
    told = dict(baseline.train(model))
    run.save_weights(f"{baseline.file}.safetensors", model.state_dict())
    run.write_json(f"{baseline.file}.json", {"settings": settings, "told": told})
    return model, told


def contend(
    baseline: Baseline,
    run: Run,
    loss: Loss,
    validation: Episodes,
    metric: str,
    *,
    episodes: int,
    prepare: Callable[[Learner], None] = lambda learner: None,
    seen_by: Callable[[Learner], Judged] = lambda learner: learner,
    **options: Any,
) -> Contender:
    """The baseline's net out of the run's folder, or trained and kept there; then the choice of its rate.

    prepare : what is done to each learner before it is judged;  seen_by : as in `Protocol`;  options : as for `Learner`
    """
    model, told = trained_net(baseline, run)
    settings = dict(baseline.settings)
    results = []
    for rate in baseline.rates:
        learner = Learner(model, loss, SGD(rate), steps=baseline.steps, **options)
        prepare(learner)
        if len(baseline.rates) == 1:
            return Contender(baseline, learner, {**told, "training": settings})
        result = evaluate(seen_by(learner), validation, metric=metric, steps=baseline.steps, count=episodes)
        results.append((result.worth, rate, learner))
    _, rate, learner = max(results, key=lambda entry: entry[0])
    return Contender(baseline, learner, {**told, "training": settings, "fine_tuning_lr": rate})
