"""The learner: gradient descent on the support loss, differentiable, and the query loss after it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves

from fewstep.adapted import model_with
from fewstep.checks import check_examples, check_tasks, check_values, check_values_behind, guard
from fewstep.engine import Engine, Runner
from fewstep.engine_checks import check_engine, check_rule
from fewstep.errors import InputError
from fewstep.functional import Loss, Objective, Place, Tensors, tensors_by_name
from fewstep.gradient import inner_gradient, task_loss
from fewstep.long_loop import Memory, repeatable
from fewstep.normalisation import Policy
from fewstep.problem import Derivative, Problem
from fewstep.starts import Known, Start, first
from fewstep.task import Batch, Point, Task, at_step, map_tensors, one_task, quickly_flat, task_count
from fewstep.unrolled import Unrolled
from fewstep.updates import Update, evaluations
from fewstep.watch import Watch

T = TypeVar("T")


def last_step(learner: Learner, tasks: Task) -> Tensor:
    """The outer objective of the paper: the query loss after the last inner step (Algorithm 2, line 10)."""
    return learner.query_loss(last(learner.inner_loop(tasks.support, learner.steps)), learner.steps, tasks)


class Learner(nn.Module):
    """A model that adapts to a task by a few gradient steps, and that is trained to adapt well.

    model, loss : any module; `loss(prediction, target)` for `(x, y)` batches, `loss(model, batch)` for any other
    update : the rule of an inner step, see `fewstep.updates`
    steps : inner steps in training
    adapt : name patterns of the parameters that adapt; all others are shared by the tasks, and meta-learned too
    start : where adaptation starts, see `fewstep.starts`; None starts at the meta-parameters themselves
    derivative : of the inner gradient: "exact", "none" (first order) or "finite_difference" (Hessian-free)
    exact_from : before this `iteration`, which `train` and `MetaStep` count, the derivative is "none"
    outer : the outer objective, `losses [B] = outer(learner, tasks)`
    normalisation : by which statistics batch norm normalises, see `fewstep.normalisation`; may be set anew at any time
    inner_loss : the loss on the support set, where it is another one; may have parameters, as any loss
    per_step : name patterns of shared parameters that have a value of their own for each inner step in training
    stream : the support set is a sequence of batches [B, batches, ...], one for each inner step
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
        start: Start | None = None,
        derivative: Derivative = "exact",
        exact_from: int = 0,
        outer: Callable[[Any, Task], Tensor] = last_step,
        normalisation: Policy | None = None,
        inner_loss: Loss | None = None,
        per_step: str | Sequence[str] = (),
        stream: bool = False,
        engine: Engine | Literal["vmap", "loop"] = "vmap",
        segment: int | Literal["sqrt"] | None = None,
        offload: bool = False,
    ) -> None:
        super().__init__()
        if derivative not in get_args(Derivative):
            raise InputError(f"the derivative must be one of {get_args(Derivative)}, but {derivative!r} came")
        self.objective = Objective(model, loss, adapt, inner_loss=inner_loss, normalisation=normalisation)
        self.model, self.loss, self.inner_loss, self.update = model, loss, inner_loss, update
        self.statistics = self.objective.module.statistics
        self.start, self.outer, self.stream = start, outer, stream
        self.steps = _not_negative(steps)
        self.derivative: Derivative = derivative
        self.exact_from = exact_from
        self.iteration: int | None = None  # nobody has counted yet
        self.objective.give_each_step(per_step, max(steps, 1))
        self.per_step = nn.ParameterList(self.objective.per_step.values())
        self.memory = Memory(segment, offload)
        self.engine = engine

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("model", "loss", "inner_loss") and getattr(self, name, value) is not value:
            raise InputError(f"the learner was built on its {name}, and goes on with it; build another learner")
        super().__setattr__(name, value)

    @property
    def engine(self) -> Engine:
        """How the tasks are computed; may be set anew at any time."""
        return self.runner.engine

    @engine.setter
    def engine(self, engine: Engine | Literal["vmap", "loop"]) -> None:
        engine = engine if isinstance(engine, Engine) else Engine(method=engine)
        check_engine(engine, self)
        self.runner = Runner(engine)
        self._checked: Any = None
        self._watched = [self.update]  # in a list: a module would become a submodule, and part of the state_dict
        self._watch = Watch([self.objective.module, self.loss, self.inner_loss, self.update, self.start, self.outer])

    @property
    def unrollable(self) -> bool:
        """Whether a whole meta-step can be one function of each task, which `compile="step"` asks for."""
        plain = self.memory == Memory() and self.outer is last_step and not isinstance(self.start, nn.Module)
        return plain and self.derivative != "finite_difference"

    @property
    def normalisation(self) -> Policy | None:
        """By which statistics batch norm normalises."""
        return self.objective.normalisation

    @normalisation.setter
    def normalisation(self, policy: Policy | None) -> None:
        self.objective.normalisation = policy

    @property
    def order(self) -> Derivative:
        """The derivative at the present iteration."""
        return "none" if self.exact_from and self.counted < self.exact_from else self.derivative

    @property
    def counted(self) -> int:
        """The present iteration; `InputError` in training where nobody counts: what goes by it would never change."""
        if self.iteration is None and torch.is_grad_enabled():
            raise InputError("set learner.iteration before each meta-step: what it does depends on the number; "
                             "fewstep.train and fewstep.MetaStep set it by themselves")  # fmt: skip
        return self.iteration or 0

    def forward(self, tasks: Task) -> Tensor:
        """The outer objective [B] of each task: by default, the query loss after adaptation to its support set.

        It can be differentiated once, by every parameter of the learner (Finn et al. 2017, Algorithm 2, line 10).
        """
        with self.checked(tasks), self.objective.structure.one_call():
            loss = task_loss(*self.unrolled(tasks)) if self.engine.compile == "step" else self.outer(self, tasks)
        check_values_behind(loss, tasks)
        return loss

    def inner_loop(self, support: Batch, steps: int, theta: Tensors | None = None) -> Iterator[Tensors]:
        """The adapted parameters of each task at the start and after each step (Algorithm 2, lines 4-8).

        At the start they are `theta`, by default the meta-parameters; from then on they have a task axis [B, ...].
        """
        if theta is None:
            theta = first(self.start, self.objective, self.runner, at_step(support, 0, self.stream, axis=1))
        start = theta
        yield theta
        update = repeatable(self.update) if self.memory.segment else self.update

        def step(theta: Tensors, state: Any, number: int) -> tuple[Tensors, Any]:
            batch, place = at_step(support, number, self.stream, axis=1), Place(number, query=False)
            for _ in range(evaluations(self.update, number)):
                _, gradients = inner_gradient(*self.problem(theta, batch, place))  # line 6
                theta, state = update(theta, tensors_by_name(list(theta), gradients), state, number)  # line 7
                theta = self.objective.in_order(theta, start, len(gradients[0]))
            return theta, state

        def fixed() -> list[Tensor]:
            return [*self.parameters(), *self.buffers(), *tree_leaves(support)]

        yield from self.memory.walk(step, theta, steps, self.objective, fixed)

    def query_loss(self, theta: Tensors, step: int, tasks: Task) -> Tensor:
        """The query loss [B] at `theta`, which is that after `step` inner steps."""
        return task_loss(*self.query_problem(theta, step, tasks))

    def adapt(self, support: Batch, steps: int | None = None) -> nn.Module:
        """A copy of the model, adapted to one task. `support` has no task axis: `(x [K, ...], y [K])`.

        steps : inner steps, as many as in training unless given; may be more, or 0
        """
        support = one_task(support)
        task_count(support)
        check_examples(support, "support")
        steps = self._steps(steps)
        with torch.no_grad(), self.checked(Task(support, support)):
            theta = last(self.inner_loop(support, steps))
        if any(not torch.isfinite(value).all() for value in theta.values()):
            check_values(Task(support, support))
        shared = self.objective.shared_at(Place(steps, query=True))
        batch = map_tensors(lambda leaf: leaf[0], at_step(support, max(steps - 1, 0), self.stream, axis=1))
        return model_with(self.objective, {**shared, **self.of_task(theta, 0)}, batch)

    @torch.no_grad()
    def path(self, tasks: Task, steps: int | None = None, at: Collection[int] | None = None) -> list[Point]:
        """How each task's query set is answered before adaptation and after each of `steps` inner steps.

        at : the steps to answer after; by default all of 0, 1, ..., `steps`
        """
        points = []
        with self.checked(tasks):
            for step, theta in enumerate(self.inner_loop(tasks.support, self._steps(steps))):
                if at is not None and step not in at:
                    continue
                problem, tensors = self.query_problem(theta, step, tasks)
                loss, *prediction = problem.evaluate(tensors)
                check_values_behind(loss, tasks)
                points.append(Point(loss, prediction[0] if prediction else None))
        return points

    def query_problem(self, theta: Tensors, step: int, tasks: Task) -> tuple[Problem, list[Tensor]]:
        """The query loss at `theta`, and the tensors that it is a function of."""
        seen = at_step(tasks.support, max(step - 1, 0), self.stream, axis=1)
        return self.problem(theta, self.objective.query_of(Task(seen, tasks.query)), Place(step, query=True))

    def problem(self, theta: Tensors, batch: Batch, place: Place) -> tuple[Problem, list[Tensor]]:
        """The loss of `batch` at `theta`, and the tensors that it is a function of."""
        shared = self.objective.shared_at(place)
        leaves, form = tree_flatten(batch)
        problem = Problem(self.objective, self.runner, self.order, self.objective.is_stacked(theta), form, len(leaves),
                          query=place.query, keep=self.engine.keep and torch.is_grad_enabled())  # fmt: skip
        return problem, [*theta.values(), *shared.values(), *leaves]

    def unrolled(self, tasks: Task) -> tuple[Unrolled, list[Tensor]]:
        """The whole meta-step of each task as one function, and the tensors that it is a function of."""
        own = self.update.named_parameters() if isinstance(self.update, nn.Module) else ()
        rule = {f"update.{name}": value for name, value in own}
        names = [*self.objective.adapted, *self.objective.shared]
        leaves, form = tree_flatten(tasks)
        problem = Unrolled(self.objective, self.update, self.runner, self.steps, self.order == "none", [*names, *rule],
                           form, len(leaves), self.start, self.known(tasks), self.stream)  # fmt: skip
        return problem, [*self.objective.parameters(names), *rule.values(), *leaves]

    def known(self, tasks: Task) -> Known:
        """What the start has to know of all support sets together, such as the number of ways."""
        return None if self.start is None else self.start.known(at_step(tasks.support, 0, self.stream, axis=1))

    def of_task(self, theta: Tensors, task: int) -> Tensors:
        """The adapted parameters of one task, without a task axis."""
        return {name: value[task] for name, value in theta.items()} if self.objective.is_stacked(theta) else theta

    def checked(self, tasks: Task) -> AbstractContextManager[Any]:
        """A context for whatever computes with these tasks: `InputError` where that would fail or be wrong.

        What is compiled was checked when it was; as long as nothing has changed since, it is not checked again. The
        context gives what that goes by, the same object as long as it is equal.
        """
        if torch.is_inference_mode_enabled():
            raise InputError("a learner takes gradients, which torch.inference_mode() rules out; use torch.no_grad()")
        if self.engine.compile == "no" and not self.engine.graph:
            return self._checking(tasks)
        if self._watched[0] is not self.update:  # another rule: what was compiled has the old one in it
            self.engine = self.engine
        leaves, form = quickly_flat(tasks)
        forms = [(getattr(x, "shape", x), getattr(x, "dtype", x)) for x in leaves]
        moment = self._watch.values(), self.order, form, forms, torch.is_grad_enabled()
        if moment == self._checked:
            return nullcontext(self._checked)
        self.runner.enter(moment[0], self._watch.objects())
        return self._checking(tasks, moment)

    @contextmanager
    def _checking(self, tasks: Task, moment: Any = None) -> Iterator[Any]:
        check_tasks(tasks)
        check_engine(self.engine, self)  # the derivative may have been set since
        first = Task(at_step(tasks.support, 0, self.stream, axis=1), tasks.query)
        if self.engine.compile == "step" and torch.is_grad_enabled():
            check_rule(self)
        with guard(self.objective, first, self._of_one, lambda: self.known(tasks), self.engine,
                   exact=self.order == "exact", one_query=self.outer is last_step):  # fmt: skip
            yield moment
        self._checked = moment

    def __getstate__(self) -> dict[str, Any]:  # of a copy, which looks at its first tasks by itself
        return self.__dict__ | {"_checked": None}

    def _of_one(self, support: Batch) -> tuple[Tensors, Batch]:
        """All parameters at the start, and the batch itself, of one task whose first support batch is given."""
        names = [*self.objective.adapted, *self.objective.shared]
        own = tensors_by_name(names, [value.detach() for value in self.objective.parameters(names)])
        if self.start is not None:
            own |= self.start(self.objective, own, support, self.start.known(one_task(support)))
        return self.objective.at(Place(0, query=False), own), support

    def _steps(self, steps: int | None) -> int:
        return self.steps if steps is None else _not_negative(steps)


def _not_negative(steps: int) -> int:
    if not isinstance(steps, int) or steps < 0:
        raise InputError(f"the number of inner steps must be an integer of at least 0, but {steps!r} came")
    return steps


def last(items: Iterable[T]) -> T:
    """The last of several items; the others are let go of at once."""
    for item in items:  # noqa: B007
        pass
    return item
