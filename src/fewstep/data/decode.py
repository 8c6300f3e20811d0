"""Picture files become one uint8 tensor: decoded once, in parallel, then mapped from a file in the cache folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from fewstep.data.cache import cache_path, steps, warn_unwritable, write_whole
from fewstep.data.contents import contents
from fewstep.data.files import Picture, more
from fewstep.errors import InputError
from fewstep.progress import narrate

Pixels = NDArray[np.uint8]
# Pillow knows more: some are no pictures, and for EPS it calls a program.
KINDS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA", "ICO")
NAMED = 10  # files in a message


@dataclass(frozen=True)
class Form:
    """What pictures become: uint8 [channels, size, size].

    channels : 3, or 1 for grey
    crop : the largest square in the middle, resized; else the whole picture, its sides stretched alike or not
    invert : dark becomes light, as Omniglot's black strokes become 255
    """

    size: int
    channels: int = 3
    crop: bool = False
    invert: bool = False

    def __post_init__(self) -> None:
        if not 8 <= self.size <= 512 or self.channels not in (1, 3):
            raise InputError(
                f"pictures become 8 to 512 pixels wide, with 1 or 3 channels, but {self.size} and {self.channels} came"
            )


def decoded(stem: str, pictures: Sequence[Picture], form: Form, skip: bool = False) -> tuple[Tensor, list[int]]:
    """The pixels of all pictures, uint8 [pictures, channels, size, size], and the places of those left out of it.

    The tensor is mapped from a file in the cache, which is keyed by the pictures' contents, so that several processes
    share its memory.
    skip : leave unreadable pictures out, and name them; else they raise `InputError`
    """
    recipe = form, PIL.__version__, contents(pictures)
    path = cache_path(f"{stem}-{form.size}.npy", recipe, __name__)
    if (known := _known_faults(path)) is None:
        faults: dict[int, str] = {}
        known = faults
        try:
            write_whole(path, lambda file: _write(file, path, pictures, form, faults))
        except OSError as error:
            warn_unwritable(path, error)
            return decoded_now(pictures, form, skip)
    # Copy on write: PyTorch knows no tensor that cannot be written to.
    return _without(np.load(path, mmap_mode="c"), pictures, known, skip)


def decoded_now(pictures: Sequence[Picture], form: Form, skip: bool = False) -> tuple[Tensor, list[int]]:
    """As `decoded`, without the cache."""
    faults: dict[int, str] = {}
    return _without(np.stack([*_rows(pictures, form, faults)]), pictures, faults, skip)


def _known_faults(path: Path) -> dict[int, str] | None:
    """What is amiss with pictures, by their place; None where they have not been decoded yet."""
    try:
        np.load(path, mmap_mode="r")
        return {int(place): fault for place, fault in json.loads(path.with_suffix(".json").read_text()).items()}
    except (OSError, ValueError, EOFError, AttributeError):
        return None


def _write(file: BinaryIO, path: Path, pictures: Sequence[Picture], form: Form, faults: dict[int, str]) -> None:
    """The array, row by row; then what is amiss, in a file that is there before the array is."""
    shape = (len(pictures), form.channels, form.size, form.size)
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    for row in _rows(pictures, form, faults):
        file.write(row.tobytes())
    write_whole(path.with_suffix(".json"), lambda other: _dump(faults, other))


def _dump(content: Any, file: BinaryIO) -> None:
    file.write(json.dumps(content).encode())


def _rows(pictures: Sequence[Picture], form: Form, faults: dict[int, str]) -> Iterator[Pixels]:
    """The pixels of each picture; zeros and a fault for those that cannot be read."""

    def one(picture: Picture) -> Pixels | str:
        content = picture.content()
        if isinstance(content, str):
            return content
        try:
            return pixels(content, form)
        except UnidentifiedImageError:
            return "of no kind that is read, such as PNG or JPEG"
        except Exception as error:  # a damaged file can make its reader fail in any way
            return " ".join(str(error).split()) or type(error).__name__

    # Pillow decodes without the interpreter's lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for place, row in enumerate(steps(pool.map(one, pictures), "decoding pictures", len(pictures))):
            if isinstance(row, str):
                faults[place] = row
            yield np.zeros((form.channels, form.size, form.size), np.uint8) if isinstance(row, str) else row


def _without(
    array: Pixels, pictures: Sequence[Picture], faults: dict[int, str], skip: bool
) -> tuple[Tensor, list[int]]:
    images = torch.from_numpy(array)
    if not faults:
        return images, []
    told = _told(pictures, faults)
    if not skip:
        raise InputError(f"{told}; mend, convert or delete that, or have it left out (--skip-unreadable)")
    narrate(f"left out: {told}")
    return images[[place for place in range(len(pictures)) if place not in faults]], sorted(faults)


def _told(pictures: Sequence[Picture], faults: dict[int, str]) -> str:
    if len(faults) == 1:
        ((place, fault),) = faults.items()
        return f"{pictures[place].where} cannot be read as a picture ({fault})"
    named = [f"{pictures[place].where} ({faults[place]})" for place in sorted(faults)[:NAMED]]
    return f"{len(faults)} files cannot be read as pictures: {', '.join(named)}{more(len(faults) - NAMED)}"


@cache
def _kinds() -> list[str]:
    """Of the kinds of pictures that are read, those that this Pillow can."""
    Image.init()
    return [kind for kind in KINDS if kind in Image.OPEN]


def pixels(data: bytes | Pixels, form: Form) -> Pixels:
    """One picture, the content of its file or pixels, as uint8 [channels, size, size]. What is transparent becomes
    white."""
    opened = Image.open(BytesIO(data), formats=_kinds()) if isinstance(data, bytes) else Image.fromarray(data)
    with opened as file:
        picture = _eight_bits(ImageOps.exif_transpose(file), file.format)
    if "transparency" in picture.info or picture.mode in ("LA", "PA", "RGBA", "RGBa", "La"):
        seen = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", seen.size, "white"), seen)
    picture = picture.convert("RGB" if form.channels == 3 else "L")
    side = (form.size, form.size)
    if picture.size != side:
        how = Image.Resampling.LANCZOS
        picture = ImageOps.fit(picture, side, how) if form.crop else picture.resize(side, how)
    array = 255 - np.asarray(picture) if form.invert else np.asarray(picture)
    return np.ascontiguousarray(array.transpose(2, 0, 1)) if form.channels == 3 else array[None]


def _eight_bits(picture: Image.Image, kind: str | None) -> Image.Image:
    """Pillow cuts 16-bit greys off at 255 where it should divide; those of PNG and PGM may come in 32 bits."""
    if picture.mode == "F" or (picture.mode == "I" and kind not in ("PNG", "PPM")):
        raise ValueError("pixels are floating-point or 32-bit numbers, of which it is not known what is white")
    if picture.mode.startswith("I"):
        return Image.fromarray((np.asarray(picture) / 257).clip(0, 255).astype(np.uint8))
    return picture
