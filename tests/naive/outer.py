"""Methods with an outer objective of their own."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

from fewstep.functional import Tensors
from fewstep.models.layers import OffsetNorm
from fewstep.task import Task
from tests.naive.descent import maml
from tests.naive.given import Given, Truth, flat, leaves, same, shaped
from tests.naive.rules import Gradient, stepped
from tests.reference import descended, gradient, one_by_one


def imaml(given: Given, *, strength: float = 2.0, adapt: str = "*", iterations: int | None = None) -> Truth:
    """Rajeswaran et al. 2019, equation 7, at the point that the inner loop has reached, with dense Hessians.

    iterations : of conjugate gradient; None for the exact solution
    """
    names, values, objective = given.adapted(adapt), [], []
    for task in one_by_one(given.tasks):
        start = leaves(given.theta)

        def pulled(theta: Tensors, batch: Any, start: Tensors = start) -> Tensor:
            away = torch.stack([(theta[name] - start[name].detach()).square().sum() for name in names]).sum()
            return given.value(theta, batch) + strength / 2 * away

        theta = start
        for _step in range(given.steps):
            theta = leaves(descended(pulled, theta, names, task.support, given.lr, first_order=True))
        query = given.value(theta, task.query)
        g = dict(zip(theta, torch.autograd.grad(query, list(theta.values())), strict=True))
        inner = flat(gradient(given.value, theta, names, task.support))
        rows = torch.autograd.grad(inner, list(theta.values()), torch.eye(len(inner)), is_grads_batched=True)
        jacobian = {name: part.flatten(1) for name, part in zip(theta, rows, strict=True)}
        hessian = torch.cat([jacobian[name] for name in names], 1)
        v = solved(torch.eye(len(inner)) + hessian / strength, flat({name: g[name] for name in names}), iterations)
        by = {name: g[name] - (v @ jacobian[name]).reshape(g[name].shape) / strength for name in theta}
        by |= shaped(v, {name: theta[name] for name in names})
        objective.append(torch.stack([(by[name] * given.theta[name]).sum() for name in theta]).sum())
        values.append(query.detach())
    return Truth(torch.stack(values), torch.stack(objective))


def solved(a: Tensor, g: Tensor, iterations: int | None) -> Tensor:
    """a^-1 g, or what conjugate gradient has of it: v in span(g, a g, a^2 g, ...) with g - a v orthogonal to that."""
    basis = torch.eye(len(g)) if iterations is None else g[:, None] / g.norm()
    for _ in range((iterations or 1) - 1):
        basis = torch.linalg.qr(torch.cat([basis, a @ basis[:, -1:]], 1)).Q
    v: Tensor = basis @ torch.linalg.solve(basis.T @ a @ basis, basis.T @ g)
    return v


def bmg(given: Given, *, target_steps: int = 5, rate: float | None = None, adapt: str = "*") -> Truth:
    """Flennerhag et al. 2022, equation 2 with squared distance, to a target whose last step is on the query set."""
    names, value, rate = given.adapted(adapt), given.value, given.lr if rate is None else rate
    values, objective = [], []
    for task in one_by_one(given.tasks):
        theta = given.theta
        for _ in range(given.steps):
            theta = descended(value, theta, names, task.support, given.lr)
        target = leaves(theta)
        for _ in range(target_steps - 1):
            target = leaves(descended(value, target, names, task.support, given.lr))
        target = leaves(descended(value, target, names, task.query, rate))
        distance = torch.stack([(theta[n] - target[n].detach()).square().sum() for n in names]).sum() / (2 * rate)
        still = {name: part.detach() if name in names else part for name, part in theta.items()}
        shared = value(still, task.query) if len(names) < len(theta) else 0.0
        values.append(value(theta, task.query))
        objective.append(distance + shared)
    return Truth(torch.stack(values), torch.stack(objective))


def sharp_maml(given: Given, *, where: str = "both", inner_radius: float = 0.05, outer_radius: float = 0.05,
               ascent: str = "exact", adapt: str = "*") -> Truth:  # fmt: skip
    """Abbas et al. 2022, Algorithm 1: gradients at theta + rho g / |g|."""

    def step(theta: Tensors, grad: Gradient, number: int) -> Tensors:
        g = grad(theta)
        norm = flat(g).norm()
        g = grad({name: theta[name] + inner_radius * g[name] / norm for name in theta})
        return {name: theta[name] - given.lr * g[name] for name in theta}

    losses = partial(maml, adapt=adapt) if where == "outer" else partial(stepped, step=step)
    if where == "inner":
        return losses(given)
    first = maml(given, adapt=adapt, first_order=True) if ascent == "none" else losses(given)
    g = torch.autograd.grad(first.values.mean(), list(given.own.values()))
    scale = outer_radius / parameters_to_vector(g).norm()
    moved = {name: value + scale * part for (name, value), part in zip(given.own.items(), g, strict=True)}
    return losses(replace(given, own=moved))


def weights(steps: int, iteration: int, anneal: int) -> list[float]:
    """Of the losses after each step, as in the code of MAML++'s authors with iterations in place of epochs."""
    if iteration >= anneal:
        return [0.0] * (steps - 1) + [1.0]
    decay, least = 1 / steps / anneal, 0.03 / steps
    early = [max(1 / steps - iteration * decay, least)] * (steps - 1)
    return [*early, min(1 / steps + iteration * (steps - 1) * decay, 1 - (steps - 1) * least)]


def maml_pp(given: Given, *, iteration: int = 0, anneal: int = 5000, multi_step: bool = True, **parts: bool) -> Truth:
    """Antoniou et al. 2019, section 4: the weighted query losses after all steps."""
    by_step = weights(given.steps, iteration, anneal if multi_step else 0)
    losses = []
    for task in one_by_one(given.tasks):
        _, *later = maml_pp_path(given, task, given.steps, **parts)
        each = [weight * given.value(theta, task.query) for weight, theta in zip(by_step, later, strict=True)]
        losses.append(torch.stack(each).sum())
    return same(losses)


def maml_pp_path(given: Given, task: Task, steps: int, *, learned_rates: bool = True, step_norms: bool = True,
                 step_statistics: bool = True) -> list[Tensors]:  # fmt: skip
    """What the query set is answered by before the first step and after each one.

    Step k goes by its own norms and rates, a step beyond those in training by the last ones, and the query set by the
    norms of the step before it. All norms here go by the batch at hand, whatever `step_statistics` says.
    """
    kinds = (nn.BatchNorm1d, OffsetNorm)
    layers = [name for name, module in given.model.named_modules() if isinstance(module, kinds)]
    norms = [name for name in given.theta if step_norms and name.rpartition(".")[0] in layers]
    adapted = [name for name in given.theta if name not in norms]

    def rate(name: str, k: int) -> Any:
        return given.own[f"update.rates.model/{name.replace('.', '/')}"][k] if learned_rates else given.lr

    def normed(theta: Tensors, k: int) -> Tensors:
        return {**theta, **{name: given.own[f"per_step.{i}"][k] for i, name in enumerate(norms)}}

    path = [normed(given.theta, 0)]
    for step in range(steps):
        k = min(step, given.steps - 1)
        theta = normed(path[-1], k)
        g = gradient(given.value, theta, adapted, task.support)
        path.append({**theta, **{name: theta[name] - rate(name, k) * g[name] for name in adapted}})
    return path
