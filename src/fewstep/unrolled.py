"""A whole meta-step of one task as one function: adaptation and the query loss after it.

Its gradient is taken at once, without recomputation: the fastest way where inner steps are few, at the price of
activations of every step, and of a compilation that grows with the steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import TreeSpec, tree_unflatten

from fewstep.engine import Function, Runner, value_and_gradient
from fewstep.functional import Objective, Place, Tensors, tensors_by_name
from fewstep.starts import Known, Start
from fewstep.task import Batch, Task, at_step
from fewstep.updates import Update, evaluations


@dataclass(frozen=True)
class Unrolled:
    """The query loss of one task as a function of its tensors: the learner's parameters by `names`, then the task's.

    rule : names of the update rule's own parameters, a part of `names`
    task, leaves : the form of a task, and how many tensors it has
    """

    objective: Objective
    update: Update
    runner: Runner
    steps: int
    first_order: bool
    names: Sequence[str]
    task: TreeSpec
    leaves: int
    start: Start | None = None
    known: Known = None
    stream: bool = False

    @property
    def task_axis(self) -> list[bool]:
        """Which tensors have a task axis."""
        return [False] * len(self.names) + [True] * self.leaves

    def loss(self, *tensors: Tensor) -> Tensor:
        """The query loss after adaptation, a scalar."""
        own = tensors_by_name(self.names, tensors[: len(self.names)])
        task: Task = tree_unflatten(tensors[len(self.names) :], self.task)
        rule = {name.removeprefix("update."): value for name, value in own.items() if name.startswith("update.")}
        shared = {name: own[name] for name in self.objective.shared}
        theta = {name: own[name] for name in self.objective.adapted}
        if self.start is not None:
            theta |= self.start(self.objective, {**shared, **theta}, at_step(task.support, 0, self.stream), self.known)
        alone, first, state = theta, theta, None
        for step in range(self.steps):
            here = self.objective.at(Place(step, query=False), shared)
            support = at_step(task.support, step, self.stream)
            for _ in range(evaluations(self.update, step)):
                gradient = {n: value.unsqueeze(0) for n, value in self._gradient(alone, here, support).items()}
                theta, state = self._updated(rule, theta, gradient, state, step)
                theta = self.objective.in_order(theta, first, 1)
                alone = {name: value.squeeze(0) for name, value in theta.items()}
        here = self.objective.at(Place(self.steps, query=True), shared)
        seen = at_step(task.support, max(self.steps - 1, 0), self.stream)
        return self._loss({**here, **alone}, self.objective.query_of(Task(seen, task.query)), query=True)

    @property
    def key(self) -> Any:
        """What tells this function from others of the same learner."""
        return ("unrolled", self.steps, self.first_order, *self.names, self.task, self.known)

    def gradient(self, tensors: Sequence[Tensor], wanted: tuple[int, ...], *, total: bool = False) -> list[Tensor]:
        """The loss [B] and its gradient by the tensors at `wanted`: of each task, or in total."""
        summed = [False, *[total] * len(wanted)]
        return self.runner.run((self.key, wanted), self._one_task(wanted), tensors, self.task_axis, summed, part="step")

    def over_tasks(self, tensors: Sequence[Tensor], wanted: tuple[int, ...]) -> tuple[Tensor, ...]:
        """The loss [B] and its total gradient, as a plain function that is part of a larger one."""
        summed = [False, *[True] * len(wanted)]
        return self.runner.over_tasks(self._one_task(wanted), tensors, self.task_axis, summed)

    def _one_task(self, wanted: tuple[int, ...]) -> Function:
        return lambda *tensors: value_and_gradient(self.runner.engine, self.loss, wanted, tensors)

    def _gradient(self, theta: Tensors, shared: Tensors, support: Batch) -> Tensors:
        everything = {**theta, **shared}
        if self.first_order:
            everything = {name: value.detach() for name, value in everything.items()}

        def loss(*values: Tensor) -> Tensor:  # of the shared ones too, by which plain autograd sees that it is nested
            return self._loss(tensors_by_name(list(everything), values), support, query=False)

        wanted = tuple(range(len(theta)))
        _, *gradient = value_and_gradient(self.runner.engine, loss, wanted, list(everything.values()))
        return tensors_by_name(list(theta), gradient)

    def _loss(self, tensors: Tensors, batch: Batch, *, query: bool) -> Tensor:
        with self.runner.engine.numerics(next(iter(tensors.values())).device):
            return self.objective(tensors, batch, query=query)

    def _updated(self, rule: Tensors, theta: Tensors, gradient: Tensors, state: Any, step: int) -> tuple[Tensors, Any]:
        if isinstance(self.update, nn.Module):
            result: tuple[Tensors, Any] = functional_call(self.update, rule, (theta, gradient, state, step))
            return result
        return self.update(theta, gradient, state, step)
