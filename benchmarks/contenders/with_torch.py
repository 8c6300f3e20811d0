"""What contenders in PyTorch have in common."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.contenders import RATE
from benchmarks.workloads import Workload, flat_gradient


class TorchContender:
    """`backward` adds the meta-gradient of the summed query losses to the `grad` of the workload's model."""

    def __init__(self, workload: Workload, backward: Callable[[], None]) -> None:
        self.model, self.backward = workload.model, backward
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=RATE)

    def gradient(self) -> Tensor:
        self.meta_gradient()
        return flat_gradient(self.model)

    def meta_gradient(self) -> None:
        self.optimizer.zero_grad()
        self.backward()

    def step(self) -> None:
        self.meta_gradient()
        self.optimizer.step()
