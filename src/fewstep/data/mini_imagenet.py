"""Mini-ImageNet (Vinyals et al. 2016) as Ravi and Larochelle (2017) split it: 100 classes of 600 colour pictures."""

from __future__ import annotations

from pathlib import Path

from fewstep.data.decode import Form
from fewstep.data.layouts import Collection, Split, by_folders, by_lists, by_pickles
from fewstep.data.table import ImageTable

MINI_IMAGENET = Collection(
    "mini_imagenet",
    {"train": 64, "validation": 16, "test": 20},
    "Its pictures are ImageNet's, which no program may hand out: get them from image-net.org or from someone who "
    "may share them, and name the folder above them with FEWSTEP_DATA. In the folder mini_imagenet there may be: "
    "train.csv, val.csv and test.csv (filename,label) with images/ or zips beside them; or train/CLASS/*.jpg and so "
    "on; or mini-imagenet-cache-train.pkl and so on",
    (by_lists, by_folders, by_pickles),
)


def load_mini_imagenet(split: Split, *, size: int = 84, root: Path | None = None) -> ImageTable:
    """The pictures of one split: 64 classes for training, 16 for validation, 20 for the test.

    size : pixels of a side; other pictures are resized by Lanczos' filter, as the MAML authors do, and not cropped
    root : the folder of the user's copy, or one above it; without it `$FEWSTEP_DATA` is searched. Layouts: `train.csv`,
        `val.csv`, `test.csv` (filename,label) with `images/` or zips beside them; `train/CLASS/*.jpg`; the pickles in
        circulation (`mini-imagenet-cache-train.pkl`, `miniImageNet_category_split_train_phase_train.pickle`)
    The pictures are decoded once into the cache folder (1.3 GB for all splits), from which all processes map them.
    """
    return MINI_IMAGENET.load(split, root, Form(size))
