"""Adam and AdamW in the inner loop, with a derivative that stays finite where a gradient is 0."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fewstep.errors import InputError
from fewstep.functional import Tensors
from fewstep.updates.common import fraction, positive

Moments = tuple[Tensors, Tensors]


@dataclass(frozen=True)
class Adam:
    """theta' = theta - alpha * m_hat / sqrt(v_hat + eps^2)

        m' = b1 * m + (1 - b1) * g,    m_hat = m' / (1 - b1^t)
        v' = b2 * v + (1 - b2) * g^2,  v_hat = v' / (1 - b2^t),  t = step + 1

    Kingma & Ba 2015, arXiv 1412.6980, Algorithm 1, but for the place of eps. The paper and torch have sqrt(v_hat) +
    eps, whose derivative at v = 0 is infinite: one dead unit would make the whole meta-gradient NaN. Inside the root it
    is finite everywhere. Both steps agree where |g| is far above eps, and are m_hat / eps where it is far below. There
    the derivative is alpha / eps: where gradients are that small, only a larger eps keeps the meta-gradient small.

    The state is (m, v), each [B, ...] by name.

    lr : alpha, the step size
    betas : (b1, b2), each at least 0 and below 1
    eps : see above

    >>> import torch
    >>> Adam(lr=0.1)({"w": torch.ones(1, 1)}, {"w": torch.full((1, 1), 7.0)}, None, 0)[0]   # any g: 1 - alpha
    {'w': tensor([[0.9000]])}
    """

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        positive(self.lr, "the inner learning rate")
        positive(self.eps, "eps")
        if not isinstance(self.betas, tuple) or len(self.betas) != 2:
            raise InputError(f"betas must be two numbers, but {self.betas!r} came")
        for beta in self.betas:
            fraction(beta, "each beta")

    def __call__(self, theta: Tensors, gradient: Tensors, state: Moments | None, step: int) -> tuple[Tensors, Moments]:
        first, second = self.betas
        if state is None:
            zeros = {name: torch.zeros_like(value) for name, value in gradient.items()}
            state = zeros, zeros
        m = {name: first * value + (1 - first) * gradient[name] for name, value in state[0].items()}
        v = {name: second * value + (1 - second) * gradient[name].square() for name, value in state[1].items()}
        m_scale, v_scale = 1 / (1 - first ** (step + 1)), 1 / (1 - second ** (step + 1))
        move = {name: m_scale * m[name] / (v_scale * v[name] + self.eps**2).sqrt() for name in theta}
        return {name: value.add(move[name], alpha=-self.lr) for name, value in theta.items()}, (m, v)


@dataclass(frozen=True)
class AdamW(Adam):
    """theta' = (1 - alpha * lambda) * theta - alpha * m_hat / sqrt(v_hat + eps^2)

    Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv 1711.05101, Algorithm 2, scaled by alpha as in
    torch). All else is as for `Adam`.

    weight_decay : lambda, at least 0

    >>> import torch
    >>> AdamW(lr=0.1, weight_decay=0.5)({"w": torch.ones(1, 1)}, {"w": torch.ones(1, 1)}, None, 0)[0]  # 0.95 - 0.1
    {'w': tensor([[0.8500]])}
    """

    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weight_decay != 0:
            positive(self.weight_decay, "a weight decay other than 0")

    def __call__(self, theta: Tensors, gradient: Tensors, state: Moments | None, step: int) -> tuple[Tensors, Moments]:
        decayed = {name: value * (1 - self.lr * self.weight_decay) for name, value in theta.items()}
        return super().__call__(decayed, gradient, state, step)
