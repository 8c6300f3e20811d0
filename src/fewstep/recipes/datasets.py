"""Few-shot classification of the colour pictures of the literature, read from the user's own copy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

from fewstep.data.cifar_fs import load_cifar_fs
from fewstep.data.episodes import Episodes
from fewstep.data.fc100 import load_fc100
from fewstep.data.layouts import Split
from fewstep.data.mini_imagenet import load_mini_imagenet
from fewstep.data.table import ImageTable
from fewstep.data.tiered_imagenet import load_tiered_imagenet
from fewstep.learner import Learner
from fewstep.progress import narrate
from fewstep.recipes.pictures import PicturesRecipe

AUTHORS_CLIPS = (10 / 15, 10 * 5 / 15)  # of the named recipes
Load = Callable[..., ImageTable]


@dataclass(frozen=True, kw_only=True)
class DatasetRecipe(PicturesRecipe):
    """Settings are the MAML authors' on Mini-ImageNet; for the others they have published none.

    The authors cut each element of their meta-gradient at 10, on a loss that is queries / shots times ours.
    """

    meta_batch: int = 4
    inner_lr: float = 0.01
    inner_steps: int = 5
    queries: int | None = 15
    clip: float | None = 10 / 15
    root: Path | None = None
    """Folder with the user's copy."""

    channels: ClassVar[int] = 3
    load: ClassVar[Load]

    def check(self, learner: Learner, episodes: Episodes) -> None:
        super().check(learner, episodes)
        queries = self.shots if self.queries is None else self.queries
        if self.clip in AUTHORS_CLIPS and abs(self.clip - (own := 10 * self.shots / queries)) > 1e-9:
            narrate(f"--clip {self.clip:.4g} is the authors' for other numbers of shots or queries; for {self.shots} "
                    f"and {queries} theirs is --clip {own:.4g}")  # fmt: skip

    def images(self, split: Split) -> ImageTable:
        return _loaded(type(self).load, split, self.side, self.root)


@dataclass(frozen=True, kw_only=True)
class MiniImageNetRecipe(DatasetRecipe):
    """Mini-ImageNet, 100 classes of 600 colour pictures; FEWSTEP_DATA names the folder of the user's copy."""

    side: ClassVar[int] = 84
    load: ClassVar[Load] = load_mini_imagenet


@dataclass(frozen=True, kw_only=True)
class TieredImageNetRecipe(DatasetRecipe):
    """tieredImageNet, 608 classes of some 1,280 colour pictures; FEWSTEP_DATA names the folder of the user's copy."""

    side: ClassVar[int] = 84
    load: ClassVar[Load] = load_tiered_imagenet


@dataclass(frozen=True, kw_only=True)
class CifarFSRecipe(DatasetRecipe):
    """CIFAR-FS, the 100 classes of CIFAR-100 split at random; FEWSTEP_DATA names the folder of the user's copy."""

    side: ClassVar[int] = 32
    load: ClassVar[Load] = load_cifar_fs


@dataclass(frozen=True, kw_only=True)
class FC100Recipe(DatasetRecipe):
    """FC100, the 100 classes of CIFAR-100 split by super-classes; FEWSTEP_DATA names the folder of the user's copy."""

    side: ClassVar[int] = 32
    load: ClassVar[Load] = load_fc100


COLLECTIONS: dict[str, type[DatasetRecipe]] = {
    "cifar-fs": CifarFSRecipe,
    "fc100": FC100Recipe,
    "tieredimagenet": TieredImageNetRecipe,
    "miniimagenet": MiniImageNetRecipe,
}


@cache
def _loaded(load: Load, split: Split, size: int, root: Path | None) -> ImageTable:
    return load(split, size=size, root=root)
