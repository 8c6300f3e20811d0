"""The inner gradient as an operator with a derivative of its own, and the task loss as another.

    L, g = inner_gradient(theta, shared, batch)      the loss [B] and its gradients by theta [B, ...]
    forward : first-order gradients; nothing of their graph is kept, unless the engine says so
    backward: cotangents (c, v) -> the gradient of  c L + <dL/dtheta, v>,  recomputed by a Hessian-vector product
    jvp     : tangent u -> <dL, u>  and its gradient by theta (the Hessian is symmetric)

So a chain of inner steps stores the parameters of each step and no activations (MixFlow-MG, arXiv 2505.00793, found
this in JAX), and nothing ever differentiates a backward pass from outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fewstep.errors import InputError
from fewstep.finite_difference import scaled, two_sided
from fewstep.per_task import Gradients, at_positions, refuse_twice
from fewstep.problem import Problem
from fewstep.replay import Moment, no_saved_tensors_hooks
from fewstep.unrolled import Unrolled


def inner_gradient(problem: Problem, tensors: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The loss [B] and its gradients by the adapted tensors [B, ...]; both can be differentiated once.

    With the derivative "none" they are constants, of which nothing is kept.
    """
    if problem.derivative == "none":
        tensors = [tensor.detach() for tensor in tensors]
    loss, *gradients = _InnerGradient.apply(problem, *tensors)  # type: ignore[no-untyped-call]
    return loss, gradients


def task_loss(problem: Problem | Unrolled, tensors: Sequence[Tensor]) -> Tensor:
    """The loss [B] of each task; it can be differentiated once."""
    loss: Tensor = _TaskLoss.apply(problem, *tensors)  # type: ignore[no-untyped-call]
    return loss


class _InnerGradient(torch.autograd.Function):
    @staticmethod
    @no_saved_tensors_hooks()
    def forward(ctx: Any, problem: Problem, *tensors: Tensor) -> tuple[Tensor, ...]:
        moment, ctx.problem, ctx.state = Moment.now(tensors[-1].device), problem, problem.objective.structure.state()
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)
        ctx.wanted = tuple(i for i, needed in enumerate(ctx.needs_input_grad[1:]) if needed)
        keep = problem.keep and problem.derivative == "exact" and bool(ctx.wanted)
        both = problem.in_two(tensors, ctx.wanted) if keep else None
        moment = Moment.now(tensors[-1].device) if keep and both is None else moment  # it may have drawn numbers
        result, ctx.finish = both or (problem.gradient(tensors, problem.theta), None)
        ctx.moment = moment.of_use()
        return tuple(result)

    @staticmethod
    @no_saved_tensors_hooks()
    def backward(ctx: Any, c: Tensor | None, *v: Tensor | None) -> Gradients:
        refuse_twice()
        problem: Problem = ctx.problem
        moment, tensors = ctx.moment, ctx.saved_tensors
        if c is None and all(part is None for part in v):
            return (None,) * (1 + len(tensors))
        problem.objective.structure.check_state(ctx.state)
        wanted, count = ctx.wanted, tensors[-1].shape[0]
        c = tensors[0].new_zeros(count) if c is None else c
        along = tuple(i for i, part in enumerate(v) if part is not None)
        u = [part for part in v if part is not None]
        if ctx.finish is not None:
            finish, ctx.finish = ctx.finish, None  # a second backward pass computes all again
            theta = [t if problem.stacked else t.expand(count, *t.shape) for t in tensors[: len(v)]]
            full = [torch.zeros_like(t) if part is None else part for t, part in zip(theta, v, strict=True)]
            grads = finish(tensors, [c.to(theta[0].dtype), *full])
        elif problem.derivative == "exact":
            try:
                with moment.again():
                    _, *grads = problem.product(tensors, along, wanted, c, u, per_task=False)
            except RuntimeError as error:
                if "is not implemented" not in str(error):
                    raise
                raise InputError(
                    f"an operator of the model has no second derivative ({str(error).splitlines()[0]}); use the "
                    "derivative 'finite_difference', or for attention the backend SDPBackend.MATH, or for recurrent "
                    "nets on a GPU torch.backends.cudnn.flags(enabled=False)"
                ) from error
        else:
            mean, slope = two_sided(problem, tensors, along, u, wanted, moment)
            each = [scaled(c, m) + s for m, s in zip(mean[1:], slope[1:], strict=True)]
            grads = [part if problem.task_axis[i] else part.sum(0) for i, part in zip(wanted, each, strict=True)]
        return (None, *at_positions(wanted, grads, len(tensors)))

    @staticmethod
    @no_saved_tensors_hooks()
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> tuple[Tensor, ...]:
        problem: Problem = ctx.problem
        moment, tensors = ctx.moment, ctx.saved_tensors
        moving = tuple(i for i, tangent in enumerate(tangents) if tangent is not None)
        u = [tangent.contiguous() for tangent in tangents if tangent is not None]
        if problem.derivative == "exact":
            with moment.again():
                zero = tensors[0].new_zeros(tensors[-1].shape[0])
                return tuple(problem.product(tensors, moving, problem.theta, zero, u, per_task=True))
        _mean, slope = two_sided(problem, tensors, moving, u, problem.theta, moment)
        return tuple(slope)


class _TaskLoss(torch.autograd.Function):
    """The forward pass takes value and gradient together; the backward pass scales the stored gradient."""

    @staticmethod
    @no_saved_tensors_hooks()
    def forward(ctx: Any, problem: Problem | Unrolled, *tensors: Tensor) -> Tensor:
        ctx.problem, ctx.count = problem, len(tensors)
        ctx.wanted = tuple(i for i, needed in enumerate(ctx.needs_input_grad[1:]) if needed)
        ctx.set_materialize_grads(False)
        loss, *gradients = problem.gradient(tensors, ctx.wanted)
        ctx.save_for_backward(*gradients)
        ctx.save_for_forward(*gradients)
        return loss

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> Gradients:
        refuse_twice()
        axis = ctx.problem.task_axis
        grads = [
            scaled(c, gradient) if axis[i] else torch.tensordot(c.to(gradient.dtype), gradient, dims=([0], [0]))
            for i, gradient in zip(ctx.wanted, ctx.saved_tensors, strict=True)
        ]
        return (None, *at_positions(ctx.wanted, grads, ctx.count))

    @staticmethod
    def jvp(ctx: Any, _: None, *tangents: Tensor | None) -> Tensor:
        if any(tangent is not None and i not in ctx.wanted for i, tangent in enumerate(tangents)):
            raise InputError("forward mode by an input of the query loss needs requires_grad=True on that input")
        slopes = [
            (gradient * tangent).reshape(len(gradient), -1).sum(1)
            for i, gradient in zip(ctx.wanted, ctx.saved_tensors, strict=True)
            if (tangent := tangents[i]) is not None
        ]
        return torch.stack(slopes).sum(0)
