"""Plain gradient descent, the update of the paper (Finn et al. 2017, Algorithm 1, line 6)."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from torch import Tensor

from fewstep.errors import InputError
from fewstep.functional import Tensors


@dataclass(frozen=True)
class SGD:
    """theta' = theta - alpha * g

    lr : alpha, the step size

    >>> import torch
    >>> SGD(lr=0.1)({"w": torch.tensor([[1.0]])}, {"w": torch.tensor([[2.0]])}, None, 0)[0]
    {'w': tensor([[0.8000]])}
    """

    lr: float

    def __post_init__(self) -> None:
        if isinstance(self.lr, Tensor):  # type: ignore[unreachable]
            raise InputError(
                "the inner learning rate must be a number, but a tensor came; to learn it take fewstep.meta_sgd or the "
                "rule fewstep.updates.LearnedRates"
            )
        if not 0 < self.lr < inf:
            raise InputError(f"the inner learning rate must be above 0 and finite, but {self.lr} came")

    def __call__(self, theta: Tensors, gradient: Tensors, state: None, step: int) -> tuple[Tensors, None]:
        return {name: value.add(gradient[name], alpha=-self.lr) for name, value in theta.items()}, state
