"""Models with tasks to adapt to, as data: every engine is tested on all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fewstep import Task, models, use_batch_statistics
from fewstep.functional import Loss


@dataclass(frozen=True)
class Case:
    """A model, a loss, and the form of one task's inputs and targets."""

    name: str
    model: Callable[[], nn.Module]
    x: tuple[int, ...]
    ways: int = 0  # 0 for regression
    examples: int = 6
    adapt: str = "*"
    lr: float = 0.1
    batched: bool = True  # whether vmap has rules for all its operators

    @property
    def loss(self) -> Loss:
        return functional.cross_entropy if self.ways else functional.mse_loss

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        model = self.model().double()
        for value in model.parameters():  # away from special points such as zero biases
            value.data += 0.1 * torch.randn_like(value)
        return model

    def tasks(self, count: int = 3) -> Task:
        torch.manual_seed(1)

        def batch() -> tuple[Tensor, Tensor]:
            x = torch.randn(count, self.examples, *self.x, dtype=torch.float64)
            if self.ways:
                return x, torch.arange(self.examples).remainder(self.ways).expand(count, -1).clone()
            return x, torch.randn(count, self.examples, 1, dtype=torch.float64)

        return Task(support=batch(), query=batch())


class Attention(nn.Module):
    """Self-attention over 4 tokens, by PyTorch's fused function."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            mixed = functional.scaled_dot_product_attention(q, k, v)
        result: Tensor = self.out(mixed.transpose(1, 2).flatten(2).mean(1))
        return result


class Recurrent(nn.Module):
    """A GRU, which has no batching rule."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(3, 5, batch_first=True)
        self.head = nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        with torch.backends.cudnn.flags(enabled=False):  # whose recurrent nets have no second derivative
            result: Tensor = self.head(self.gru(x)[0][:, -1])
        return result


def _normed(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.Tanh(), nn.Flatten(), nn.Linear(4 * 6 * 6, 3))


class Scaled(nn.Module):
    """Its first parameter has no axis."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.linear = nn.Linear(2, 1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.scale * self.linear(x).tanh()
        return result


CASES = [
    Case("scalar parameter", Scaled, (2,)),
    Case("mlp", lambda: models.mlp(1, 1, (8, 8), init="xavier"), (1,)),
    Case("mlp with norm", lambda: models.mlp(9, 3, (8, 8), norm=True, init="xavier"), (9,), ways=3, adapt="~*.offset"),
    Case("head only", lambda: models.mlp(2, 1, (8, 8), init="xavier"), (2,), adapt="5.*"),
    Case("conv4 strided", lambda: models.conv4(3, filters=4, size=16), (1, 16, 16), ways=3, adapt="~*.offset"),
    Case("conv4 pooled", lambda: models.conv4(3, filters=4, size=16, pool=True, channels=2), (2, 16, 16), ways=3),
    Case("conv4, rms norm", lambda: models.conv4(3, filters=4, size=16, pool=True, rms_norm=True), (1, 16, 16), ways=3),
    Case("batch norm", lambda: use_batch_statistics(_normed(nn.BatchNorm2d(4))), (1, 8, 8), ways=3),
    Case("layer norm", lambda: _normed(nn.LayerNorm([4, 6, 6])), (1, 8, 8), ways=3),
    Case("group norm", lambda: _normed(nn.GroupNorm(2, 4)), (1, 8, 8), ways=3),
    Case("instance norm", lambda: _normed(nn.InstanceNorm2d(4, affine=True)), (1, 8, 8), ways=3),
    Case("attention", Attention, (4, 8), ways=3),
    Case("gru", Recurrent, (4, 3), batched=False),
]
