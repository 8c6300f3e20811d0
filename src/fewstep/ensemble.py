"""Several learners that answer together."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from fewstep.errors import InputError
from fewstep.labels import ways_of
from fewstep.learner import Learner
from fewstep.normalisation import Policy
from fewstep.task import Point, Task


class Ensemble(nn.Module):
    """Answers by the mean of its learners' logits, each of which may adapt to the labels in several orders.

        logits_c = mean over learners and turns k = 0 .. permutations - 1 of  learner(labels + k mod N)_{c + k mod N}

    Checkpoints of one run are what MAML++ is judged by (Antoniou et al. 2019, their code: the five best validated);
    turned labels even out how the head's rows differ from each other (Ye and Chao 2022, arXiv 2106.16245).
    It goes where `evaluate` takes a learner. Its loss is the mean of the learners' losses.

    permutations : 1 takes the labels as they come, N all N turns
    """

    def __init__(self, learners: Sequence[Learner], permutations: int = 1) -> None:
        super().__init__()
        if not learners or permutations < 1:
            raise InputError(
                f"an ensemble needs at least 1 learner and 1 permutation, but {len(learners)} and {permutations} came"
            )
        self.learners = nn.ModuleList(learners)
        self.permutations = permutations

    @property
    def normalisation(self) -> Policy | None:
        """By which statistics batch norm normalises in the first of its learners."""
        return self.learners[0].normalisation  # type: ignore[return-value]

    @torch.no_grad()
    def path(self, tasks: Task, steps: int | None = None, at: Collection[int] | None = None) -> list[Point]:
        """As `Learner.path`."""
        paths = []
        for learner in self.learners:
            for turn in range(self.permutations):
                points = learner.path(_turned(tasks, turn), steps, at)  # type: ignore[operator]
                paths.append([_turned_back(point, turn, tasks) for point in points])
        return [_mean(points) for points in zip(*paths, strict=True)]


def _turned(tasks: Task, turn: int) -> Task:
    """The tasks with labels + turn, modulo the number of ways."""
    if not turn:
        return tasks
    ways = ways_of(tasks.support)
    if turn >= ways:
        raise InputError(f"{ways} ways have {ways} turns, but more permutations were asked for")
    (x, y), (query_x, query_y) = tasks
    return Task((x, (y + turn) % ways), (query_x, (query_y + turn) % ways))


def _turned_back(point: Point, turn: int, tasks: Task) -> Point:
    if not turn or point.prediction is None:
        return point
    if point.prediction.shape[-1] != (ways := ways_of(tasks.support)):
        raise InputError(
            f"labels of {ways} ways are turned, but the model has {point.prediction.shape[-1]} outputs; give it as many"
        )
    return Point(point.loss, point.prediction.roll(-turn, -1))


def _mean(points: Sequence[Point]) -> Point:
    predictions = [point.prediction for point in points if isinstance(point.prediction, Tensor)]
    loss = torch.stack([point.loss for point in points]).mean(0)
    return Point(loss, torch.stack(predictions).mean(0) if predictions else None)
