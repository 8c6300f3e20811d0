"""Few-shot classification of colour pictures: Mini-ImageNet, and your own folders."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

from fewstep.data.image_folder import load_image_folder
from fewstep.data.mini_imagenet import load_mini_imagenet
from fewstep.data.table import ImageTable
from fewstep.errors import InputError
from fewstep.recipes.base import Split
from fewstep.recipes.classification import ClassificationRecipe


@dataclass(frozen=True, kw_only=True)
class MiniImageNetRecipe(ClassificationRecipe):
    """Mini-ImageNet, 100 classes of 600 colour pictures, read from the user's own copy; FEWSTEP_DATA names its folder.

    The authors cut each element of their meta-gradient at 10, on a loss that is queries / shots times ours.
    """

    meta_batch: int = 4
    inner_lr: float = 0.01
    inner_steps: int = 5
    queries: int | None = 15
    filters: int = 32
    clip: float | None = 10 / 15
    root: Path | None = None
    """Folder with the user's copy."""

    channels: ClassVar[int] = 3
    side: ClassVar[int] = 84
    pool: ClassVar[bool] = True

    def images(self, split: Split) -> ImageTable:
        return _mini_imagenet(split, self.root)


@dataclass(frozen=True, kw_only=True)
class ImageFolderRecipe(ClassificationRecipe):
    """Your own pictures: a folder with a folder of pictures for each class."""

    data: Path | None = None
    """The folder: class folders, or train, val and test with class folders each."""
    split_file: Path | None = None
    """Lines class,split with the splits train, val and test; else classes are split by --split-seed."""
    split_seed: int = 0
    """Seed of the split by class: 64 % train, 16 % validation, 20 % test."""
    skip_unreadable: bool = False
    """Leave damaged pictures out; else they are an error."""
    size: int = 84
    """Pixels of a side; pictures are cropped to a square and resized."""
    grey: bool = False
    """One channel instead of three."""
    iterations: int = 10_000
    meta_batch: int = 4
    inner_lr: float = 0.01
    inner_steps: int = 5
    queries: int | None = 5
    test_queries: int | None = 5
    filters: int = 32
    pool: ClassVar[bool] = True

    @property
    def channels(self) -> int:  # type: ignore[override]
        return 1 if self.grey else 3

    @property
    def side(self) -> int:  # type: ignore[override]
        return self.size

    @property
    def summary(self) -> str:
        return f"your own pictures, --data DIR with a folder for each class: {super().summary}"

    def images(self, split: Split) -> ImageTable:
        if self.data is None:
            raise InputError("say where the pictures are: --data DIR, which holds a folder of pictures for each class")
        return _folder(split, self.data, self.size, self.grey, self.split_file, self.split_seed, self.skip_unreadable)


@cache
def _mini_imagenet(split: Split, root: Path | None) -> ImageTable:
    return load_mini_imagenet(split, root=root)


@cache
def _folder(split: Split, data: Path, size: int, grey: bool, split_file: Path | None, split_seed: int,
            skip_unreadable: bool) -> ImageTable:  # fmt: skip
    return load_image_folder(split, data=data, size=size, grey=grey, split_file=split_file, split_seed=split_seed,
                             skip_unreadable=skip_unreadable)  # fmt: skip
