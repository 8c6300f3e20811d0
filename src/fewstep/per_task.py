"""Any function of one task as an operator over tasks: nothing of its graph is kept, and it is differentiable once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.engine import Function, Runner, dot
from fewstep.errors import InputError
from fewstep.replay import Moment, no_saved_tensors_hooks

Gradients = tuple[Tensor | None, ...]


def per_task(runner: Runner, key: Any, function: Function, tensors: Sequence[Tensor], axis: Sequence[bool],
             check: Callable[[], None]) -> list[Tensor]:  # fmt: skip
    """`function` of one task's tensors for every task, [B, ...] each; they can be differentiated once.

    axis : which tensors have a task axis;  key : as for `Runner.run`
    check : called before the function is computed again; raises where that would give something else
    """
    return list(_PerTask.apply(runner, key, function, tuple(axis), check, *tensors))  # type: ignore[no-untyped-call]


class _PerTask(torch.autograd.Function):
    """A function of each task; the backward pass computes it again."""

    @staticmethod
    @no_saved_tensors_hooks()
    def forward(ctx: Any, runner: Runner, key: Any, function: Function, axis: tuple[bool, ...],
                check: Callable[[], None], *tensors: Tensor) -> tuple[Tensor, ...]:  # fmt: skip
        ctx.about, ctx.moment = (runner, key, function, axis, check), Moment.now(tensors[-1].device)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        return tuple(runner.run(key, function, tensors, axis))

    @staticmethod
    @no_saved_tensors_hooks()
    def backward(ctx: Any, *v: Tensor) -> Gradients:
        refuse_twice()
        runner: Runner = ctx.about[0]
        key, function, axis, check = ctx.about[1:]
        check()
        tensors = ctx.saved_tensors
        wanted = tuple(i for i, needed in enumerate(ctx.needs_input_grad[5:]) if needed)

        def pulled(*inputs: Tensor) -> tuple[Tensor, ...]:
            point, cotangents = inputs[: len(tensors)], inputs[len(tensors) :]
            gradients, _ = runner.engine.differentiate(lambda *own: dot(function(*own), cotangents), wanted)(*point)
            return gradients

        with ctx.moment.again():
            grads = runner.run((key, "pulled", wanted), pulled, [*tensors, *v], [*axis, *[True] * len(v)],
                               [not axis[i] for i in wanted])  # fmt: skip
        return (None, None, None, None, None, *at_positions(wanted, grads, len(tensors)))

    @staticmethod
    @no_saved_tensors_hooks()
    def jvp(ctx: Any, *given: Tensor | None) -> tuple[Tensor, ...]:
        runner: Runner = ctx.about[0]
        function: Function = ctx.about[2]
        key, axis = ctx.about[1], ctx.about[3]
        tensors, tangents = ctx.saved_tensors, given[5:]
        moving = tuple(i for i, tangent in enumerate(tangents) if tangent is not None)
        u = [tangent.contiguous() for tangent in tangents if tangent is not None]

        def pushed(*inputs: Tensor) -> tuple[Tensor, ...]:
            point, directions = inputs[: len(tensors)], inputs[len(tensors) :]

            def moved(*own: Tensor) -> tuple[Tensor, ...]:
                full = list(point)
                for i, value in zip(moving, own, strict=True):
                    full[i] = value
                return function(*full)

            # The transpose of the transpose: forward mode does not nest, and this is called within it.
            values, pull, *_ = torch.func.vjp(moved, *(point[i] for i in moving))
            push = torch.func.vjp(lambda *v: pull(v), *map(torch.zeros_like, values))[1]
            result: tuple[Tensor, ...] = push(directions)
            return result

        with ctx.moment.again():
            return tuple(
                runner.run((key, "pushed", moving), pushed, [*tensors, *u], [*axis, *(axis[i] for i in moving)])
            )


def refuse_twice() -> None:
    """A backward pass with create_graph=True would go on without the derivatives that it is asked to keep."""
    if torch.is_grad_enabled():
        raise InputError("a meta-gradient can be differentiated once only; leave out create_graph=True")


def at_positions(positions: Sequence[int], values: Sequence[Tensor], length: int) -> Gradients:
    """A tuple of `length` with the values at their positions and None elsewhere."""
    found = dict(zip(positions, values, strict=True))
    return tuple(found.get(i) for i in range(length))
