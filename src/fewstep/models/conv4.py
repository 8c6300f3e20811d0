"""The four-block convolutional network of few-shot learning (Vinyals et al. 2016), as the MAML authors built it."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from fewstep.errors import InputError
from fewstep.models.layers import Initialisation, OffsetNorm, initialise


class SameConv(nn.Conv2d):
    """A 3x3 convolution with TensorFlow's SAME padding, which PyTorch lacks for strides."""

    def __init__(self, inputs: int, filters: int, stride: int) -> None:
        super().__init__(inputs, filters, 3, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        stride = self.stride[0]
        before_w, after_w = _same(x.shape[-1], stride)
        before_h, after_h = _same(x.shape[-2], stride)
        # What both sides have in common is left to the convolution, which need not copy.
        x = functional.pad(x, (0, after_w - before_w, 0, after_h - before_h))
        return functional.conv2d(x, self.weight, self.bias, stride, (before_h, before_w))


class Block(nn.Module):
    """3x3 convolution with TensorFlow's SAME padding, offset-only batch norm, 2x2 pooling or stride 2, and ReLU."""

    def __init__(self, inputs: int, filters: int, pool: bool) -> None:
        super().__init__()
        self.conv = SameConv(inputs, filters, stride=1 if pool else 2)
        self.norm = OffsetNorm(filters, pool=pool)
        initialise(self.conv, "xavier")

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.norm(self.conv(x)))  # after pooling, which gives the same for less


class Conv4(nn.Module):
    """Four blocks and a linear head."""

    def __init__(self, blocks: list[Block], head: nn.Linear, mean: bool, rms_norm: bool) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.head = head
        self.mean = mean
        self.rms_norm = rms_norm

    def forward(self, x: Tensor) -> Tensor:
        features = self.blocks(x)
        features = features.mean((-2, -1)) if self.mean else features.flatten(1)
        if self.rms_norm:
            features = functional.rms_norm(features, features.shape[1:], eps=1e-6)
        out: Tensor = self.head(features)
        return out


def conv4(
    ways: int,
    *,
    channels: int = 1,
    size: int = 28,
    filters: int = 64,
    pool: bool = False,
    head: Initialisation | None = None,
    rms_norm: bool = False,
) -> Conv4:
    """The authors' network; by default that for Omniglot, `conv4(ways, channels=3, size=84, filters=32, pool=True)`
    is that for Mini-ImageNet.

    x [batch, channels, size, size] -> [batch, ways]
    pool : 2x2 max pooling and all features to the head; else stride 2 and the mean over the last map to the head
    head : how its weight starts; by default N(0, 1) with strides and Xavier with pooling, as the authors do
    rms_norm : divide the features of each picture by the root of their mean square (Zhang & Sennrich 2019). From a head
        of zeros the first inner step then answers by cosines, those between a picture and the support set

    >>> sum(p.numel() for p in conv4(ways=5).parameters())
    112005
    >>> sum(p.numel() for p in conv4(ways=5, channels=3, size=84, filters=32, pool=True).parameters())
    32773
    """
    if min(ways, channels, filters) < 1 or size < 16:
        raise InputError(
            f"ways, channels and filters must be at least 1 and size at least 16, but {ways}, {channels}, {filters} "
            f"and {size} came"
        )
    blocks = [Block(inputs, filters, pool) for inputs in (channels, filters, filters, filters)]
    side = size // 16 if pool else 1
    linear = nn.Linear(filters * side * side, ways)
    initialise(linear, head or ("xavier" if pool else "normal"))
    return Conv4(blocks, linear, mean=not pool, rms_norm=rms_norm)


def _same(length: int, stride: int) -> tuple[int, int]:
    """TensorFlow's SAME padding for a window of 3: the odd pixel goes after."""
    total = max((-(-length // stride) - 1) * stride + 3 - length, 0)
    return total // 2, total - total // 2
