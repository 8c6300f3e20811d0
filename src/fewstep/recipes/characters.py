"""Few-shot classification of characters: Omniglot, and glyphs, which need no download."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar, Literal

from torch import Tensor

from fewstep.data.glyphs import load_glyphs
from fewstep.data.layouts import Split
from fewstep.data.omniglot import load_omniglot
from fewstep.recipes.classification import ClassificationRecipe


@dataclass(frozen=True, kw_only=True)
class GlyphsRecipe(ClassificationRecipe):
    """Characters of the fonts that come with matplotlib: real few-shot classes with no download."""

    iterations: int = 5_000
    invert: ClassVar[bool] = True

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
    invert: ClassVar[bool] = True

    def images(self, split: Split) -> Tensor:
        return _omniglot(split, self.variant, self.splits, self.root)

    @property
    def rotate(self) -> bool:  # type: ignore[override]
        return self.splits == "authors"


@cache
def _omniglot(split: Split, variant: Literal["nearest", "antialias"], splits: Literal["authors", "vinyals"],
              root: Path | None) -> Tensor:  # fmt: skip
    return load_omniglot(split, variant=variant, splits=splits, root=root)
