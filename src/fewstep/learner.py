"""The learner: gradient descent on the support loss, differentiable, and the query loss after it."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, NamedTuple, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves

from fewstep.checks import check_examples, check_tasks, check_values, check_values_behind, guard
from fewstep.engine import Engine, Runner
from fewstep.errors import DivergenceError, InputError
from fewstep.functional import Loss, Objective, Tensors, tensors_by_name
from fewstep.gradient import inner_gradient, task_loss
from fewstep.long_loop import Memory, repeatable
from fewstep.problem import Derivative, Problem
from fewstep.task import Batch, Task, one_task, quickly_flat, task_count
from fewstep.unrolled import Unrolled
from fewstep.updates import Update
from fewstep.watch import Watch

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
    engine : "vmap" batches the tasks; "loop" takes one by one, for models without batching rules such as RNNs; an
        `Engine` says more: tasks at a time, compilation, precision; `fewstep.plan` finds the fastest
    segment, offload : for long inner loops, what of each step is kept and where, see `fewstep.long_loop.Memory`
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
        engine: Engine | Literal["vmap", "loop"] = "vmap",
        segment: int | Literal["sqrt"] | None = None,
        offload: bool = False,
    ) -> None:
        super().__init__()
        if derivative not in get_args(Derivative):
            raise InputError(f"the derivative must be one of {get_args(Derivative)}, but {derivative!r} came")
        self.objective = Objective(model, loss, adapt)
        self.model, self.loss, self.update = model, loss, update
        self.steps = _not_negative(steps)
        self.derivative: Derivative = derivative
        self.memory = Memory(segment, offload)
        self.engine = engine if isinstance(engine, Engine) else Engine(method=engine)

    @property
    def engine(self) -> Engine:
        """How the tasks are computed; may be set anew at any time."""
        return self.runner.engine

    @engine.setter
    def engine(self, engine: Engine) -> None:
        self._check_engine(engine)
        self.runner = Runner(engine)
        self._checked: Any = None
        self._watched = self.update
        self._watch = Watch([self.objective.module, self.loss, self.update])

    def _check_engine(self, engine: Engine) -> None:
        whole = engine.compile == "step"
        if whole and (self.derivative == "finite_difference" or self.memory != Memory()):
            raise InputError("finite differences, segment and offload work step by step: use compile='pieces'")
        if engine.precision != "full" and self.derivative == "finite_difference":
            raise InputError("finite differences of bfloat16 are noise; use another derivative or precision='full'")

    def forward(self, tasks: Task) -> Tensor:
        """The query loss [B] of each task after adaptation to its support set.

        It can be differentiated once, by every parameter of the learner (Finn et al. 2017, Algorithm 2, line 10).
        """
        with self.checked(tasks):
            if self.engine.compile == "step":
                loss = task_loss(*self.unrolled(tasks))
            else:
                theta = _last(self.inner_loop(tasks.support, self.steps))
                loss = task_loss(*self._problem(theta, tasks.query))
        check_values_behind(loss, tasks)
        return loss

    def inner_loop(self, support: Batch, steps: int) -> Iterator[Tensors]:
        """The adapted parameters of each task at the start and after each step (Algorithm 2, lines 4-8).

        At the start they are the meta-parameters themselves; from then on they have a task axis [B, ...].
        """
        theta = tensors_by_name(self.objective.adapted, self.objective.parameters(self.objective.adapted))
        yield theta
        update = repeatable(self.update) if self.memory.segment else self.update

        def step(theta: Tensors, state: Any, number: int) -> tuple[Tensors, Any]:
            _, gradients = inner_gradient(*self._problem(theta, support))  # line 6
            theta, state = update(theta, tensors_by_name(list(theta), gradients), state, number)  # line 7
            return self.objective.in_order(theta, len(gradients[0])), state

        def fixed() -> list[Tensor]:
            return [*self.parameters(), *self.buffers(), *tree_leaves(support)]

        yield from self.memory.walk(step, theta, steps, self.objective, fixed)

    def adapt(self, support: Batch, steps: int | None = None) -> nn.Module:
        """A copy of the model, adapted to one task. `support` has no task axis: `(x [K, ...], y [K])`.

        steps : inner steps, as many as in training unless given; may be more, or 0
        """
        support = one_task(support)
        task_count(support)
        check_examples(support, "support")
        with torch.no_grad(), self.checked(Task(support, support)):
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
        points = []
        with self.checked(tasks):
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
        problem = Problem(
            self.objective, self.runner, self.derivative, self.objective.is_stacked(theta), form, len(leaves)
        )
        return problem, [*theta.values(), *shared, *leaves]

    def unrolled(self, tasks: Task) -> tuple[Unrolled, list[Tensor]]:
        """The whole meta-step of each task as one function, and the tensors that it is a function of."""
        rule = {f"update.{name}": value for name, value in _parameters_of(self.update).items()}
        names = [*self.objective.adapted, *self.objective.shared]
        leaves, form = tree_flatten(tasks)
        problem = Unrolled(self.objective, self.update, self.runner, self.steps, self.derivative == "none",
                           [*names, *rule], form, len(leaves))  # fmt: skip
        return problem, [*self.objective.parameters(names), *rule.values(), *leaves]

    def of_task(self, theta: Tensors, task: int) -> Tensors:
        """The adapted parameters of one task, without a task axis."""
        return {name: value[task] for name, value in theta.items()} if self.objective.is_stacked(theta) else theta

    def checked(self, tasks: Task) -> AbstractContextManager[Any]:
        """A context for whatever computes with these tasks: `InputError` where that would fail or be wrong.

        What is compiled was checked when it was; as long as nothing has changed since, it is not checked again. The
        context gives what that goes by, the same object as long as it is equal.
        """
        if self.engine.compile == "no":
            return self._checking(tasks)
        if self._watched is not self.update:  # another rule: what was compiled has the old one in it
            self.engine = self.engine
        leaves, form = quickly_flat(tasks)
        forms = [(getattr(x, "shape", x), getattr(x, "dtype", x)) for x in leaves]
        moment = self._watch.values(), self.derivative, form, forms
        if moment == self._checked:
            return nullcontext(self._checked)
        self.runner.enter(moment[0], self._watch.objects())
        return self._checking(tasks, moment)

    @contextmanager
    def _checking(self, tasks: Task, moment: Any = None) -> Iterator[Any]:
        check_tasks(tasks)
        self._check_engine(self.engine)  # the derivative may have been set since
        exact, batched = self.derivative == "exact", self.engine.method == "vmap"
        with guard(self.objective, tasks, exact=exact, batched=batched):
            yield moment
        self._checked = moment

    def _steps(self, steps: int | None) -> int:
        return self.steps if steps is None else _not_negative(steps)


def _parameters_of(update: Update) -> Tensors:
    """The parameters that an update rule has of its own."""
    return dict(update.named_parameters()) if isinstance(update, nn.Module) else {}


def _not_negative(steps: int) -> int:
    if not isinstance(steps, int) or steps < 0:
        raise InputError(f"the number of inner steps must be an integer of at least 0, but {steps!r} came")
    return steps


def _last(items: Iterable[T]) -> T:
    """The last of several items; the others are let go of at once."""
    for item in items:  # noqa: B007
        pass
    return item
