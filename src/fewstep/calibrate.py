"""The statistics of training tasks by which batch normalisation may go in evaluation."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.data.episodes import Episodes
from fewstep.errors import InputError
from fewstep.functional import Place, Tensors
from fewstep.learner import Learner
from fewstep.modes import in_eval_mode
from fewstep.normalisation import observed
from fewstep.task import Batch, Task, at_step, map_tensors

Moments = list[tuple[Tensor, Tensor]]


def calibrate(learner: Learner, episodes: Episodes, *, batches: int = 10, steps: int | None = None) -> None:
    """Measure what batch normalisation sees on training tasks, for the normalisations "running" and "per_step".

        m_k = E[mean],   v_k = E[variance + mean^2] - m_k^2     over the support and query sets of all tasks, at theta_k

    For each batch norm and each number k of inner steps: the mean and variance of the population, by the law of total
    variance. Adaptation and the sets go by batch statistics meanwhile, in eval mode; support and query set count alike.
    "per_step" takes those of step k after k steps, and beyond the last those of the last (MAML++; Antoniou et al. 2019,
    arXiv 1810.09502, where they are running averages of training); "running" takes their average over the steps. The
    statistics are not saved with the learner: measure them anew after loading or more training.

    episodes : training tasks, of which the first `batches` batches are used
    steps : inner steps to measure, as many as in training unless given
    Raises `InputError` where the model has no batch normalisation. Costs, for each task and step, a gradient and two
    forward passes; memory: one task's at a time, beyond the inner loop's.

    >>> import fewstep
    >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(1), torch.nn.Linear(1, 1))
    >>> learner = fewstep.maml(model, torch.nn.functional.mse_loss, lr=0.1, normalisation="batch")
    >>> x, y = torch.tensor([[[1.0], [3.0]], [[5.0], [7.0]]]), torch.zeros(2, 2, 1)
    >>> calibrate(learner, [fewstep.Task(support=(x, y), query=(x, y))], batches=1)
    >>> learner.statistics.mean_0[0], learner.statistics.var_0[0]     # 1 within the tasks, 4 between them
    (tensor([4.]), tensor([5.]))
    """
    steps = learner.steps if steps is None else steps
    if batches < 1 or steps < 0:
        raise InputError(
            f"calibration needs at least 1 batch of tasks and 0 inner steps, but {batches} and {steps} came"
        )
    policy, learner.normalisation = learner.normalisation, "batch"
    try:
        with torch.no_grad(), in_eval_mode(learner):
            points = [_Population() for _ in range(steps + 1)]
            for index in range(batches):
                _measure(learner, episodes[index], points)
    finally:
        learner.normalisation = policy
    average = _Population()
    for point in points:
        average.add_all(point)
    by_call = zip(*[point.moments() for point in [average, *points]], strict=True)
    learner.statistics.set(
        [(torch.stack([m for m, _ in pairs]), torch.stack([v for _, v in pairs])) for pairs in by_call]
    )


class _Population:
    """The sums of mean and of variance + mean^2 of every call, in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: list[list[Tensor]] = []
        self.dtypes: list[torch.dtype] = []

    def add(self, found: Moments) -> None:
        wide = [(mean.double(), variance.double()) for mean, variance in found]
        self._add([[mean, variance + mean.square()] for mean, variance in wide], 1)
        self.dtypes = [mean.dtype for mean, _ in found]

    def add_all(self, other: _Population) -> None:
        self._add(other.sums, other.count)
        self.dtypes = other.dtypes

    def _add(self, values: list[list[Tensor]], count: int) -> None:
        if not values:
            raise InputError("the model has no batch normalisation: there is nothing to calibrate")
        self.sums = self.sums or [[torch.zeros_like(part) for part in pair] for pair in values]
        if [own[0].shape for own in self.sums] != [new[0].shape for new in values]:
            raise InputError(
                f"the model called batch normalisation {len(values)} times on one set and {len(self.sums)} times on "
                "another, or with other channels; statistics of calls need the same calls for support and query set"
            )
        self.sums = [[a + b for a, b in zip(own, new, strict=True)] for own, new in zip(self.sums, values, strict=True)]
        self.count += count

    def moments(self) -> Moments:
        """(mean, variance) of each call, in the type that it was measured in."""
        found = []
        for (first, second), dtype in zip(self.sums, self.dtypes, strict=True):
            mean = first / self.count
            found.append((mean.to(dtype), (second / self.count - mean.square()).clamp(min=0).to(dtype)))
        return found


def _measure(learner: Learner, tasks: Task, points: list[_Population]) -> None:
    with learner.checked(tasks):
        for step, theta in enumerate(learner.inner_loop(tasks.support, len(points) - 1)):
            support = at_step(tasks.support, step, learner.stream, axis=1)
            for task in range(tasks.size):
                own = learner.of_task(theta, task)
                points[step].add(_seen(learner, own, support, task, Place(step, query=False)))
                points[step].add(_seen(learner, own, tasks.query, task, Place(step, query=True)))


def _seen(learner: Learner, theta: Tensors, batch: Batch, task: int, place: Place) -> Moments:
    """Mean and variance of each batch norm of one task's set."""
    everything = {**learner.objective.shared_at(place), **theta}
    with observed() as found:
        learner.objective(everything, map_tensors(lambda leaf: leaf[task], batch), query=place.query)
    return found
