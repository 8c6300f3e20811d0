"""CIFAR-FS (Bertinetto et al. 2019): the 100 classes of CIFAR-100, 600 pictures each, split at random."""

from __future__ import annotations

from pathlib import Path

from fewstep.data.decode import Form
from fewstep.data.layouts import Collection, Split, by_class_lists, by_folders, by_pickles
from fewstep.data.table import ImageTable

CIFAR_FS = Collection(
    "cifar_fs",
    {"train": 64, "validation": 16, "test": 20},
    "Get cifar100.zip as its authors' repository (bertinetto/r2d2) says, and name the folder above it with "
    "FEWSTEP_DATA. In the folder cifar_fs there may be: cifar100/data/CLASS/*.png with "
    "cifar100/splits/bertinetto/train.txt and so on; or train/CLASS/*.png and so on; or CIFAR_FS_train.pickle and so "
    "on",
    (by_class_lists, by_folders, by_pickles),
)


def load_cifar_fs(split: Split, *, size: int = 32, root: Path | None = None) -> ImageTable:
    """The pictures of one split: 64 classes for training, 16 for validation, 20 for the test.

    size : pixels of a side;  root : as for `load_mini_imagenet`
    Layouts: `cifar100/data/CLASS/*.png` with the class names in `cifar100/splits/bertinetto/train.txt`, `val.txt`,
    `test.txt`; `train/CLASS/*.png`; `CIFAR_FS_train.pickle`.
    """
    return CIFAR_FS.load(split, root, Form(size))
