"""A net to compare with under the same evaluation, fine-tuned at the rate that suits it best on validation tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fewstep.data.episodes import Episodes
from fewstep.evaluate import evaluate
from fewstep.functional import Loss
from fewstep.learner import Learner
from fewstep.updates import SGD


@dataclass(frozen=True)
class Contender:
    """A learner under a name; `view` turns the test episodes into what it is given (the oracle sees more)."""

    name: str
    learner: Learner
    steps: int
    about: dict[str, Any] = field(default_factory=dict)
    view: Callable[[Episodes], Episodes] = lambda episodes: episodes


def tuned(
    name: str,
    model: nn.Module,
    loss: Loss,
    validation: Episodes,
    *,
    rates: Sequence[float],
    steps: int,
    metric: str,
    episodes: int = 100,
    **options: Any,
) -> Contender:
    """`model` fine-tuned by gradient descent, at the one of `rates` that is best after `steps` on validation tasks."""
    results = []
    for rate in rates:
        learner = Learner(model, loss, SGD(rate), steps=steps, **options)
        result = evaluate(learner, validation, metric=metric, steps=steps, count=episodes)
        value = result.last.mean if result.last.mean == result.last.mean else float("inf")  # NaN is worst
        results.append((-value if result.higher_is_better else value, rate, learner))
    _, rate, learner = min(results, key=lambda entry: entry[0])
    return Contender(name, learner, steps, {"fine_tuning_lr": rate})
