"""A net to compare with under the same evaluation, fine-tuned at the rate that suits it best on validation tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from torch import Tensor, nn

from fewstep.data.episodes import Episodes
from fewstep.distributed import from_first
from fewstep.evaluate import Judged, evaluate
from fewstep.functional import Loss
from fewstep.learner import Learner
from fewstep.run import Run
from fewstep.updates import SGD


@dataclass(frozen=True)
class Baseline:
    """How a net to compare with comes about.

    build : gives the net before training;  train : trains it in place and returns what is worth telling of it, with a
        run of its own at hand, whose folder may keep what a training that is stopped goes on from
    settings : everything that `train` depends on, so that a net trained with other settings is not taken for this one
    steps : of fine-tuning, at the best of `rates`; there are none where no gradient step is taken
    view : turns the test episodes into what this net is given
    """

    name: str
    build: Callable[[], nn.Module]
    train: Callable[[nn.Module, Run], Mapping[str, Any]]
    settings: Mapping[str, Any]
    steps: int
    rates: Sequence[float] = ()
    view: Callable[[Episodes], Episodes] = lambda episodes: episodes

    @property
    def file(self) -> str:
        """In the folder of a run, without an ending."""
        return "baselines/" + "".join(c if c.isalnum() else "-" for c in self.name)


@dataclass(frozen=True)
class Contender:
    """A trained baseline, ready to adapt."""

    baseline: Baseline
    learner: Learner
    about: dict[str, Any] = field(default_factory=dict)

    def told(self, about: Mapping[str, Any]) -> dict[str, Any]:
        """What a protocol says, with this one's inner rate; where it has none, nothing of later ones either."""
        rate = self.about.get("fine_tuning_lr")
        later = {key: None for key in about if key == "later_rate" and rate is None}
        return {**about, "inner_lr": rate, **later}


def trained_net(baseline: Baseline, run: Run) -> tuple[nn.Module, dict[str, Any]]:
    """The baseline's net out of the run's folder, or trained and kept there; and what is worth telling of it.

    Of several processes the folder of the first counts.
    """
    model, settings = baseline.build(), dict(baseline.settings)
    if (kept := from_first(lambda: _kept(baseline.file, run, settings))) is not None:
        told, weights = kept
        with run.reading(f"{baseline.file}.safetensors"):
            model.load_state_dict(weights)
        return model, told
    told = dict(baseline.train(model, Run(run.path / baseline.file)))
    run.save_weights(f"{baseline.file}.safetensors", model.state_dict())
    run.write_json(f"{baseline.file}.json", {"settings": settings, "told": told})
    return model, told


def _kept(file: str, run: Run, settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """What was told of a net that was trained with these settings, and its weights."""
    if not (run.path / f"{file}.json").exists() or (known := run.read_json(f"{file}.json"))["settings"] != settings:
        return None
    return dict(known["told"]), run.load_weights(f"{file}.safetensors")


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
    about = {**told, "training": dict(baseline.settings)}

    @cache  # the best one is judged as it is
    def tuned(rate: float) -> Learner:
        learner = Learner(model, loss, SGD(rate), steps=baseline.steps, **options)
        prepare(learner)
        return learner

    def worth(rate: float) -> float:
        judged = seen_by(tuned(rate))
        return evaluate(judged, validation, metric=metric, steps=baseline.steps, count=episodes).worth

    if not baseline.rates:
        return Contender(baseline, tuned(1.0), about)
    best = baseline.rates[0] if len(baseline.rates) == 1 else max(baseline.rates, key=worth)
    return Contender(baseline, tuned(best), {**about, "fine_tuning_lr": best})
