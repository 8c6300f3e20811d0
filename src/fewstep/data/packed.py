"""The pickled and zipped arrays in circulation: pictures, and the label of each."""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Callable
from functools import cache, partial
from hashlib import blake2b
from operator import itemgetter
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fewstep.data.cache import cached_arrays
from fewstep.data.files import Picture
from fewstep.data.pickles import load_plain
from fewstep.data.places import is_file, stamp_of
from fewstep.errors import InputError


def packed_classes(path: Path) -> dict[str, list[Picture]]:
    """The pictures of each class in a file, or in one of pictures with the labels beside it.

    Nothing is read but the labels, and those once, until the content of a picture is asked for.
    """
    apart = "_images" in path.name
    labels_path = path.with_name(re.sub(r"_images.*", "_labels.pkl", path.name)) if apart else path
    if not is_file(labels_path):
        raise InputError(f"{path} holds pictures alone; expected their labels in {labels_path}, which is not there")
    stamp = blake2b(repr([stamp_of(each) for each in (path, labels_path)]).encode(), digest_size=16).hexdigest()
    lock = Lock()

    @cache
    def load() -> tuple[Any, NDArray[Any]]:
        return _arrays(path, labels_path)

    def content() -> tuple[Any, NDArray[Any]]:
        with lock:  # else each thread would load gigabytes of its own
            return load()

    found = cached_arrays("labels", ("labels",), stamp, lambda: {"labels": content()[1].astype(str)})
    classes: dict[str, list[Picture]] = {}
    for row, label in enumerate(found["labels"].tolist()):
        picture = Picture(f"{path.name}/{row}", f"{path}, picture {row}", (row, stamp), partial(_row, content, row))
        classes.setdefault(label, []).append(picture)
    return dict(sorted(classes.items(), key=lambda item: (len(item[0]), item[0])))  # numbers in their order


def _row(content: Callable[[], tuple[Any, Any]], row: int) -> bytes | NDArray[np.uint8]:
    data = np.asarray(content()[0][row])
    return data.tobytes() if data.ndim < 3 else data  # a vector is a file's content


def _arrays(path: Path, labels_path: Path) -> tuple[Any, NDArray[Any]]:
    """Pictures, and the label of each."""
    images, told = _halves(path, labels_path)
    labels = np.asarray(told)
    pictures = len(images) if isinstance(images, (list, tuple)) or np.ndim(images) else 0
    if labels.ndim != 1 or pictures != len(labels):
        raise InputError(
            f"expected one label for each picture, but {path} has {pictures} pictures and {labels_path} labels of "
            f"shape {list(labels.shape)}; get them anew"
        )
    return images, labels


def _halves(path: Path, labels_path: Path) -> tuple[Any, Any]:
    found = _npz(path) if path.suffix == ".npz" else load_plain(path)
    if labels_path != path:
        told = load_plain(labels_path)
        keys = [key for key in ("label_specific", "labels") if isinstance(told, dict) and key in told]
        return found, told[keys[0]] if keys else told
    if isinstance(found, dict) and {"image_data", "class_dict"} <= set(found):
        rows = sorted(((row, name) for name, own in found["class_dict"].items() for row in own), key=itemgetter(0))
        if [row for row, _ in rows] != [*range(len(found["image_data"]))]:
            raise InputError(f"class_dict in {path} should name each row of image_data once; get the file anew")
        return found["image_data"], [name for _, name in rows]
    if isinstance(found, dict) and {"data", "labels"} <= set(found):
        return found["data"], found["labels"]
    came = f"the keys {', '.join(map(str, found))}" if isinstance(found, dict) else type(found).__name__
    raise InputError(f"{path} should hold image_data and class_dict, or data and labels, but {came:.80} came")


def _npz(path: Path) -> NDArray[Any]:
    """Pictures as tieredImageNet's authors keep them, who read and write them by OpenCV: blue, green, red."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            images: NDArray[Any] = archive["images"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{path} should hold an array images, but cannot be read ({error})") from error
    if images.ndim != 4 or images.shape[-1] != 3:
        raise InputError(f"images in {path} should be [pictures, height, width, 3], but {list(images.shape)} came")
    return images[..., ::-1]
