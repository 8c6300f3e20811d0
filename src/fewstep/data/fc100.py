"""FC100 (Oreshkin et al. 2018): CIFAR-100 split by its super-classes, so that test classes are new in kind."""

from __future__ import annotations

from pathlib import Path

from fewstep.data.decode import Form
from fewstep.data.layouts import Collection, Split, by_folders, by_pickles
from fewstep.data.table import ImageTable

FC100 = Collection(
    "fc100",
    {"train": 60, "validation": 20, "test": 20},
    "Get FC100_train.pickle, FC100_val.pickle and FC100_test.pickle as the repository of MetaOptNet says, put them "
    "into a folder fc100, and name the folder above it with FEWSTEP_DATA. Or have fc100/train/CLASS/*.png and so on",
    (by_folders, by_pickles),
)


def load_fc100(split: Split, *, size: int = 32, root: Path | None = None) -> ImageTable:
    """The pictures of one split: 60 classes for training, 20 for validation, 20 for the test.

    size : pixels of a side;  root : as for `load_mini_imagenet`
    Layouts: `FC100_train.pickle`, `FC100_val.pickle`, `FC100_test.pickle`; `train/CLASS/*.png`.
    """
    return FC100.load(split, root, Form(size))
