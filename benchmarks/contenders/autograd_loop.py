"""Plain autograd through one task after another, each with its own backward pass: the yardstick."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from benchmarks.contenders.with_torch import TorchContender
from benchmarks.workloads import Workload, one_by_one

NEEDS = None


def variants(workload: Workload) -> dict[str, dict[str, Any]]:
    """By the sinusoid net there is also a loop written out over a list of weights: no module is called."""
    return {"any module": {}} | ({"by hand": {"by_hand": True}} if workload.name == "sinusoid" else {})


def build(workload: Workload, by_hand: bool = False) -> TorchContender:
    """The loop that everyone writes first."""

    def backward() -> None:
        for i in range(workload.tasks.size):
            workload.naive(workload.tasks.select(slice(i, i + 1))).sum().backward()  # type: ignore[no-untyped-call]

    return TorchContender(workload, (lambda: _by_hand(workload)) if by_hand else backward)


def _by_hand(workload: Workload) -> None:
    for (support_x, support_y), (query_x, query_y) in one_by_one(workload.tasks):
        theta: list[torch.Tensor] = list(workload.model.parameters())
        for _ in range(workload.steps):
            value = functional.mse_loss(_relu_network(support_x, theta), support_y)
            grads = torch.autograd.grad(value, theta, create_graph=True)
            theta = [weight - workload.lr * grad for weight, grad in zip(theta, grads, strict=True)]
        functional.mse_loss(_relu_network(query_x, theta), query_y).backward()  # type: ignore[no-untyped-call]


def _relu_network(x: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    """Linear layers with ReLU between them; weight and bias take turns in `weights`."""
    for i in range(0, len(weights) - 2, 2):
        x = functional.relu(functional.linear(x, weights[i], weights[i + 1]))
    return functional.linear(x, weights[-2], weights[-1])
