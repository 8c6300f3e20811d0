"""Arrays of pictures, pickled and zipped, with their labels."""

from __future__ import annotations

import io
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.data.decode import Form
from fewstep.data.layouts import Collection, by_pickles
from fewstep.data.packed import packed_classes
from fewstep.errors import InputError
from tests.pictures import picture, put, red

pytestmark = pytest.mark.usefixtures("own_cache")


def tiered(top: Path) -> Collection:
    top.mkdir(parents=True)
    put(top / "train_labels.pkl", pickle.dumps({"label_specific": np.arange(3)}))
    return Collection("tiered", {"train": 3, "validation": 2, "test": 2}, "Get it.", (by_pickles,))


def test_both_layouts_of_tiered_imagenet_have_the_same_colours(top: Path) -> None:
    encoded = [picture(50 * value) for value in range(3)]
    known = tiered(top / "png")
    put(top / "png" / "train_images_png.pkl", pickle.dumps([np.frombuffer(each, np.uint8) for each in encoded]))
    tiered(top / "npz")
    # What its authors' script makes of the other by OpenCV, which puts blue first.
    decoded = [np.asarray(Image.open(io.BytesIO(each)))[..., ::-1] for each in encoded]
    np.savez(top / "npz" / "train_images.npz", images=np.stack(decoded))
    tables = [known.load("train", top / name, Form(12)) for name in ("png", "npz")]
    assert red(tables[0]) == [0, 50, 100]
    assert torch.equal(tables[0].images, tables[1].images)
    put(top / "npz" / "train_images_png.pkl", b"what the script read")
    assert torch.equal(known.load("train", top / "npz", Form(12)).images, tables[0].images)


def test_pictures_of_the_training_phase_are_no_validation_pictures(top: Path) -> None:
    for name in ("val", "train_phase_val"):
        np.savez(top / f"{name}_images.npz", images=np.full((2, 12, 12, 3), len(name), np.uint8))
        put(top / f"{name}_labels.pkl", pickle.dumps([0, 1]))
    with by_pickles(top, "val") as classes:
        assert classes["0"][0].name == "val_images.npz/0"


def some(count: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.zeros((count, 12, 12, 3), np.uint8)


MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "few pictures": ({"data": some(2), "labels": [0, 1, 2]}, r"has 2 pictures and .* labels of shape \[3\]"),
    "few labels": ({"data": some(3), "labels": [0, 1]}, r"has 3 pictures and .* labels of shape \[2\]"),
    "no labels": ({"data": some(3), "labels": 7}, r"labels of shape \[\]"),
    "no pictures": ({"data": 7, "labels": [0]}, "has 0 pictures"),
    "a row too many": ({"image_data": some(2), "class_dict": {"a": [0, 1], "b": [2]}}, "each row of image_data once"),
    "a row too few": ({"image_data": some(2), "class_dict": {"a": [0]}}, "each row of image_data once"),
    "a row twice": ({"image_data": some(2), "class_dict": {"a": [0, 1], "b": [1]}}, "each row of image_data once"),
}


@pytest.mark.parametrize(("content", "message"), MISFITS.values(), ids=MISFITS)
def test_labels_that_do_not_fit_the_pictures(content: dict[str, Any], message: str, top: Path) -> None:
    with pytest.raises(InputError, match=message):
        packed_classes(put(top / "few_train.pkl", pickle.dumps(content)))


def test_pictures_without_labels_or_of_another_shape(top: Path) -> None:
    np.savez(top / "val_images.npz", images=some(2)[..., 0])
    with pytest.raises(InputError, match=r"expected their labels in .*val_labels.pkl, which is not there"):
        packed_classes(top / "val_images.npz")
    put(top / "val_labels.pkl", pickle.dumps([0, 1]))
    with pytest.raises(InputError, match=r"should be \[pictures, height, width, 3\], but \[2, 12, 12\] came"):
        packed_classes(top / "val_images.npz")


def test_threads_share_what_is_unpickled_once(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(top / "few_train.pkl", pickle.dumps({"data": some(8), "labels": [0] * 8}))
    packed_classes(path)  # the labels are in the cache now
    opened: list[Path] = []
    real = pickle.Unpickler.load

    def load(found: Path) -> Any:
        opened.append(found)
        time.sleep(0.05)
        with found.open("rb") as file:
            return real(pickle.Unpickler(file))

    monkeypatch.setattr("fewstep.data.packed.load_plain", load)
    with ThreadPoolExecutor(4) as pool:
        assert len([*pool.map(lambda each: each.read(), packed_classes(path)["0"])]) == 8
    assert opened == [path]
