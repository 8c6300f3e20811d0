"""The learner: gradient descent on the support loss, differentiable, and the query loss after it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from fewstep.checks import check_examples, check_tasks, check_values, check_values_behind, guard
from fewstep.engine import Engine
from fewstep.errors import DivergenceError, InputError
from fewstep.functional import Loss, Objective, Tensors, tensors_by_name
from fewstep.gradient import inner_gradient, task_loss
from fewstep.problem import Derivative, Problem
from fewstep.task import Batch, Task, one_task, task_count
from fewstep.updates import Update

T = TypeVar("T")


class Point(NamedTuple):
    """A task's query set seen from one step of adaptation.

    loss : [B];  prediction : [B, ...] where batches are `(x, y)`, else None
    """

    loss: Tensor
    prediction: Tensor | None


class Learner(nn.Module):
    """A model that adapts to a task by a few gradient steps, and that is trained to adapt well.

    model, loss : any module; `loss(prediction, target)` for `(x, y)` batches, `loss(model, batch)` for any other
    update : the rule of an inner step, see `fewstep.updates`
    steps : inner steps in training
    adapt : name patterns of the parameters that adapt; all others are shared by the tasks, and meta-learned too
    derivative : of the inner gradient: "exact", "none" (first order) or "finite_difference" (Hessian-free)
    engine : "vmap" batches the tasks; "loop" takes one by one, for models without batching rules such as RNNs
    chunk : tasks at a time under "vmap", None for all; fewer need less memory
    compile : compile the gradient and its derivative with torch.compile, each once whatever the number of steps
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        update: Update,
        *,
        steps: int,
        adapt: str | Sequence[str] = "*",
        derivative: Derivative = "exact",
        engine: Literal["vmap", "loop"] = "vmap",
        chunk: int | None = None,
        compile: bool = False,
    ) -> None:
        super().__init__()
        if derivative not in get_args(Derivative):
            raise InputError(f"the derivative must be one of {get_args(Derivative)}, but {derivative!r} came")
        self.objective = Objective(model, loss, adapt)
        self.model, self.loss, self.update = model, loss, update
        self.steps = _not_negative(steps)
        self.derivative: Derivative = derivative
        self.engine = Engine(engine, chunk, compile)

    def forward(self, tasks: Task) -> Tensor:
        """The query loss [B] of each task after adaptation to its support set.

        It can be differentiated once, by every parameter of the learner (Finn et al. 2017, Algorithm 2, line 10).
        """
        check_tasks(tasks)
        with self._guard(tasks):
            theta = _last(self.inner_loop(tasks.support, self.steps))
            loss = task_loss(*self._problem(theta, tasks.query))
        check_values_behind(loss, tasks)
        return loss

    def inner_loop(self, support: Batch, steps: int) -> Iterator[Tensors]:
        """The adapted parameters of each task at the start and after each step (Algorithm 2, lines 4-8).

        At the start they are the meta-parameters themselves; from then on they have a task axis [B, ...].
        """
        theta = tensors_by_name(self.objective.adapted, self.objective.parameters(self.objective.adapted))
        state = None
        yield theta
        for step in range(steps):
            _, gradients = inner_gradient(*self._problem(theta, support))  # line 6
            theta, state = self.update(theta, tensors_by_name(list(theta), gradients), state, step)  # line 7
            theta = self._in_order(theta, len(gradients[0]))
            yield theta

    def adapt(self, support: Batch, steps: int | None = None) -> nn.Module:
        """A copy of the model, adapted to one task. `support` has no task axis: `(x [K, ...], y [K])`.

        steps : inner steps, as many as in training unless given; may be more, or 0
        """
        support = one_task(support)
        task_count(support)
        check_examples(support, "support")
        with torch.no_grad(), self._guard(Task(support, support)):
            theta = _last(self.inner_loop(support, self._steps(steps)))
        trainable = {id(value) for value in self.objective.parameters([*theta, *self.objective.shared])}
        frozen = {id(value): value for value in self.model.parameters() if id(value) not in trainable}
        adapted = copy.deepcopy(self.model, memo=frozen)  # a frozen base is shared, not copied
        own = {f"model.{name}": value for name, value in adapted.named_parameters()}
        for name, value in self.of_task(theta, 0).items():
            if not torch.isfinite(value).all():
                check_values(Task(support, support))
                raise DivergenceError(f"'{name[6:]}' is not finite after adaptation; lower the inner learning rate")
            own[name].data = value.detach().clone()
        return adapted

    @torch.no_grad()
    def path(self, tasks: Task, steps: int | None = None) -> list[Point]:
        """How each task's query set is answered before adaptation and after each of `steps` inner steps."""
        check_tasks(tasks)
        points = []
        with self._guard(tasks):
            for theta in self.inner_loop(tasks.support, self._steps(steps)):
                problem, tensors = self._problem(theta, tasks.query)
                loss, *prediction = problem.evaluate(tensors)
                check_values_behind(loss, tasks)
                points.append(Point(loss, prediction[0] if prediction else None))
        return points

    def _problem(self, theta: Tensors, batch: Batch) -> tuple[Problem, list[Tensor]]:
        """The loss of `batch` at `theta`, and the tensors that it is a function of."""
        shared = self.objective.parameters(self.objective.shared)
        leaves, form = tree_flatten(batch)
        problem = Problem(self.objective, self.engine, self.derivative, self.is_stacked(theta), form, len(leaves))
        return problem, [*theta.values(), *shared, *leaves]

    def _in_order(self, theta: Tensors, count: int) -> Tensors:
        """What an update rule returned, each tensor with its task axis; `InputError` where names or shapes are off."""
        names = self.objective.adapted
        if set(theta) != set(names):
            raise InputError(f"the update rule must return the tensors {', '.join(names)}, but {', '.join(theta)} came")
        result = {}
        for name, own in zip(names, self.objective.parameters(names), strict=True):
            value = theta[name]
            if value.shape == own.shape:  # left alone at step 0
                value = value.expand(count, *own.shape)
            if value.shape != (count, *own.shape):
                came, expected = tuple(value.shape), (count, *own.shape)
                raise InputError(f"the update rule returned '{name}' with the shape {came} instead of {expected}")
            result[name] = value
        return result

    def is_stacked(self, theta: Tensors) -> bool:
        """Whether adapted parameters have a task axis: at the start of adaptation they have none."""
        name = self.objective.adapted[0]
        return theta[name].dim() > self.objective.parameters([name])[0].dim()

    def of_task(self, theta: Tensors, task: int) -> Tensors:
        """The adapted parameters of one task, without a task axis."""
        return {name: value[task] for name, value in theta.items()} if self.is_stacked(theta) else theta

    def _guard(self, tasks: Task) -> AbstractContextManager[None]:
        exact, batched = self.derivative == "exact", self.engine.method == "vmap"
        return guard(self.objective, tasks, exact=exact, batched=batched)

    def _steps(self, steps: int | None) -> int:
        return self.steps if steps is None else _not_negative(steps)


def _not_negative(steps: int) -> int:
    if not isinstance(steps, int) or steps < 0:
        raise InputError(f"the number of inner steps must be an integer of at least 0, but {steps!r} came")
    return steps


def _last(items: Iterable[T]) -> T:
    """The last of several items; the others are let go of at once."""
    for item in items:  # noqa: B007
        pass
    return item
