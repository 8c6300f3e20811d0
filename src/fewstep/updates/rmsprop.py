"""RMSprop in the inner loop, with a derivative that stays finite where a gradient is 0."""

from __future__ import annotations

from dataclasses import dataclass

from fewstep.functional import Tensors
from fewstep.updates.common import fraction, positive


@dataclass(frozen=True)
class RMSprop:
    """v' = rho * v + (1 - rho) * g^2;  theta' = theta - alpha * g / sqrt(v' + eps^2)

    Tieleman & Hinton 2012 (lecture 6.5 of "Neural networks for machine learning"); v starts as 0, as in torch. Torch
    has sqrt(v) + eps, whose derivative at v = 0 is infinite; see `Adam`, where the same is done. The state is v,
    [B, ...] by name.

    lr : alpha, the step size
    decay : rho, at least 0 and below 1
    eps : see above

    >>> import torch
    >>> RMSprop(lr=0.1, decay=0.75)({"w": torch.ones(1, 1)}, {"w": torch.ones(1, 1)}, None, 0)[0]  # 1 - 0.1 / 0.5
    {'w': tensor([[0.8000]])}
    """

    lr: float
    decay: float = 0.99
    eps: float = 1e-8

    def __post_init__(self) -> None:
        positive(self.lr, "the inner learning rate")
        positive(self.eps, "eps")
        fraction(self.decay, "decay")

    def __call__(self, theta: Tensors, gradient: Tensors, state: Tensors | None, step: int) -> tuple[Tensors, Tensors]:
        v = {name: (1 - self.decay) * value.square() for name, value in gradient.items()}
        if state is not None:
            v = {name: value.add(state[name], alpha=self.decay) for name, value in v.items()}
        move = {name: gradient[name] / (v[name] + self.eps**2).sqrt() for name in theta}
        return {name: value.add(move[name], alpha=-self.lr) for name, value in theta.items()}, v
