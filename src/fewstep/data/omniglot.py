"""Omniglot (Lake et al. 2015): 1,623 characters of 50 alphabets, each drawn by 20 people."""

from __future__ import annotations

import os
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from fewstep.data.cache import Arrays, cache_folder, cached_arrays, data_folders, fetch, one_of, steps
from fewstep.data.contents import contents
from fewstep.data.episodes import rotate_quarters
from fewstep.data.files import DAMAGE, Picture, damaged, pictures_in
from fewstep.data.places import is_file, is_folder
from fewstep.errors import InputError

CHARACTERS, DRAWERS, SIDE = 1623, 20, 28
HALVES = {
    "images_background": "md5:68d2efa1b9178cc56df9314c21c6e718",
    "images_evaluation": "md5:6b91aef0f799c5bb55b94e3f2daec811",
}
VINYALS = {
    "train": "sha256:984522c194c30fb678ce53304a160a42faf5403ad4f9a67010f32dd3a35738e0",
    "val": "sha256:11f99e54faee3e26f53d3231c1cceac5bf7b8730e9be31cb6dab256551dc0c1a",
    "test": "sha256:845264cc5c156180828ccf17915668b17ee21424d0170df6e7d81676aa5d1204",
}
URL = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"
VINYALS_URL = "https://raw.githubusercontent.com/jakesnell/prototypical-networks/master/data/omniglot/splits/vinyals"

Files = dict[str, Picture]


def load_omniglot(
    split: Literal["train", "validation", "test"],
    *,
    variant: Literal["nearest", "antialias"] = "nearest",
    splits: Literal["authors", "vinyals"] = "authors",
    split_seed: int = 1,
    root: Path | None = None,
    download: bool = True,
) -> Tensor:
    """Pictures of one split: uint8 [classes, 20, 1, 28, 28], stroke 255 on 0, for `ClassEpisodes(images=...)`.

    variant : "nearest", pictures of two values as the MAML authors' code really feeds them (Pillow takes the
        nearest pixel when it resizes a 1-bit picture); "antialias", the smooth ones that code seems to ask for
    splits : "authors", the characters shuffled by `split_seed`: 1100 train, 100 validation, 423 test, to be used
        with `ClassEpisodes(rotate=True)`; "vinyals", the fixed lists of Vinyals et al. (2016), where
        a turned character is a class of its own: 4 x 1028, 4 x 172, 4 x 423. Class 4i + q is character i turned
        by q quarters counter-clockwise (`rotRRR` in the lists, as `PIL.Image.rotate` and `torch.rot90` turn)
    root : a folder with `images_background` and `images_evaluation`, each a zip or a folder, and for "vinyals"
        `splits_vinyals/{train,val,test}.txt`. Without it `$FEWSTEP_DATA` is searched (there `omniglot` first),
        then the cache folder, into which the data are downloaded (15 MB) where `download` allows it.
        `$FEWSTEP_OMNIGLOT_URL` names another server that holds the same files
    """
    one_of("split", split, ("train", "validation", "test"))
    one_of("variant", variant, ("nearest", "antialias"))
    one_of("splits", splits, ("authors", "vinyals"))
    with open_files(find_halves(root, download)) as files:
        names = sorted(files)
        recipe = (variant, PIL.__version__, names, contents([files[name] for name in names]))
        table = cached_arrays(f"omniglot-{variant}", ("images", "names"), recipe, lambda: decode(files, variant))
    images = torch.from_numpy(table["images"])[:, :, None]
    if splits == "vinyals":
        return _vinyals(split, images, [str(name) for name in table["names"]], root, download)
    order = list(range(CHARACTERS))
    random.Random(split_seed).shuffle(order)
    return images[{"train": order[:1100], "validation": order[1100:1200], "test": order[1200:]}[split]]


def _vinyals(split: str, images: Tensor, names: list[str], root: Path | None, download: bool) -> Tensor:
    """The classes of one of the lists, in its order; each line is a character and a turn."""
    stem = "val" if split == "validation" else split
    folders = [*data_folders("omniglot", root), cache_folder() / "omniglot"]
    found = [path for folder in folders if (path := folder / "splits_vinyals" / f"{stem}.txt").is_file()]
    if not found and not download:
        raise InputError(f"no splits_vinyals/{stem}.txt in {_listed(folders)}; put it there, or allow the download")
    mirror = os.environ.get("FEWSTEP_OMNIGLOT_URL")
    base = f"{mirror.rstrip('/')}/splits_vinyals" if mirror else VINYALS_URL
    path = found[0] if found else fetch(f"{base}/{stem}.txt", VINYALS[stem], folders[-1] / "splits_vinyals")
    index = {name: i for i, name in enumerate(names)}
    chosen, quarters = [], []
    for line in filter(None, map(str.strip, path.read_text(encoding="utf-8", errors="replace").split("\n"))):
        match = re.fullmatch(r"(.+)/rot(000|090|180|270)", line)
        if not match or match[1] not in index:
            raise InputError(f"{path}: expected Alphabet/characterNN/rotRRR on each line, but {line!r:.80} came")
        chosen.append(index[match[1]])
        quarters.append(int(match[2]) // 90)
    return rotate_quarters(images[None, chosen], torch.tensor(quarters)[None])[0]


def find_halves(root: Path | None, download: bool) -> list[Path]:
    """The two halves, each a zip or a folder: in the first folder that holds them, else downloaded."""
    own = cache_folder() / "omniglot"
    given = data_folders("omniglot", root)
    folders = [*given, own] if root is None else given
    for folder in folders:
        halves = [path for name in HALVES if (path := _half(folder, name))]
        if len(halves) == len(HALVES):
            return halves
        if halves and folder != own:
            raise InputError(f"{folder} holds {halves[0].name} alone; expected {' and '.join(HALVES)} there")
    url = os.environ.get("FEWSTEP_OMNIGLOT_URL", URL).rstrip("/")
    if not download or root is not None:
        raise InputError(
            f"no Omniglot in {_listed(folders)}; give the folder that holds images_background.zip and "
            f"images_evaluation.zip with FEWSTEP_DATA, or leave root out and allow the download from {url}"
        )
    return [fetch(f"{url}/{name}.zip", known_hash, own) for name, known_hash in HALVES.items()]


def _half(folder: Path, name: str) -> Path | None:
    archive, unpacked = folder / f"{name}.zip", folder / name
    return archive if is_file(archive) else unpacked if is_folder(unpacked) else None


def _listed(folders: list[Path]) -> str:
    return ", ".join(map(str, folders))


@contextmanager
def open_files(halves: list[Path]) -> Iterator[Files]:
    """All pictures of the two halves by `Alphabet/characterNN/NNNN_DD.png`; zips stay open meanwhile."""
    with pictures_in(halves) as found:
        names = {name: re.search(r"(?:^|/)([^/]+/character\d+/\d+_\d+\.png)$", name) for name in found}
        yield {match[1]: found[name] for name, match in names.items() if match}


def decode(files: Files, variant: str, characters: int = CHARACTERS) -> Arrays:
    """The table in order of the characters' names. images: uint8 [characters, 20, 28, 28], names: [characters]."""
    drawings: dict[str, list[str]] = {}
    for name in sorted(files):
        drawings.setdefault(name.rsplit("/", 1)[0], []).append(name)
    uneven = [character for character, names in drawings.items() if len(names) != DRAWERS]
    if len(drawings) != characters or uneven:
        amiss = f"{len(drawings[uneven[0]])} drawings of {uneven[0]}" if uneven else f"{len(drawings)} characters"
        raise InputError(
            f"Omniglot is not complete: expected {characters} characters of {DRAWERS} drawings, got {amiss}; "
            "unpack it or download it again"
        )
    images = np.empty((characters, DRAWERS, SIDE, SIDE), np.uint8)
    for row, names in zip(images, steps(list(drawings.values()), "decoding Omniglot"), strict=True):
        for column, name in enumerate(names):
            try:
                row[column] = shrink(files[name].read(), variant)
            except (*DAMAGE, OSError, SyntaxError) as error:
                raise InputError(damaged(files[name].where, error)) from error
    return {"images": images, "names": np.array(list(drawings))}


def shrink(png: bytes, variant: str) -> NDArray[np.uint8]:
    """One drawing, black on white, as uint8 [28, 28], stroke 255 on 0."""
    with Image.open(BytesIO(png), formats=["PNG"]) as picture:
        if variant == "nearest":
            bits = picture.convert("1", dither=Image.Dither.NONE).resize((SIDE, SIDE), Image.Resampling.NEAREST)
            return np.where(np.asarray(bits), 0, 255).astype(np.uint8)
        return 255 - np.asarray(picture.convert("L").resize((SIDE, SIDE), Image.Resampling.LANCZOS))
