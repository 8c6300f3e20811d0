"""The naive loop that every fast path is compared with: plain autograd through one task after another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fewstep.functional import Loss, Tensors
from fewstep.task import Task, map_tensors

Forward = Callable[[Tensors, Tensor], Tensor]
"""prediction = forward(parameters by name, x)"""
Value = Callable[[Tensors, Any], Tensor]
"""loss = value(parameters by name, batch), of one task's batch."""


def one_by_one(tasks: Task) -> list[Task]:
    """Each task by itself, without a task axis."""
    return [map_tensors(lambda leaf, i=i: leaf[i], tasks) for i in range(tasks.size)]  # type: ignore[misc]


def forward_of(model: nn.Module) -> Forward:
    """The model as a function of its parameters."""

    def forward(theta: Tensors, x: Tensor) -> Tensor:
        prediction: Tensor = functional_call(model, theta, (x,))
        return prediction

    return forward


def value_of(forward: Forward, loss: Loss) -> Value:
    """The loss as a function of parameters: `loss(prediction, y)` of `(x, y)`, `loss(model, batch)` of a dict."""

    def value(theta: Tensors, batch: Any) -> Tensor:
        if isinstance(batch, dict):
            return loss(lambda x: forward(theta, x), batch)
        x, y = batch
        return loss(forward(theta, x), y)

    return value


def gradient(value: Value, theta: Tensors, names: Sequence[str], batch: Any, *, first_order: bool = False) -> Tensors:
    """The gradient of the loss by the tensors of these names; differentiable unless it is to be first order."""
    found = torch.autograd.grad(value(theta, batch), [theta[name] for name in names], create_graph=not first_order)
    return dict(zip(names, found, strict=True))


def descended(value: Value, theta: Tensors, names: Sequence[str], batch: Any, lr: float, *,
              first_order: bool = False) -> Tensors:  # fmt: skip
    """theta after a step of gradient descent on the tensors of these names."""
    g = gradient(value, theta, names, batch, first_order=first_order)
    return {**theta, **{name: theta[name] - lr * g[name] for name in names}}


def naive_losses(
    model: nn.Module,
    loss: Loss,
    tasks: Task,
    *,
    lr: float,
    steps: int,
    adapted: Sequence[str],
    first_order: bool = False,
    theta: Tensors | None = None,
) -> Tensor:
    """The query loss [B] of each task after `steps` of gradient descent on its support loss, from `theta`.

    theta : the parameters by name, those of the model unless given
    """
    value, losses = value_of(forward_of(model), loss), []
    start: Tensors = dict(model.named_parameters()) if theta is None else theta
    for task in one_by_one(tasks):
        own = start
        for _ in range(steps):
            own = descended(value, own, adapted, task.support, lr, first_order=first_order)
        losses.append(value(own, task.query))
    return torch.stack(losses)


def meta_gradient(losses: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """The gradient of the summed losses as one flat vector; zeros where a parameter has no part in it."""
    grads = torch.autograd.grad(losses.sum(), parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([grad.flatten() for grad in grads])


def relative_error(value: Tensor, truth: Tensor) -> float:
    """|value - truth| / |truth| of whole vectors: a single leaf can have a true gradient of 0."""
    return float(((value - truth).norm() / truth.norm()).detach())
