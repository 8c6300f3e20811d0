"""How well a learner adapts: a metric after each inner step, over many episodes, with its protocol."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from math import ceil, inf, isfinite, sqrt
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fewstep.data.episodes import Episodes
from fewstep.distributed import on_all_ranks
from fewstep.errors import InputError
from fewstep.modes import HasModes, in_eval_mode
from fewstep.normalisation import MEANINGS
from fewstep.task import Batch, Point, Task


def accuracy(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """The share of right answers of each task. prediction [B, Q, N], target [B, Q] -> [B]

    mask : [B, Q], which examples count (`fewstep.pad_tasks`); None counts all

    >>> accuracy(torch.tensor([[[0.1, 0.9], [0.8, 0.2]]]), torch.tensor([[1, 1]]))
    tensor([0.5000])
    """
    return _mean((prediction.argmax(-1) == target).float(), mask)


def mse(prediction: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """The mean squared error of each task. prediction, target [B, Q, D], mask as for `accuracy` -> [B]

    >>> mse(torch.zeros(1, 2, 1), torch.tensor([[[1.0], [3.0]]]))
    tensor([5.])
    """
    if prediction.shape != target.shape:  # broadcasting would give a wrong number without a word
        shapes = f"{tuple(prediction.shape)} and {tuple(target.shape)}"
        raise InputError(f"mse needs prediction and target of one shape, but {shapes} came; reshape the target")
    squares = (prediction - target).square()
    return _mean(squares.flatten(2).mean(2) if squares.dim() > 2 else squares, mask)


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """The mean [B] of values [B, Q] of examples, of those that count."""
    return values.mean(1) if mask is None else torch.where(mask, values, 0).sum(1) / mask.sum(1)


@dataclass(frozen=True)
class Metric:
    """A number [B] for each task, out of the learner's `Point` and the query batch, and which way is better."""

    name: str
    of: Callable[[Point, Batch], Tensor]
    higher_is_better: bool = False


def _with_prediction(of: Callable[..., Tensor]) -> Callable[[Point, Batch], Tensor]:
    def judge(point: Point, query: Batch) -> Tensor:
        if point.prediction is None:
            raise InputError(
                "this metric needs a prediction, which only (x, y) batches have, and losses that return "
                "(number, prediction); use the metric 'loss'"
            )
        return of(point.prediction, *query[1:])  # y, and the mask of an (x, y, mask) batch

    return judge


METRICS = {
    "accuracy": Metric("accuracy", _with_prediction(accuracy), higher_is_better=True),
    "mse": Metric("mse", _with_prediction(mse)),
    "loss": Metric("loss", lambda point, query: point.loss),
    "return": Metric("return", lambda point, query: -point.loss, higher_is_better=True),
}


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
    higher_is_better: bool = False
    values: Tensor | None = field(default=None, repr=False, compare=False)
    """The metric of each episode [steps, episodes]."""

    @property
    def last(self) -> StepResult:
        return self.by_step[-1]

    @property
    def worth(self) -> float:
        """The last mean as a number that is better when higher; a diverged result is worst."""
        value = self.last.mean if self.higher_is_better else -self.last.mean
        return value if isfinite(value) else -inf

    @property
    def gains(self) -> list[StepResult]:
        """By how much the metric of an episode is better after each step than before the first.

        Differences within episodes: their interval does not hold how unlike the episodes are, as that of a mean does.
        """
        if self.values is None or len(self.by_step) < 2:
            return []
        better = (self.values[1:] - self.values[:1]) * (1 if self.higher_is_better else -1)
        return _by_step(better, [point.step for point in self.by_step[1:]])

    def first(self, count: int) -> Evaluation:
        """What the first `count` episodes alone give."""
        assert self.values is not None
        values = self.values[:, :count]
        return replace(self, by_step=_by_step(values, [p.step for p in self.by_step]), episodes=count, values=values)

    def to_json(self) -> dict[str, Any]:
        """Plain values; a mean that is not finite is null."""
        content = asdict(replace(self, values=None))
        del content["values"]
        content["gains"] = [asdict(gain) for gain in self.gains]
        for point in [*content["by_step"], *content["gains"]]:
            point.update({key: None for key in ("mean", "ci95") if not isfinite(point[key])})
        return content


class Judged(HasModes, Protocol):
    """What can be judged: a `Learner`, an `Ensemble`, a `MetricLearner`."""

    def path(self, tasks: Task, steps: int, at: Collection[int] | None = None) -> list[Point]: ...


def evaluate(
    learner: Judged,
    episodes: Episodes,
    *,
    metric: str | Metric,
    steps: int,
    count: int = 600,
    at: Collection[int] | None = None,
    protocol: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Adapt to the first `count` tasks of `episodes` and judge each by its query set after steps 0, 1, ..., `steps`.

    metric : "accuracy", "mse", "loss" (the query loss), "return" (of an `Explorer`), or a `Metric` of your own
    at : the steps to judge after, if not all: most of the time goes into large query sets
    protocol : what decides about the number; by default, by which statistics batch norm normalised, where that is known
    The interval is 1.96 standard deviations / sqrt(count), as in the paper. The learner is in eval mode meanwhile.
    Where several processes work together, all have to call it; they share the batches, and each gets the result.
    """
    if isinstance(metric, str):
        if metric not in METRICS:
            raise InputError(f"the metric must be one of {', '.join(METRICS)}, but {metric!r} came")
        metric = METRICS[metric]
    if count < 2:
        raise InputError(f"an interval needs at least 2 episodes, but {count} came")
    if at is not None and (not at or len(set(at)) < len(at) or not set(at) <= set(range(steps + 1))):
        raise InputError(f"the steps to judge after must be distinct ones of 0..{steps}, but {list(at)} came")
    with in_eval_mode(learner):
        judge = partial(_judge, learner, episodes, metric, steps, at, count)
        batches = on_all_ranks(judge, ceil(count / episodes.tasks))
    values = torch.cat(batches, dim=1).double()
    by_step = _by_step(values, range(steps + 1) if at is None else sorted(at))
    if (found := values.shape[1]) < 2:  # an environment may have failed in some tasks
        raise InputError(f"an interval needs at least 2 episodes, but {count - found} of {count} failed")
    if protocol is None and (policy := getattr(learner, "normalisation", "")) in MEANINGS:
        protocol = {"normalisation": MEANINGS[policy]}
    return Evaluation(metric.name, by_step, found, dict(protocol or {}), metric.higher_is_better, values)


def _by_step(values: Tensor, steps: Iterable[int]) -> list[StepResult]:
    half = 1.96 * values.std(1) / sqrt(values.shape[1])
    return [StepResult(*point) for point in zip(steps, values.mean(1).tolist(), half.tolist(), strict=True)]


def _judge(learner: Judged, episodes: Episodes, metric: Metric, steps: int, at: Collection[int] | None,
           count: int, index: int) -> Tensor:  # fmt: skip
    """The metric [judged steps, tasks] of one batch of tasks, of which it takes those before number `count`.

    What explores may leave out tasks that fail: there the others go first. What is compiled is so for whole batches.
    """
    tasks, left = episodes[index], min(count - index * episodes.tasks, episodes.tasks)
    if not isinstance(learner, nn.Module) and left < episodes.tasks:
        tasks = tasks.select(slice(left))
    return torch.stack([metric.of(point, tasks.query) for point in learner.path(tasks, steps, at)])[:, :left]
