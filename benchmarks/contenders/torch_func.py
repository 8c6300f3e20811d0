"""Plain torch.func: `vmap` over the tasks of the loss after steps of `grad`, and autograd around it.

That is silently wrong through the fused norm layers (pytorch/functorch#534), so they are replaced by composite ones.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from benchmarks.contenders.with_torch import TorchContender
from benchmarks.workloads import Workload
from fewstep import Task
from fewstep.models.layers import OffsetNorm

NEEDS = None


class CompositeBatchNorm(nn.Module):
    """`OffsetNorm` in elementary operations, with the parameter of a fused one."""

    def __init__(self, fused: OffsetNorm) -> None:
        super().__init__()
        self.eps, self.pool, self.offset = fused.eps, fused.pool, fused.offset

    def forward(self, x: Tensor) -> Tensor:
        axes = (0, *range(2, x.dim()))
        normal = standardised(x, axes, self.eps)
        normal = functional.max_pool2d(normal, 2) if self.pool else normal
        return normal + self.offset.reshape(-1, *[1] * (x.dim() - 2))


class CompositeLayerNorm(nn.Module):
    """`nn.LayerNorm` over the last axis in elementary operations, with the parameters of a fused one."""

    def __init__(self, fused: nn.LayerNorm) -> None:
        super().__init__()
        self.eps, self.weight, self.bias = fused.eps, fused.weight, fused.bias

    def forward(self, x: Tensor) -> Tensor:
        return standardised(x, (-1,), self.eps) * self.weight + self.bias


def standardised(x: Tensor, axes: tuple[int, ...], eps: float) -> Tensor:
    """Mean 0 and variance 1 over the axes."""
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + eps)


def composite(model: nn.Module) -> nn.Module:
    """The same model with the same parameters and composite norm layers."""
    twin = copy.deepcopy(model, memo={id(value): value for value in model.parameters()})
    for parent in list(twin.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, OffsetNorm):
                setattr(parent, name, CompositeBatchNorm(child))
            elif isinstance(child, nn.LayerNorm):
                setattr(parent, name, CompositeLayerNorm(child))
    return twin


def variants(workload: Workload) -> dict[str, dict[str, Any]]:
    """All tasks at once, or few at a time: caches are small."""
    sizes = () if workload.device == "cuda" else (1, 2, 4, 8)
    chunks = [chunk for chunk in sizes if chunk < workload.tasks.size and not workload.tiny]
    return {"all tasks": {}} | {f"{chunk} at a time": {"chunk": chunk} for chunk in chunks}


def task_loss(workload: Workload) -> Callable[..., Tensor]:
    """(theta, task) -> the query loss of one task, without a task axis."""
    model, names = composite(workload.model), workload.adapted

    def loss(theta: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return workload.loss(functional_call(model, theta, (batch[0],)), batch[1])

    def inner(moving: dict[str, Tensor], others: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return loss({**others, **moving}, batch)

    def query_loss(theta: dict[str, Tensor], task: Task) -> Tensor:
        moving = {name: theta[name] for name in names}
        for _ in range(workload.steps):
            slope = grad(inner)(moving, theta, tuple(task.support))
            moving = {name: value - workload.lr * slope[name] for name, value in moving.items()}
        return loss({**theta, **moving}, task.query)

    return query_loss


def build(workload: Workload, chunk: int | None = None) -> TorchContender:
    """A backward pass for each chunk, so that the graph of one chunk only is alive."""
    batched = vmap(task_loss(workload), in_dims=(None, 0))
    size, count = chunk or workload.tasks.size, workload.tasks.size

    def backward() -> None:
        for low in range(0, count, size):
            part = workload.tasks.select(slice(low, low + size))
            batched(dict(workload.model.named_parameters()), part).sum().backward()  # type: ignore[no-untyped-call]

    return TorchContender(workload, backward)
