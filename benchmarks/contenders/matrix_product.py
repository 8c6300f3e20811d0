"""No contender: a large float32 matrix product, whose rate is what this machine can do at most."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.workloads import Workload

NEEDS = None
SIDES = {"cpu": 2048, "cuda": 8192}


def flops(device: str) -> int:
    """Of one product."""
    return 2 * SIDES[device] ** 3


def variants(workload: Workload) -> dict[str, dict[str, Any]]:
    """The workload has no part in it."""
    return {f"{SIDES[workload.device]} x {SIDES[workload.device]}": {}}


class MatrixProduct:
    """One product is a step."""

    def __init__(self, device: str) -> None:
        self.left, self.right, self.out = torch.rand(3, SIDES[device], SIDES[device], device=device)

    def gradient(self) -> Tensor:
        self.step()
        return torch.zeros(())

    def meta_gradient(self) -> None:
        self.step()

    def step(self) -> None:
        torch.mm(self.left, self.right, out=self.out)


def build(workload: Workload) -> MatrixProduct:
    """The same for every workload."""
    return MatrixProduct(workload.device)
