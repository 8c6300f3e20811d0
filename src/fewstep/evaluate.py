"""How well a learner adapts: a metric after each inner step, over many episodes, with its protocol."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from math import ceil, inf, isfinite, sqrt
from typing import Any

import torch
from torch import Tensor

from fewstep.data.episodes import Episodes
from fewstep.errors import InputError
from fewstep.learner import Learner

Metric = Callable[[Tensor, Tensor], Tensor]


def accuracy(prediction: Tensor, target: Tensor) -> Tensor:
    """The share of right answers of each task. prediction [B, Q, N], target [B, Q] -> [B]

    >>> accuracy(torch.tensor([[[0.1, 0.9], [0.8, 0.2]]]), torch.tensor([[1, 1]]))
    tensor([0.5000])
    """
    return (prediction.argmax(-1) == target).float().mean(-1)


def mse(prediction: Tensor, target: Tensor) -> Tensor:
    """The mean squared error of each task. prediction, target [B, Q, D] -> [B]

    >>> mse(torch.zeros(1, 2, 1), torch.tensor([[[1.0], [3.0]]]))
    tensor([5.])
    """
    return (prediction - target).square().flatten(1).mean(1)


METRICS: dict[str, Metric] = {"accuracy": accuracy, "mse": mse}


@dataclass(frozen=True)
class StepResult:
    """The metric after `step` inner steps: mean over the episodes and half the width of its 95 % interval."""

    step: int
    mean: float
    ci95: float


@dataclass(frozen=True)
class Evaluation:
    """A metric after each inner step, and everything that decides what the number means."""

    metric: str
    by_step: list[StepResult]
    episodes: int
    protocol: Mapping[str, Any] = field(default_factory=dict)

    @property
    def last(self) -> StepResult:
        return self.by_step[-1]

    @property
    def worth(self) -> float:
        """The last mean as a number that is better when higher; a diverged result is worst."""
        value = self.last.mean if self.metric == "accuracy" else -self.last.mean
        return value if isfinite(value) else -inf

    def to_json(self) -> dict[str, Any]:
        """Plain values; a mean that is not finite is null."""
        content = asdict(self)
        for point in content["by_step"]:
            point.update({key: None for key in ("mean", "ci95") if not isfinite(point[key])})
        return content


def evaluate(
    learner: Learner,
    episodes: Episodes,
    *,
    metric: str,
    steps: int,
    count: int = 600,
    protocol: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Adapt to the first `count` tasks of `episodes` and judge each by its query set after steps 0, 1, ..., `steps`.

    The interval is 1.96 standard deviations / sqrt(count), as in the paper. The learner is in eval mode meanwhile.
    """
    if metric not in METRICS:
        raise InputError(f"the metric must be one of {', '.join(METRICS)}, but {metric!r} came")
    if count < 2:
        raise InputError(f"an interval needs at least 2 episodes, but {count} came")
    was_training = learner.training
    learner.eval()
    try:
        batches = [_judge(learner, episodes, index, metric, steps) for index in range(ceil(count / episodes.tasks))]
    finally:
        learner.train(was_training)
    values = torch.cat(batches, dim=1)[:, :count].double()
    half = 1.96 * values.std(1) / sqrt(count)
    by_step = [
        StepResult(step, *pair) for step, pair in enumerate(zip(values.mean(1).tolist(), half.tolist(), strict=True))
    ]
    return Evaluation(metric, by_step, count, dict(protocol or {}))


def _judge(learner: Learner, episodes: Episodes, index: int, metric: str, steps: int) -> Tensor:
    """The metric [steps + 1, tasks] of one batch of tasks."""
    tasks = episodes[index]
    values = []
    for point in learner.path(tasks, steps):
        if point.prediction is None:
            raise InputError(f"{metric} needs a prediction, which only (x, y) batches have")
        values.append(METRICS[metric](point.prediction, tasks.query[1]))
    return torch.stack(values)
