"""The whole unrolled meta-gradient of a chunk of tasks in torch.func, under torch.compile."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vmap

from benchmarks.contenders.torch_func import task_loss
from benchmarks.contenders.with_torch import TorchContender
from benchmarks.workloads import Workload
from fewstep import Task

NEEDS = None


def variants(workload: Workload) -> dict[str, dict[str, Any]]:
    """All tasks at once, or 4 at a time; on a GPU with a CUDA graph, and without."""
    if workload.device == "cuda":
        return {"all tasks": {}, "all tasks, reduce-overhead": {"mode": "reduce-overhead"}}
    return {"all tasks": {}} | ({} if workload.tiny or workload.tasks.size <= 4 else {"4 at a time": {"chunk": 4}})


def build(workload: Workload, chunk: int | None = None, mode: str | None = None) -> TorchContender:
    """`grad` of the sum over a chunk, compiled as one graph: double backward does not cross its border."""
    batched = vmap(task_loss(workload), in_dims=(None, 0))
    size, count = chunk or workload.tasks.size, workload.tasks.size

    def total(theta: dict[str, Tensor], task: Task) -> Tensor:
        return batched(theta, task).sum()

    compiled = torch.compile(grad(total), fullgraph=True, dynamic=False, mode=mode)

    def backward() -> None:
        theta = {name: value.detach() for name, value in workload.model.named_parameters()}
        for low in range(0, count, size):
            gradients = compiled(theta, workload.tasks.select(slice(low, low + size)))
            for name, value in workload.model.named_parameters():
                value.grad = gradients[name] if value.grad is None else value.grad + gradients[name]

    return TorchContender(workload, backward)
