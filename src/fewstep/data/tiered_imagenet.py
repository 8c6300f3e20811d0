"""tieredImageNet (Ren et al. 2018): 608 classes of ImageNet, split by their 34 super-classes."""

from __future__ import annotations

from pathlib import Path

from fewstep.data.decode import Form
from fewstep.data.layouts import Collection, Split, by_folders, by_pickles
from fewstep.data.table import ImageTable

TIERED_IMAGENET = Collection(
    "tiered_imagenet",
    {"train": 351, "validation": 97, "test": 160},
    "Its pictures are ImageNet's, which no program may hand out: get them as the authors' repository "
    "(renmengye/few-shot-ssl-public) says, and name the folder above them with FEWSTEP_DATA. In the folder "
    "tiered_imagenet there may be: train_images_png.pkl with train_labels.pkl and so on; or train/CLASS/*.jpg and so "
    "on",
    (by_folders, by_pickles),
)


def load_tiered_imagenet(split: Split, *, size: int = 84, root: Path | None = None) -> ImageTable:
    """The pictures of one split: 351 classes for training, 97 for validation, 160 for the test; some 1,280 each.

    size : pixels of a side;  root : as for `load_mini_imagenet`
    Layouts: `train_images_png.pkl` or `train_images.npz` (blue, green, red, as the authors' script writes it) with
    `train_labels.pkl`; `train/CLASS/*.jpg`. Decoded it takes 16 GB of the cache folder.
    """
    return TIERED_IMAGENET.load(split, root, Form(size))
