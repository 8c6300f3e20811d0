"""The naive loop that every fast path is compared with: plain autograd through one task after another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fewstep.functional import Loss
from fewstep.task import Task, map_tensors


def naive_losses(
    model: nn.Module,
    loss: Loss,
    tasks: Task,
    *,
    lr: float,
    steps: int,
    adapted: Sequence[str],
    first_order: bool = False,
) -> Tensor:
    """The query loss [B] of each task after `steps` of gradient descent on its support loss."""
    losses = []
    for i in range(tasks.size):
        (support_x, support_y), (query_x, query_y) = map_tensors(lambda leaf, i=i: leaf[i], tasks)  # type: ignore[misc]
        theta: dict[str, Tensor] = dict(model.named_parameters())
        for _ in range(steps):
            value = loss(functional_call(model, theta, (support_x,)), support_y)
            grads = torch.autograd.grad(value, [theta[name] for name in adapted], create_graph=not first_order)
            theta = {**theta, **{n: theta[n] - lr * g for n, g in zip(adapted, grads, strict=True)}}
        losses.append(loss(functional_call(model, theta, (query_x,)), query_y))
    return torch.stack(losses)


def meta_gradient(losses: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """The gradient of the summed losses as one flat vector; zeros where a parameter has no part in it."""
    grads = torch.autograd.grad(losses.sum(), parameters, allow_unused=True, materialize_grads=True)
    return torch.cat([grad.flatten() for grad in grads])


def relative_error(value: Tensor, truth: Tensor) -> float:
    """|value - truth| / |truth| of whole vectors: a single leaf can have a true gradient of 0."""
    return float(((value - truth).norm() / truth.norm()).detach())
