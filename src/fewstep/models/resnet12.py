"""The residual network of few-shot learning (Oreshkin et al. 2018; Lee et al. 2019, in its wide form)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional

from fewstep.errors import InputError


class ResBlock(nn.Module):
    """Three 3x3 convolutions with batch norm beside a 1x1 one, leaky ReLU, and 2x2 pooling."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(_conv(before, width, 3) for before in (inputs, width, width))
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(3))
        self.beside = _conv(inputs, width, 1)
        self.beside_norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        beside = self.beside_norm(self.beside(x))
        for number, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = norm(conv(x))
            x = functional.leaky_relu(x + beside if number == 2 else x, 0.1)
        return functional.max_pool2d(x, 2)


class ResNet12(nn.Module):
    """Four blocks, the mean over the last map, and a linear head."""

    def __init__(self, blocks: Sequence[nn.Module], head: nn.Linear) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(x).mean((-2, -1)))
        return out


def resnet12(ways: int, *, channels: int = 3, widths: Sequence[int] = (64, 160, 320, 640)) -> ResNet12:
    """Twelve layers with 12.4 million parameters before the head, as MetaOptNet, FEAT and UNICORN-MAML take it.

    x [batch, channels, height, width], at least 16 pixels a side -> [batch, ways]
    Its batch norms have running statistics: give the learner a normalisation, "batch" as those papers do in MAML.
    Their DropBlock is left out.

    >>> model = resnet12(ways=5)
    >>> sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in model.head.parameters())
    12424320
    """
    if min(ways, channels, *widths) < 1:
        raise InputError(f"ways, channels and widths must be at least 1, but {ways}, {channels} and {widths} came")
    blocks = [ResBlock(before, width) for before, width in pairwise([channels, *widths])]
    return ResNet12(blocks, nn.Linear(widths[-1], ways))


def _conv(inputs: int, width: int, side: int) -> nn.Conv2d:
    conv = nn.Conv2d(inputs, width, side, padding=side // 2, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="leaky_relu")
    return conv
