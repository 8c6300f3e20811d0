"""Methods whose inner step is learned."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fewstep.functional import Tensors
from tests.naive.given import Given, Truth, same
from tests.reference import gradient, one_by_one

Gradient = Callable[[Tensors], Tensors]
"""g = gradient(theta), on the support set of one task"""
Step = Callable[[Tensors, Gradient, int], Tensors]
"""theta' = step(theta, gradient, number)"""


def stepped(given: Given, step: Step) -> Truth:
    """The query losses after the steps of a rule, in which all adapts."""
    losses = []
    for task in one_by_one(given.tasks):

        def by_all(theta: Tensors, support: object = task.support) -> Tensors:
            return gradient(given.value, theta, list(theta), support)

        theta = given.theta
        for number in range(given.steps):
            theta = step(theta, by_all, number)
        losses.append(given.value(theta, task.query))
    return same(losses)


def of_tensor(given: Given, kind: str, name: str) -> Tensor:
    """What a rule has learned for a tensor of the model."""
    return given.own[f"update.{kind}.model/{name.replace('.', '/')}"]


def meta_sgd(given: Given) -> Truth:
    """Li et al. 2017, equation 2: theta' = theta - alpha o g."""

    def step(theta: Tensors, grad: Gradient, number: int) -> Tensors:
        g = grad(theta)
        return {name: theta[name] - of_tensor(given, "rates", name) * g[name] for name in theta}

    return stepped(given, step)


def meta_curvature(given: Given) -> Truth:
    """Park & Oliva 2019, equation 5: MC(G) = G x_1 M_o x_2 M_i x_3 M_f, M_f over the flattened kernel."""

    def transformed(name: str, g: Tensor) -> Tensor:
        out = of_tensor(given, "out", name)
        if g.dim() == 1:
            return torch.einsum("po,o->p", out, g)
        into = of_tensor(given, "into", name)
        if g.dim() == 2:
            return torch.einsum("po,qi,oi->pq", out, into, g)
        kernel = of_tensor(given, "kernel", name)
        return torch.einsum("po,qi,rk,oik->pqr", out, into, kernel, g.flatten(2)).reshape(g.shape)

    def step(theta: Tensors, grad: Gradient, number: int) -> Tensors:
        g = grad(theta)
        return {name: theta[name] - given.lr * transformed(name, g[name]) for name in theta}

    return stepped(given, step)


def two_layers(given: Given, x: Tensor) -> Tensor:
    """The network of ALFA and of L2F."""
    first, last = ((given.own[f"update.network.{i}.weight"], given.own[f"update.network.{i}.bias"]) for i in (0, 2))
    return last[0] @ (first[0] @ x + first[1]).clamp(min=0) + last[1]


def alfa(given: Given) -> Truth:
    """Baik et al. 2020, equations 3-5: theta' = beta o theta - alpha o g."""

    def step(theta: Tensors, grad: Gradient, number: int) -> Tensors:
        g = grad(theta)
        seen = torch.stack([*(g[name].mean() for name in theta), *(theta[name].mean() for name in theta)])
        made = two_layers(given, seen)
        alpha = given.own["update.alpha"][number] * made[: len(theta)]
        beta = given.own["update.beta"][number] * made[len(theta) :]
        return {name: beta[i] * theta[name] - alpha[i] * g[name] for i, name in enumerate(theta)}

    return stepped(given, step)


def l2f(given: Given) -> Truth:
    """Baik, Hong, Lee 2020, Algorithm 1: theta <- gamma o theta before the first step."""

    def step(theta: Tensors, grad: Gradient, number: int) -> Tensors:
        if number == 0:
            g = grad(theta)
            gamma = two_layers(given, torch.stack([g[name].mean() for name in theta])).sigmoid()
            theta = {name: gamma[i] * theta[name] for i, name in enumerate(theta)}
        g = grad(theta)
        return {name: theta[name] - given.lr * g[name] for name in theta}

    return stepped(given, step)
