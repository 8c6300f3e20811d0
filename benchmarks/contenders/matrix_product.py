"""No contender: a large float32 matrix product, whose rate is what this machine can do at most."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.workloads import Workload

NEEDS = None
SIDE = 2048
FLOPS = 2 * SIDE**3


def variants(workload: Workload) -> dict[str, dict[str, Any]]:
    """The workload has no part in it."""
    return {f"{SIDE} x {SIDE}": {}}


class MatrixProduct:
    """One product is a step."""

    def __init__(self) -> None:
        self.left, self.right = torch.rand(2, SIDE, SIDE)
        self.out = torch.empty(SIDE, SIDE)

    def gradient(self) -> Tensor:
        self.step()
        return torch.zeros(())

    def meta_gradient(self) -> None:
        self.step()

    def step(self) -> None:
        torch.mm(self.left, self.right, out=self.out)


def build(workload: Workload) -> MatrixProduct:
    """The same for every workload."""
    return MatrixProduct()
