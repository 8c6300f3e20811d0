"""iMAML: meta-learning with implicit gradients (Rajeswaran et al. 2019, arXiv 1909.04630)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fewstep.errors import InputError
from fewstep.functional import Loss, Place, tensors_by_name
from fewstep.implicit import Solve, Solver, implicit
from fewstep.learner import Learner
from fewstep.task import Task, at_step
from fewstep.updates import SGD, Proximal


class ImplicitGradient:
    """The query loss [B] at the end of the inner loop, which counts as a minimum: an outer objective.

    residual : after a backward pass, the relative residual [B] of each task's solve; None before
    """

    def __init__(self, solve: Solve) -> None:
        self.solve = solve

    @property
    def residual(self) -> Tensor | None:
        return self.solve.found.get("residual")

    def __call__(self, learner: Learner, tasks: Task) -> Tensor:
        steps = learner.steps
        path = learner.inner_loop(tasks.support, steps)
        theta = start = next(path)
        with torch.no_grad():
            for theta in path:  # noqa: B007
                pass
        if learner.order == "none":
            theta = {name: value + (start[name] - start[name].detach()) for name, value in theta.items()}
        elif steps:
            support = at_step(tasks.support, steps - 1, learner.stream, axis=1)
            problem, tensors = learner.problem(theta, support, Place(steps - 1, query=False))
            theta = tensors_by_name(list(theta), implicit(self.solve, problem, list(start.values()), tensors))
        return learner.query_loss(theta, steps, tasks)


def imaml(model: nn.Module, loss: Loss, *, lr: float, steps: int = 1, strength: float = 2.0, solver: Solver = "cg",
          iterations: int = 5, **options: Any) -> Learner:  # fmt: skip
    """Adaptation that stays near its start, differentiated at its end instead of through its steps.

        theta_i' ~ argmin  L_i(theta; support) + lambda/2 |theta - theta_0|^2,  by `steps` of gradient descent
        d theta_i' / d theta_0 = (I + H_i / lambda)^-1,  H_i the Hessian of L_i at theta_i'

    Derivatives: second order, exact where the inner loop has converged and the solve is exact, with an error otherwise;
    `derivative="none"` takes the identity for the inverse. Gradient evaluations per task: steps + 1, and
    iterations + 1 Hessian-vector products, whatever the steps. Memory: one set of parameters per task, and four more
    for the solve. Meta-learned: the start and all shared parameters, these by the mixed derivative at theta_i'.

    After a backward pass `learner.outer.residual` has the relative residual [B] of the solve; see it fall with
    `iterations`. Where the Hessian has eigenvalues below -lambda there is no minimum to speak of, and it does not.

    lr : of the inner steps on the proximal loss
    steps : as many as bring it near its minimum, so rather 10 to 20
    strength : lambda, above 0; the authors have 2.0 for Omniglot
    lr * strength has to stay below 2: from there on the inner loop diverges
    solver, iterations : "cg" or "neumann", see `fewstep.implicit.Solve`; the authors have 5 of conjugate gradient
    options : as for `fewstep.Learner`

    >>> from fewstep import Task
    >>> model = nn.Linear(1, 1, bias=False)                # L = w^2 and lambda = 2: w' = w / 2, found in one step
    >>> _ = nn.init.constant_(model.weight, 1.0)
    >>> x, y = torch.ones(1, 1, 1), torch.zeros(1, 1, 1)
    >>> learner = imaml(model, nn.functional.mse_loss, lr=0.25)
    >>> loss = learner(Task(support=(x, y), query=(x, y)))
    >>> loss.sum().backward()                              # 2 w' / (1 + 2 / 2)
    >>> loss.item(), model.weight.grad.item(), learner.outer.residual.item()
    (0.25, 0.5, 0.0)
    """
    outer = ImplicitGradient(Solve(strength, solver, iterations))
    if lr * strength >= 2:
        raise InputError(
            f"lr * strength is {lr * strength}: from 2 on the pull to the start alone makes each step overshoot "
            "further; lower lr, best to where it is below 1"
        )
    return Learner(model, loss, Proximal(SGD(lr), strength), steps=steps, outer=outer, **options)
