"""The implicit derivative of a proximal minimum, as an operator with a backward pass of its own (iMAML).

theta* = argmin  L(theta, shared) + lambda/2 |theta - start|^2        where  dL/dtheta = -lambda (theta* - start)

forward : theta as it was found; how it was found leaves no trace
backward: v = (I + H / lambda)^-1 g  for each task, H the Hessian of L at theta, by Hessian-vector products
          the gradient by start is v, by shared tensors  -1/lambda * d<dL/dtheta, v>/dshared
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fewstep.errors import InputError
from fewstep.finite_difference import norms, scaled, two_sided
from fewstep.per_task import Gradients, at_positions, refuse_twice
from fewstep.problem import Problem
from fewstep.replay import Moment, no_saved_tensors_hooks

Solver = Literal["cg", "neumann"]
Vectors = list[Tensor]


@dataclass(frozen=True)
class Solve:
    """How (I + H / strength) v = g is solved, all tasks at once and each by itself.

    strength : lambda, above 0
    solver : "cg", conjugate gradient, for a positive definite I + H / lambda; "neumann", the series
        g - H/lambda g + (H/lambda)^2 g - ..., which converges where all |eigenvalues| of H are below lambda
    iterations : Hessian-vector products for it; one more is taken for the residual and the gradient by shared tensors
    found : holds, after a backward pass, the "residual" |g - (I + H / lambda) v| / |g| [B]

    >>> solve = Solve(strength=2.0, iterations=1)
    >>> v = solve.run(lambda v: [2 * part for part in v], [torch.ones(3, 5)])   # H = 2 I: v = g / (1 + 2 / 2)
    >>> v[0][0]
    tensor([0.5000, 0.5000, 0.5000, 0.5000, 0.5000])
    """

    strength: float
    solver: Solver = "cg"
    iterations: int = 5
    found: dict[str, Tensor] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if not 0 < self.strength < float("inf"):
            raise InputError(f"lambda, the strength of the pull, must be above 0 and finite, but {self.strength} came")
        if self.solver not in get_args(Solver):
            raise InputError(f"the solver must be one of {get_args(Solver)}, but {self.solver!r} came")
        if not isinstance(self.iterations, int) or self.iterations < 1:
            raise InputError(f"the solver needs at least 1 iteration, but {self.iterations!r} came")

    def run(self, hessian: Callable[[Vectors], Vectors], g: Vectors) -> Vectors:
        """v [B, ...] for g [B, ...], where `hessian` multiplies H of each task with such vectors."""
        if self.solver == "cg":
            return self._conjugate_gradient(hessian, g)
        v = g
        for _ in range(self.iterations):
            v = [a - b / self.strength for a, b in zip(g, hessian(v), strict=True)]
        return v

    def _conjugate_gradient(self, hessian: Callable[[Vectors], Vectors], g: Vectors) -> Vectors:
        v, r, p = [torch.zeros_like(part) for part in g], g, g
        squared = norms(r).square()
        for _ in range(self.iterations):
            moved = [a + b / self.strength for a, b in zip(p, hessian(p), strict=True)]
            step = _ratio(squared, _dots(p, moved))
            v = [a + scaled(step, b) for a, b in zip(v, p, strict=True)]
            r = [a - scaled(step, b) for a, b in zip(r, moved, strict=True)]
            before, squared = squared, norms(r).square()
            p = [a + scaled(_ratio(squared, before), b) for a, b in zip(r, p, strict=True)]
        return v

    def note(self, g: Vectors, v: Vectors, product: Vectors) -> None:
        """Remember the relative residual of each task; `product` is H v."""
        left = [a - b - c / self.strength for a, b, c in zip(g, v, product, strict=True)]
        self.found["residual"] = _ratio(norms(left), norms(g))


def implicit(solve: Solve, problem: Problem, start: Sequence[Tensor], tensors: Sequence[Tensor]) -> Vectors:
    """theta [B, ...], the first of `tensors`, as a function of `start` and of the problem's shared tensors.

    problem : L at theta, whose tensors are `tensors`;  start : [...] or [B, ...] each
    The result can be differentiated once, by Hessian-vector products of the problem's derivative.
    """
    return list(_Implicit.apply(solve, problem, *start, *tensors))  # type: ignore[no-untyped-call]


class _Implicit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, solve: Solve, problem: Problem, *inputs: Tensor) -> tuple[Tensor, ...]:
        count = len(problem.theta)
        start, tensors = inputs[:count], inputs[count:]
        ctx.about = solve, problem, problem.objective.structure.state(), Moment.now(tensors[-1].device)
        ctx.stacked = [part.dim() == theta.dim() for part, theta in zip(start, tensors, strict=False)]
        ctx.save_for_backward(*tensors)
        return tuple(tensor.detach() for tensor in tensors[:count])

    @staticmethod
    @no_saved_tensors_hooks()
    def backward(ctx: Any, *g: Tensor) -> Gradients:
        refuse_twice()
        solve, problem, modes, moment = ctx.about
        tensors, theta = ctx.saved_tensors, problem.theta
        problem.objective.structure.check_state(modes)
        needed = ctx.needs_input_grad[2 + len(theta) :]
        others = tuple(i for i in range(len(theta), len(tensors)) if needed[i])

        def hessian(v: Vectors) -> Vectors:
            return _product(problem, tensors, theta, v, moment)

        v = solve.run(hessian, list(g))
        last = _product(problem, tensors, (*theta, *others), v, moment)
        solve.note(list(g), v, last[: len(theta)])
        by_start = [part if has else part.sum(0) for part, has in zip(v, ctx.stacked, strict=True)]
        mixed = [-part / solve.strength for part in last[len(theta) :]]
        return (None, None, *by_start, *at_positions(others, mixed, len(tensors)))


def _product(problem: Problem, tensors: Sequence[Tensor], wanted: tuple[int, ...], v: Vectors,
             moment: Moment) -> Vectors:  # fmt: skip
    """d<dL/dtheta, v>/d(wanted): of each task, or summed over the tasks for tensors that have no task axis."""
    if problem.derivative == "finite_difference":
        slope = two_sided(problem, tensors, problem.theta, v, wanted, moment)[1][1:]
        return [part if problem.task_axis[i] else part.sum(0) for i, part in zip(wanted, slope, strict=True)]
    with moment.again():
        zero = tensors[0].new_zeros(tensors[-1].shape[0])
        return problem.product(tensors, problem.theta, wanted, zero, v, per_task=False)[1:]


def _dots(left: Vectors, right: Vectors) -> Tensor:
    """The inner product [B] of each task's tensors."""
    parts = [(a * b).reshape(len(a), -1).sum(1) for a, b in zip(left, right, strict=True)]
    return torch.stack(parts).sum(0)


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """above / below, and 0 where below is 0: a task that is solved stays as it is."""
    return torch.where(below == 0, 0.0, above / torch.where(below == 0, 1.0, below))
