"""One task's loss as a function of a flat list of tensors, its derivatives, and what they give over all tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_unflatten

from fewstep.engine import Runner, dot, value_and_gradient
from fewstep.errors import InputError
from fewstep.functional import Objective, tensors_by_name
from fewstep.kept import Finish, in_two

Derivative = Literal["exact", "none", "finite_difference"]


@dataclass(frozen=True)
class Problem:
    """The loss of one task as a function of its tensors: the adapted ones, the shared ones, then the batch's.

    stacked : whether the adapted tensors have a task axis; at the start of adaptation they have none
    all_stacked : whether the shared ones have one too
    batch, leaves : the form of a batch, and how many tensors it has
    query : whether it is the query set's loss, else the support set's
    keep : whether its derivative will be wanted, and takes what the engine keeps for it
    """

    objective: Objective
    runner: Runner
    derivative: Derivative
    stacked: bool
    batch: TreeSpec
    leaves: int
    all_stacked: bool = False
    query: bool = True
    keep: bool = False

    @property
    def theta(self) -> tuple[int, ...]:
        """The positions of the adapted tensors."""
        return tuple(range(len(self.objective.adapted)))

    @property
    def length(self) -> int:
        """How many tensors there are in all."""
        return len(self.objective.adapted) + len(self.objective.shared) + self.leaves

    @property
    def task_axis(self) -> list[bool]:
        """Which tensors have a task axis."""
        adapted, shared = len(self.objective.adapted), len(self.objective.shared)
        return [self.stacked or self.all_stacked] * adapted + [self.all_stacked] * shared + [True] * self.leaves

    # What one task contributes, without a task axis.

    def loss(self, *tensors: Tensor) -> Tensor:
        """L, a scalar."""
        return self.outputs(*tensors)[0]

    def value_and_gradient(self, wanted: tuple[int, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        """L and dL/d(wanted)."""
        return value_and_gradient(self.runner.engine, self.loss, wanted, tensors)

    def directional(self, along: tuple[int, ...], wanted: tuple[int, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        """D = c L + <dL/d(along), u>  and dD/d(wanted); `tensors` end with c and u, and `wanted` may name those too."""
        if self.runner.engine.product == "forward":
            point, c, u = tensors[: self.length], tensors[self.length], tensors[self.length + 1 :]
            return self._forward_over_reverse(along, wanted, point, c, u)

        def derivative(*inner: Tensor) -> Tensor:
            point, c, u = inner[: self.length], inner[self.length], inner[self.length + 1 :]
            grads, value = self.runner.engine.differentiate(self.loss, along)(*point)
            return c * value + dot(grads, u)

        grads, value = self.runner.engine.differentiate(derivative, wanted)(*tensors)
        return (value, *grads)

    def _forward_over_reverse(self, along: tuple[int, ...], wanted: tuple[int, ...], point: Sequence[Tensor],
                              c: Tensor, u: Sequence[Tensor]) -> tuple[Tensor, ...]:  # fmt: skip
        """D and dD/d(wanted) as the derivative along u of L and its gradient: the Hessian is symmetric."""

        def first(*moved: Tensor) -> tuple[Tensor, ...]:
            tensors = list(point)
            for i, value in zip(along, moved, strict=True):
                tensors[i] = value
            return self.value_and_gradient(wanted, *tensors)

        try:
            values, slopes, *_ = torch.func.jvp(first, tuple(point[i] for i in along), tuple(u))
        except RuntimeError as error:  # some operators have none, some fail under vmap
            reason = str(error).splitlines()[0]
            raise InputError(
                f"an operator of the loss fails in forward mode ({reason}); use product='reverse'"
            ) from error
        return tuple(c * value + slope for value, slope in zip(values, slopes, strict=True))

    def outputs(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """L, and the prediction where there is one."""
        names = [*self.objective.adapted, *self.objective.shared]
        batch = tree_unflatten(tensors[len(names) :], self.batch)
        with self.runner.engine.numerics(tensors[-1].device):
            named = tensors_by_name(names, tensors[: len(names)])
            loss, prediction = self.objective.outputs(named, batch, query=self.query)
        return (loss, prediction) if isinstance(prediction, Tensor) else (loss,)

    # The same over all tasks. The loss comes back as [B].

    def gradient(self, tensors: Sequence[Tensor], wanted: tuple[int, ...]) -> list[Tensor]:
        """L [B] and dL/d(wanted) of each task [B, ...]."""
        key = ("gradient", wanted, self.batch, self.query)
        function = partial(self.value_and_gradient, wanted)
        return self.runner.run(key, function, *self._spread(tensors))

    def in_two(self, tensors: Sequence[Tensor], wanted: tuple[int, ...]) -> tuple[list[Tensor], Finish] | None:
        """L [B] and dL/dtheta [B, ...], and what gives dD/d(wanted) for c [B] and u like those, once, as `product`.

        The first are dD/dc and dD/du, which depend on neither c nor u. None without compilation.
        """
        spread, axis = self._spread(tensors)
        late = range(self.length, self.length + 1 + len(self.theta))

        def function(*inputs: Tensor) -> tuple[Tensor, ...]:
            return self.directional(self.theta, (*late, *wanted), *inputs)[1:]

        key = ("in two", wanted, self.batch, self.query)
        both = in_two(self.runner, key, function, spread, axis, len(late), [not axis[i] for i in wanted])
        if both is None:
            return None
        early, finish = both
        return early, lambda again, late: self._over_start(wanted, finish(self._with_axis(again, axis), late), axis)

    def evaluate(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """L [B] and the predictions [B, ...], where there are any."""
        return self.runner.run(("outputs", self.batch, self.query), self.outputs, tensors, self.task_axis)

    def product(self, tensors: Sequence[Tensor], along: tuple[int, ...], wanted: tuple[int, ...], c: Tensor,
                u: Sequence[Tensor], *, per_task: bool) -> list[Tensor]:  # fmt: skip
        """D [B] and dD/d(wanted): of each task, or summed over the tasks for tensors that have no task axis.

        c [B];  u like the tensors at `along`, with or without a task axis.
        """
        axis = self.task_axis
        u_axis = [part.dim() > tensors[i].dim() or axis[i] for i, part in zip(along, u, strict=True)]
        spread, spread_axis = self._spread(tensors)
        value, *slopes = self.runner.run(
            ("product", along, wanted, self.batch, self.query), partial(self.directional, along, wanted),
            [*spread, c, *u], [*spread_axis, True, *u_axis],
            [False, *(not (per_task or spread_axis[i]) for i in wanted)],
        )  # fmt: skip
        return [value, *(slopes if per_task else self._over_start(wanted, slopes, spread_axis))]

    def _over_start(self, wanted: tuple[int, ...], slopes: Sequence[Tensor], axis: Sequence[bool]) -> list[Tensor]:
        """The slopes summed over the tasks where only `_spread` gave the tensor a task axis."""
        spread = [axis[i] and not self.task_axis[i] for i in wanted]
        return [slope.sum(0) if is_spread else slope for slope, is_spread in zip(slopes, spread, strict=True)]

    def _spread(self, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], list[bool]]:
        """The tensors, and which have a task axis. For compiled pieces theta has one at the start too: fewer pieces."""
        axis, adapted = self.task_axis, len(self.theta)
        if self.runner.engine.compile != "pieces" or axis[0]:
            return tensors, axis
        axis = [True] * adapted + axis[adapted:]
        return self._with_axis(tensors, axis), axis

    def _with_axis(self, tensors: Sequence[Tensor], axis: Sequence[bool]) -> list[Tensor]:
        """The tensors, expanded where they are to have a task axis and have none."""
        count = tensors[-1].shape[0]
        added = [after and not before for after, before in zip(axis, self.task_axis, strict=True)]
        return [t.expand(count, *t.shape) if is_new else t for t, is_new in zip(tensors, added, strict=True)]
