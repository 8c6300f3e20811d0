"""Pictures of many classes in one tensor, as episodes draw from them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fewstep.errors import InputError


@dataclass(frozen=True)
class ImageTable:
    """Pictures, one class after the other; classes may differ in size.

    images : uint8 [pictures, channels, height, width], 0..255, on any device, perhaps mapped from a file
    counts : int64 [classes], the number of pictures of each class;  names : of the classes

    >>> table = ImageTable(torch.arange(5, dtype=torch.uint8)[:, None, None, None], torch.tensor([2, 3]), ("a", "b"))
    >>> len(table), table.pick(torch.tensor([1, 0]), torch.tensor([2, 0])).flatten()
    (2, tensor([4, 0], dtype=torch.uint8))
    """

    images: Tensor
    counts: Tensor
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.images.dim() != 4 or self.images.dtype != torch.uint8:
            raise InputError(
                "the images of a table must be uint8 [pictures, channels, height, width], but "
                f"{self.images.dtype} {tuple(self.images.shape)} came"
            )
        if self.counts.dim() != 1 or int(self.counts.sum()) != len(self.images) or (self.counts < 1).any():
            raise InputError(
                f"counts must say how many of the {len(self.images)} pictures each class has, at least 1, but they "
                f"sum to {int(self.counts.sum())}"
            )

    @classmethod
    def of(cls, images: Tensor | ImageTable) -> ImageTable:
        """`images` itself, or the table of a tensor uint8 [classes, examples, channels, height, width]."""
        if isinstance(images, ImageTable):
            return images
        if images.dim() != 5 or images.dtype != torch.uint8:
            raise InputError(
                "images must be uint8 [classes, examples, channels, height, width], but "
                f"{images.dtype} {tuple(images.shape)} came"
            )
        classes, examples = images.shape[:2]
        return cls(images.flatten(0, 1), torch.full((classes,), examples))

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def fewest(self) -> int:
        """Pictures of the smallest class."""
        return int(self.counts.min())

    def smallest(self) -> str:
        """The smallest class, in words."""
        number = int(self.counts.argmin())
        return f"class {self.names[number]!r}" if self.names else f"class {number}"

    def pick(self, classes: Tensor, examples: Tensor) -> Tensor:
        """Picture `examples[...]` of class `classes[...]`: uint8 [..., channels, height, width]."""
        rows = (self.counts.cumsum(0) - self.counts)[classes] + examples
        return self.images[rows.to(self.images.device)]

    def to(self, device: torch.device | str) -> ImageTable:
        """The same pictures on a device."""
        return replace(self, images=self.images.to(device))
