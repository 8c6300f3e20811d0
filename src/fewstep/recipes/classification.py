"""N-way K-shot classification of Omniglot and glyphs (Finn et al. 2017, section 5.2)."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fewstep import models
from fewstep.baselines import Baseline, pretrain_on_classes
from fewstep.data.episodes import ClassEpisodes, Episodes
from fewstep.data.glyphs import load_glyphs
from fewstep.data.omniglot import load_omniglot
from fewstep.errors import InputError
from fewstep.functional import Loss
from fewstep.losses import summed_over_ways
from fewstep.normalisation import MEANINGS
from fewstep.recipes.base import Recipe, Split

RATES = (0.01, 0.03, 0.1, 0.3, 1.0)


@dataclass(frozen=True, kw_only=True)
class ClassificationRecipe(Recipe):
    """The inner rate acts on the cross-entropy summed over ways, N x its mean, as in the authors' code."""

    ways: int = 5
    """Classes of a task (N)."""
    shots: int = 1
    """Support examples of each class (K)."""
    queries: int | None = None
    """Query examples of each class; None takes as many as shots, as the authors do."""
    network: Literal["conv", "mlp"] = "conv"
    """Four convolutions, or fully connected layers 256-128-64-64."""
    inner_lr: float = 0.4
    pretrain_iterations: int = 10_000
    """Iterations of the baseline that is trained on all classes, 128 pictures each."""

    metric: ClassVar[str] = "accuracy"
    adapt: ClassVar[str] = "~*.offset"
    rotate: ClassVar[bool] = False

    @abstractmethod
    def images(self, split: Split) -> Tensor:
        """The pictures of a split: uint8 [classes, 20, 1, 28, 28]."""

    @property
    def summary(self) -> str:
        return (
            f"{self.ways}-way {self.shots}-shot classification, {self.network} net: inner rate {self.inner_lr}, "
            f"inner steps {self.inner_steps}, {self.meta_batch} tasks"
        )

    def model(self) -> nn.Module:
        return self._network(self.ways)

    def _network(self, ways: int) -> nn.Module:
        return models.conv4(ways) if self.network == "conv" else models.mlp(784, ways, (256, 128, 64, 64), norm=True)

    @property
    def loss(self) -> Loss:
        return summed_over_ways

    def episodes(self, split: Split) -> ClassEpisodes:
        return ClassEpisodes(
            tasks=self.meta_batch if split == "train" else 20,
            seed=self.seed_of(split),
            device=self.device,
            images=self.images(split).to(self.device),
            ways=self.ways,
            shots=self.shots,
            queries=self.shots if self.queries is None else self.queries,
            rotate=self.rotate,
        )

    def protocols(self) -> dict[str, Episodes]:
        test = self.episodes("test")
        most = min(15, test.table.fewest - self.shots)
        names = {count: f"{count} {'query' if count == 1 else 'queries'} per class" for count in (test.queries, most)}
        return {name: replace(test, queries=count) for count, name in names.items()}

    def protocol(self, episodes: Episodes) -> dict[str, Any]:
        if not isinstance(episodes, ClassEpisodes):
            raise InputError(f"classification episodes expected, but {type(episodes).__name__} came")
        return {
            "ways": episodes.ways,
            "shots": episodes.shots,
            "queries_per_class": episodes.queries,
            "normalisation": MEANINGS["batch"],
            "class_rotations": episodes.rotate,
            "inner_lr": self.inner_lr,
            "loss": "cross-entropy summed over ways (N x mean)",
            "evaluation_seed": self.evaluation_seed,
        }

    def baselines(self) -> list[Baseline]:
        settings = {"iterations": self.pretrain_iterations, "seed": self.seed}
        name = "pre-trained on all classes, fine-tuned"
        return [Baseline(name, self.initial_model, self._pretrain, settings, self.test_steps, RATES)]

    def _pretrain(self, model: nn.Module) -> dict[str, Any]:
        """Give `model` the body of a classifier of all training classes, and a head of zeros."""
        images = self.images("train").to(self.device)
        classifier = self.seeded(lambda: self._network(len(images)))
        pretrain_on_classes(classifier, images, iterations=self.pretrain_iterations, seed=self.seed, rotate=self.rotate)
        trained = classifier.state_dict()
        for name, value in model.state_dict().items():
            value.copy_(trained[name] if trained[name].shape == value.shape else torch.zeros_like(value))
        return {}


@dataclass(frozen=True, kw_only=True)
class GlyphsRecipe(ClassificationRecipe):
    """Characters of the fonts that come with matplotlib: real few-shot classes with no download."""

    iterations: int = 5_000

    def images(self, split: Split) -> Tensor:
        return load_glyphs(split)


@dataclass(frozen=True, kw_only=True)
class OmniglotRecipe(ClassificationRecipe):
    """Omniglot, 1,623 hand-written characters x 20 drawers; downloaded unless FEWSTEP_DATA names a folder."""

    variant: Literal["nearest", "antialias"] = "nearest"
    """How pictures become 28 x 28: binary as in the authors' code, or with grey edges."""
    splits: Literal["authors", "vinyals"] = "authors"
    """1100/100/423 characters drawn by a seed, or the fixed lists of Vinyals et al. with rotations as classes."""
    root: Path | None = None
    """Folder with the Omniglot zips or folders."""

    def images(self, split: Split) -> Tensor:
        return _omniglot(split, self.variant, self.splits, self.root)

    @property
    def rotate(self) -> bool:  # type: ignore[override]
        return self.splits == "authors"


@cache
def _omniglot(split: Split, variant: Literal["nearest", "antialias"], splits: Literal["authors", "vinyals"],
              root: Path | None) -> Tensor:  # fmt: skip
    return load_omniglot(split, variant=variant, splits=splits, root=root)
