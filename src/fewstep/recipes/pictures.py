"""Few-shot classification of colour pictures, such as those in folders of your own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from fewstep import models
from fewstep.baselines import Baseline, trained_net
from fewstep.data.augment import Augment
from fewstep.data.episodes import ClassEpisodes
from fewstep.data.image_folder import load_image_folder, splits_of
from fewstep.data.layouts import Split
from fewstep.data.table import ImageTable
from fewstep.errors import InputError
from fewstep.models.own import own_network
from fewstep.protocol import Protocol
from fewstep.recipes.classification import PRETRAINED, ClassificationRecipe
from fewstep.run import Run

FIXED_NORMS = ("conv", "mlp")  # the networks whose norms go by the batch, and do not adapt, as in the paper


@dataclass(frozen=True, kw_only=True)
class PicturesRecipe(ClassificationRecipe):
    """Colour pictures, of whose nets and augmentations characters have no use."""

    network: str = "conv"  # type: ignore[assignment]
    """conv, four convolutions; mlp, fully connected layers 256-128-64-64; resnet12, a residual net of 12 layers; or
    MODULE:FUNCTION, which is called with num_classes=..., such as torchvision.models:resnet18, or one of yours."""
    filters: int = 32
    """Of each convolution; of the residual net's first block, and 2.5, 5 and 10 times as many in the others."""
    augment: bool = False
    """Shift, mirror and recolour the pictures of training, of the warm-up and of the pre-trained baseline too."""
    warm_up: int = 0
    """Iterations of training on all training classes together, 64 pictures each, before meta-training; what is stopped
    goes on. The pre-trained baseline is that net then, whatever --pretrain-iterations says; --pretrain-precision
    holds for it."""
    pool: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.network not in FIXED_NORMS and self.network != "resnet12" and ":" not in self.network:
            raise InputError(
                f"--network must be conv, mlp, resnet12 or MODULE:FUNCTION, which builds a net, but {self.network} came"
            )
        if self.warm_up and self.init_from:
            raise InputError("--warm-up trains new weights, and --init-from names other ones to begin with; give one")

    @property
    def adapting(self) -> str:
        return super().adapting if self.network in FIXED_NORMS else "*"

    def _network(self, ways: int) -> nn.Module:
        if self.network == "resnet12":
            widths = [self.filters * times // 2 for times in (2, 5, 10, 20)]
            return models.resnet12(ways, channels=self.channels, widths=widths)
        if self.network not in FIXED_NORMS:
            return own_network(self.network, ways, (self.channels, self.side, self.side))
        return super()._network(ways)

    @property
    def learner_options(self) -> dict[str, Any]:
        return {} if self.network in FIXED_NORMS else {"normalisation": "batch"}

    @property
    def changes(self) -> Augment | None:
        return self._augmentation if self.augment else None

    @property
    def _augmentation(self) -> Augment:
        return Augment(crop=self.side // 10)

    def all_protocols(self, most: int | None = None) -> list[Protocol]:
        found = super().all_protocols(most)
        last = found[-1]
        assert isinstance(last.tasks, ClassEpisodes)
        views = replace(last.tasks, augment=self._augmentation, views=5)
        return [*found, replace(last, permutations=1, tasks=views)]

    def baselines(self) -> list[Baseline]:
        return [self.pretrained(PRETRAINED, self.warm_up or self.pretrain_iterations)]

    @property
    def begun(self) -> str:
        warm = f"begun with a classifier of all classes, trained for {self.warm_up:,} iterations"
        return warm if self.warm_up else super().begun

    def first_model(self, run: Run) -> nn.Module:
        model = self.initial_model()
        if self.warm_up:
            (warm,) = self.baselines()
            model.load_state_dict(trained_net(warm, run)[0].state_dict())
        return model


@dataclass(frozen=True, kw_only=True)
class ImageFolderRecipe(PicturesRecipe):
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
    pretrain_iterations: int = 2_000
    """Iterations of the baseline that is trained on all classes, 64 pictures each: minutes, so that nobody waits for it
    longer than for the run itself."""

    @property
    def channels(self) -> int:  # type: ignore[override]
        return 1 if self.grey else 3

    @property
    def side(self) -> int:  # type: ignore[override]
        return self.size

    @property
    def summary(self) -> str:
        return f"your own pictures, --data DIR with a folder for each class: {super().summary}"

    def protocols(self) -> list[Protocol]:
        """As ever, and with each query by itself: what a classifier made by `fewstep adapt` does."""
        found = super().protocols()
        return [*found, replace(found[-1], name=f"{found[-1].name}, each by itself", normalisation="support")]

    @property
    def classes(self) -> dict[str, list[str]]:
        found = splits_of(self._folder, self.split_file, self.split_seed)
        return {split: sorted(classes) for split, classes in found.items()}

    def episodes(self, split: Split) -> ClassEpisodes:
        if (count := len(self.images(split))) < self.ways:
            raise InputError(
                f"{split}: {self.ways} ways asked of {count} classes; take at most --ways {count}, add classes (64 % "
                "are for training, 16 % for validation and 20 % for the test), or say in a --split-file which are "
                "for what"
            )
        return super().episodes(split)

    @property
    def _folder(self) -> Path:
        if self.data is None:
            raise InputError("say where the pictures are: --data DIR, which holds a folder of pictures for each class")
        return self.data

    def images(self, split: Split) -> ImageTable:
        return _loaded(
            split, self._folder, self.size, self.grey, self.split_file, self.split_seed, self.skip_unreadable
        )


@cache
def _loaded(split: Split, data: Path, size: int, grey: bool, split_file: Path | None, split_seed: int,
            skip_unreadable: bool) -> ImageTable:  # fmt: skip
    return load_image_folder(split, data=data, size=size, grey=grey, split_file=split_file, split_seed=split_seed,
                             skip_unreadable=skip_unreadable)  # fmt: skip
