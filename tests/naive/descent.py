"""MAML, its other derivatives, what of it adapts and where it starts; Reptile."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn
from torch.func import functional_call

from fewstep.functional import Tensors
from fewstep.task import Task
from tests.naive.given import Given, Truth, flat, leaves, same, shaped
from tests.reference import descended, gradient, naive_losses, one_by_one


def maml(given: Given, *, adapt: str = "*", first_order: bool = False) -> Truth:
    """Finn et al. 2017, Algorithm 2."""
    return of_names(given, given.adapted(adapt), first_order)


def fomaml(given: Given) -> Truth:
    """Finn et al. 2017, section 5.2: the inner gradient is a constant."""
    return maml(given, first_order=True)


def anil(given: Given, *, head: str | None = None, adapt: str = "*") -> Truth:
    """Raghu et al. 2020: the head adapts."""
    own = f"{head or given.head()}."
    return of_names(given, [name for name in given.adapted(adapt) if name.startswith(own)])


def boil(given: Given, *, head: str | None = None, adapt: str = "*") -> Truth:
    """Oh et al. 2021: all but the head adapts."""
    own = f"{head or given.head()}."
    return of_names(given, [name for name in given.adapted(adapt) if not name.startswith(own)])


def of_names(given: Given, adapted: list[str], first_order: bool = False) -> Truth:
    return same(naive_losses(given.model, given.loss, given.tasks, lr=given.lr, steps=given.steps, adapted=adapted,
                             first_order=first_order, theta=given.theta))  # fmt: skip


def hf_maml(given: Given) -> Truth:
    """Fallah et al. 2020, section 4.3: from the last step back v <- v - alpha (g(theta + dv) - g(theta - dv)) / 2d."""
    value, theta, names = given.value, given.theta, list(given.theta)
    values, objective = [], []
    for task in one_by_one(given.tasks):
        path = [leaves(theta)]
        for _ in range(given.steps):
            path.append(leaves(descended(value, path[-1], names, task.support, given.lr, first_order=True)))
        values.append(value(path[-1], task.query).detach())
        v = flat(gradient(value, path[-1], names, task.query, first_order=True))
        for here in reversed(path[:-1]):
            point = flat(here).detach()
            # The published d is a free constant; this one balances truncation against rounding.
            d = torch.finfo(v.dtype).eps ** (1 / 3) * (1 + point.norm()) / v.norm()
            plus, minus = (
                flat(gradient(value, leaves(shaped(point + side * v, theta)), names, task.support, first_order=True))
                for side in (d, -d)
            )
            v = v - given.lr * (plus - minus) / (2 * d)
        objective.append(v @ flat(theta))
    return Truth(torch.stack(values), torch.stack(objective))


def reptile(given: Given, *, pool: bool = True) -> Truth:
    """Nichol et al. 2018, Algorithm 2: the pseudo-gradient theta - theta' is that of |theta - theta'|^2 / 2."""
    return towards(given, lambda task: given.theta, pool=pool)


def towards(given: Given, start: Callable[[Task], Tensors], *, pool: bool) -> Truth:
    """Reptile from a start of each task.

    pool : the inner loop sees the query examples as well, unless batches are dicts
    """
    values, objective = [], []
    for task in one_by_one(given.tasks):
        batch = task.support
        if pool and not isinstance(batch, dict):
            batch = tuple(torch.cat(parts) for parts in zip(*task, strict=True))
        first = start(task)
        theta = leaves(first)
        for _ in range(given.steps):
            theta = leaves(descended(given.value, theta, list(theta), batch, given.lr, first_order=True))
        values.append(given.value(theta, task.query).detach())
        objective.append((flat(first) - flat(theta).detach()).square().sum() / 2)
    return Truth(torch.stack(values), torch.stack(objective))


def proto_maml(given: Given) -> Truth:
    """Triantafillou et al. 2020: w_k = 2 c_k and b_k = -|c_k|^2, c_k the mean feature of class k."""
    return from_start(given, lambda task: prototypes(given, task))


def unicorn_maml(given: Given) -> Truth:
    """Ye & Chao 2022: each class starts from one vector, the mean row of the head."""
    return from_start(given, lambda task: common_vector(given, task))


def from_start(given: Given, start: Callable[[Task], Tensors]) -> Truth:
    """MAML from a start of each task."""
    losses = []
    for task in one_by_one(given.tasks):
        # Clones: the step is along the derivative by each tensor, not by the body through the head's start as well.
        theta = {name: value.clone() for name, value in start(task).items()}
        for _ in range(given.steps):
            theta = descended(given.value, theta, list(theta), task.support, given.lr)
        losses.append(given.value(theta, task.query))
    return same(losses)


def prototypes(given: Given, task: Task) -> Tensors:
    """theta with the head of nearest class means."""
    head, theta = given.head(), given.theta
    body = copy.deepcopy(given.model)
    body.set_submodule(head, nn.Identity())
    x, y = task.support
    features = functional_call(body, {n: v for n, v in theta.items() if not n.startswith(f"{head}.")}, (x,))
    means = torch.stack([features[y == way].mean(0) for way in y.unique()])
    return {**theta, f"{head}.weight": 2 * means, f"{head}.bias": -(means * means).sum(1)}


def common_vector(given: Given, task: Task) -> Tensors:
    """theta with a head of equal rows."""
    head, theta, ways = given.head(), given.theta, len(task.support[1].unique())
    weight, bias = theta[f"{head}.weight"].mean(0), theta[f"{head}.bias"].mean()
    return {**theta, f"{head}.weight": torch.stack([weight] * ways), f"{head}.bias": torch.stack([bias] * ways)}
