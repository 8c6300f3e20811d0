"""higher (Grefenstette et al. 2019), as its own Omniglot example uses it: one task after another."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.contenders.with_torch import TorchContender
from benchmarks.workloads import Workload, one_by_one

NEEDS = "higher"


def variants(workload: Workload) -> dict[str, dict[str, Any]]:
    """There is one way."""
    return {"innerloop_ctx": {}}


def build(workload: Workload) -> TorchContender:
    """A differentiable SGD over the parameters that adapt, and a backward pass for each task."""
    import higher

    model = workload.model
    own = dict(model.named_parameters())
    inner = torch.optim.SGD([own[name] for name in workload.adapted], lr=workload.lr)

    def backward() -> None:
        for (support_x, support_y), (query_x, query_y) in one_by_one(workload.tasks):
            with higher.innerloop_ctx(model, inner, copy_initial_weights=False) as (patched, optimizer):
                for _ in range(workload.steps):
                    optimizer.step(workload.loss(patched(support_x), support_y))
                workload.loss(patched(query_x), query_y).backward()  # type: ignore[no-untyped-call]

    return TorchContender(workload, backward)
