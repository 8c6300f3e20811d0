"""Metric learners: a task's queries are classified by their distance to its support examples; no gradient steps."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Collection

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional

from fewstep.checks import check_examples, check_tasks, check_values_behind
from fewstep.engine import Engine
from fewstep.errors import InputError
from fewstep.labels import check_query, ways_of
from fewstep.normalisation import Policy, Statistics, batch_norms, normalised
from fewstep.task import Batch, Point, Task, one_task, task_count


class MetricLearner(nn.Module, ABC):
    """Embeds support and query set and classifies in the space of the features.

        logits = classify(embed(support x), support y, embed(query x)),   loss = cross-entropy(logits, query y)

    It goes where a `Learner` goes: `MetaStep`, `train` and `evaluate`. Tasks are batched by vmap: the two sets of each
    task are embedded apart from each other and from all other tasks, so that batch statistics are each set's own, as
    in a `Learner`. A task may have any number of ways, read off its support labels; the tasks of a batch share it.
    Raises `InputError` unless labels are integers 0..ways-1 and each task's support set has an example of each class.

    embed : x [examples, ...] -> features [examples, F]; more axes are flattened
    """

    def __init__(self, embed: nn.Module) -> None:
        super().__init__()
        if not isinstance(embed, nn.Module):
            raise InputError(f"the embedding must be a torch.nn.Module, but a {type(embed).__name__} came")
        self.embed = embed
        self._normalisation: Policy | None = None
        self.iteration: int | None = None  # is counted as a learner's; nothing depends on it

    @abstractmethod
    def classify(self, support: Tensor, y: Tensor, query: Tensor, ways: int) -> Tensor:
        """One task: support [N*K, F], y [N*K] (int64), query [Q, F] -> logits [Q, ways]."""

    @property
    def engine(self) -> Engine:
        """How the tasks are computed: in the one way there is, all at once by vmap."""
        return Engine()

    @engine.setter
    def engine(self, engine: Engine) -> None:
        if engine != Engine():
            raise InputError(f"a metric learner has one way to compute, Engine(), but Engine '{engine}' came")

    @property
    def normalisation(self) -> Policy | None:
        """By which statistics batch norm normalises: as the layers do by themselves, or "batch", each set's own."""
        return self._normalisation

    @normalisation.setter
    def normalisation(self, policy: Policy | None) -> None:
        if policy not in (None, "batch"):
            raise InputError(f"a metric learner normalises by None or 'batch', but {policy!r} came")
        self._normalisation = policy

    def forward(self, tasks: Task) -> Tensor:
        """The query loss [B] of each task. It can be differentiated by every parameter."""
        return self._point(tasks).loss

    @torch.no_grad()
    def path(self, tasks: Task, steps: int = 0, at: Collection[int] | None = None) -> list[Point]:
        """How each task's query set is answered: each time the same, since no gradient steps are taken."""
        _check_steps(steps)
        return [self._point(tasks)] * (steps + 1 if at is None else len(at))

    @torch.no_grad()
    def adapt(self, support: Batch, steps: int | None = None) -> nn.Module:
        """A classifier of one task, x [Q, ...] -> logits [Q, ways], with a copy of the embedding.

        support : `(x [N*K, ...], y [N*K])`, without a task axis
        steps : changes nothing, since no gradient steps are taken
        """
        _check_steps(steps or 0)
        support = one_task(support)
        task_count(support)
        check_examples(support, "support")
        ways = ways_of(support)
        _check_running_statistics(self)
        frozen = {id(value): value for value in self.parameters() if not value.requires_grad}
        x, y = support
        return _Classifier(copy.deepcopy(self, memo=frozen), self.features(x[0]), y[0].long(), ways)

    def features(self, x: Tensor) -> Tensor:
        """x [examples, ...] -> [examples, F]"""
        with normalised(self.normalisation, Statistics(), batch_norms(self.embed)):
            out = self.embed(x)
        if not isinstance(out, Tensor) or out.dim() < 2 or out.shape[0] != x.shape[0]:
            came = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise InputError(f"the embedding must give [examples, features], but gave {came} for x {tuple(x.shape)}")
        return out.flatten(1)

    def _point(self, tasks: Task) -> Point:
        check_tasks(tasks)
        ways = ways_of(tasks.support)
        check_query(tasks.query, ways)
        (support, y), (query, target) = tasks
        _check_running_statistics(self)

        def one(support: Tensor, y: Tensor, query: Tensor) -> Tensor:
            return self.classify(self.features(support), y, self.features(query), ways)

        logits = vmap(one, randomness="different")(support, y.long(), query)
        each = functional.cross_entropy(logits.flatten(0, 1), target.long().flatten(), reduction="none")
        loss = each.view(target.shape).mean(1)
        check_values_behind(loss, tasks)
        return Point(loss, logits)


class _Classifier(nn.Module):
    """One task's classifier; it holds the features of the support set."""

    support: Tensor
    y: Tensor

    def __init__(self, learner: MetricLearner, support: Tensor, y: Tensor, ways: int) -> None:
        super().__init__()
        self.learner, self.ways = learner, ways
        self.register_buffer("support", support)
        self.register_buffer("y", y)

    def forward(self, x: Tensor) -> Tensor:
        return self.learner.classify(self.support, self.y, self.learner.features(x), self.ways)


def _check_steps(steps: int) -> None:
    if not isinstance(steps, int) or steps < 0:
        raise InputError(f"the number of steps must be an integer of at least 0, but {steps!r} came")


def _check_running_statistics(learner: MetricLearner) -> None:
    if learner.normalisation is not None:
        return
    for name, module in learner.embed.named_modules():
        if module.training and getattr(module, "running_mean", None) is not None:
            raise InputError(
                f"{type(module).__name__} '{name}' keeps running statistics, which would mix the tasks; call "
                "fewstep.use_batch_statistics(embed), set the learner's normalisation to 'batch', or put it in eval "
                "mode to keep the statistics that it has"
            )
