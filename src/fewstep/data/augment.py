"""Random changes to pictures that leave their class as it is, for a whole batch at once, on its device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fewstep.errors import InputError

GREY = (0.299, 0.587, 0.114)  # what the eye makes of red, green and blue (ITU-R BT.601)


@dataclass(frozen=True)
class Augment:
    """Each picture is shifted, mirrored and coloured by numbers of its own.

    crop : pixels by which it is shifted at most, up or down and left or right; what comes in is black
    flip : whether it is mirrored, left to right, every other time
    jitter : brightness, contrast and saturation change by a factor from 1 - jitter to 1 + jitter each

    >>> same = Augment(crop=0, flip=False, jitter=0.0)
    >>> x = torch.rand(2, 3, 8, 8)
    >>> torch.equal(same(x, torch.Generator()), x)
    True
    """

    crop: int = 8
    flip: bool = True
    jitter: float = 0.4

    def __post_init__(self) -> None:
        if self.crop < 0 or not 0 <= self.jitter < 1:
            raise InputError(
                f"crop must be at least 0 and jitter from 0 to below 1, but {self.crop} and {self.jitter} came"
            )

    def __call__(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Pictures [..., channels, height, width], float in 0..1; random numbers come from the CPU generator."""
        pictures = x.flatten(0, -4)
        if self.crop:
            pictures = _shifted(pictures, self.crop, generator)
        if self.flip:
            mirrored = torch.rand(len(pictures), generator=generator).to(x.device) < 0.5
            pictures = torch.where(mirrored[:, None, None, None], pictures.flip(-1), pictures)
        if self.jitter:
            pictures = _coloured(pictures, self.jitter, generator)
        return pictures.reshape(x.shape)


def _shifted(x: Tensor, most: int, generator: torch.Generator) -> Tensor:
    offsets = torch.randint(2 * most + 1, (2, len(x), 1), generator=generator).to(x.device)
    rows = offsets[0] + torch.arange(x.shape[-2], device=x.device)
    columns = offsets[1] + torch.arange(x.shape[-1], device=x.device)
    padded = functional.pad(x, [most] * 4).permute(0, 2, 3, 1)
    number = torch.arange(len(x), device=x.device)[:, None, None]
    return padded[number, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def _coloured(x: Tensor, jitter: float, generator: torch.Generator) -> Tensor:
    """Brightness, then contrast, then saturation, as in torchvision's ColorJitter, in this order."""
    factors = 1 + jitter * (2 * torch.rand(3, len(x), 1, 1, 1, generator=generator).to(x) - 1)
    x = (x * factors[0]).clamp(0, 1)
    x = _blend(x, _grey(x).mean((-3, -2, -1), keepdim=True), factors[1])
    return _blend(x, _grey(x), factors[2]) if x.shape[1] == 3 else x


def _grey(x: Tensor) -> Tensor:
    if x.shape[1] != 3:
        return x.mean(1, keepdim=True)
    return (x * x.new_tensor(GREY)[:, None, None]).sum(1, keepdim=True)


def _blend(x: Tensor, other: Tensor, share: Tensor) -> Tensor:
    return (share * x + (1 - share) * other).clamp(0, 1)
