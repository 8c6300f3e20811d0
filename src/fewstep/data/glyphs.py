"""Glyphs: two thousand characters of many scripts, rendered from the fonts that matplotlib carries. No download."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import cycle, islice
from pathlib import Path
from typing import Literal
from unicodedata import category, decomposition, name, unidata_version

import matplotlib
import numpy as np
import PIL
import torch
from matplotlib.ft2font import FT2Font
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont, features
from torch import Tensor

from fewstep.data.cache import Arrays, cached_arrays, one_of, steps
from fewstep.data.episodes import numbered_generator
from fewstep.errors import InputError

EXAMPLES = 20
SPLITS = ("train", "validation", "test")
SCRIPTS = {  # by a word of the character's Unicode name; all others are for training
    "validation": {"CYRILLIC", "HEBREW", "LAO", "TIFINAGH", "OGHAM", "ITALIC", "LISU"},
    "test": {"CANADIAN", "GEORGIAN", "ARABIC", "ARMENIAN", "NKO"},
}
FACES = (
    *("DejaVuSans", "DejaVuSerif", "DejaVuSansMono", "STIXGeneral"),
    *("DejaVuSans-Bold", "DejaVuSerif-Italic", "DejaVuSansMono-Oblique", "STIXGeneralBol"),
    *("DejaVuSans-Oblique", "DejaVuSerif-Bold", "DejaVuSansMono-Bold", "STIXGeneralItalic"),
    *("DejaVuSans-BoldOblique", "DejaVuSerif-BoldItalic", "DejaVuSansMono-BoldOblique", "STIXGeneralBolIta"),
)
# Size of the font in pixels; longer side of the ink as a part of the picture's; degrees; shear; scale; shift as a part.
FONT_SIZE, FILL, TURN, SHEAR, SCALE, SHIFT = 96, 0.78, 10.0, 0.12, (0.85, 1.1), 2 / 28
BOLD = ("DejaVuSans-Bold", "DejaVuSerif-Bold", "DejaVuSansMono-Bold", "STIXGeneralBol")
SMALLEST = FONT_SIZE / 5  # longer side of the ink: smaller ones are mere dots
SLENDER = 4.0  # longer side of the ink, of the shorter: longer ones are mere lines
ALIKE = 0.93  # correlation of two characters, slightly blurred, from which on they count as one
SEED = 0


def load_glyphs(split: Literal["train", "validation", "test"], *, size: int = 28) -> Tensor:
    """Pictures of the characters of one split: uint8 [classes, 20, 1, size, size], stroke 255 on 0.

    Split by script: Armenian, Arabic, N'Ko, Georgian and Canadian syllabics are for the test; Cyrillic, Hebrew,
    Lao, Tifinagh, Ogham, Old Italic and Lisu for validation; Latin, Greek, Braille, mathematics, arrows and the
    other symbols for training. Characters that look alike (a Latin and a Cyrillic A), also turned by quarters,
    count once over all splits, so that nothing leaks and `ClassEpisodes(rotate=True)` is safe. A class cycles
    through the up to 16 faces that have the character, each picture with a small fixed turn, shear, scale and shift
    of its own. Rendering takes some 20 s, once; then the table lies in the cache folder.

    >>> load_glyphs("test").shape[1:]
    torch.Size([20, 1, 28, 28])
    """
    one_of("split", split, SPLITS)
    if not 8 <= size <= 128:
        raise InputError(f"size must be 8 to 128 pixels, but {size} came")
    recipe = (size, matplotlib.__version__, PIL.__version__, features.version("freetype2"), unidata_version)
    tables = cached_arrays(f"glyphs-{size}", SPLITS, recipe, lambda: build(distinct(candidates()), size))
    return torch.from_numpy(tables[split])[:, :, None]


def build(characters: list[str], size: int) -> Arrays:
    """The table of each split: uint8 [classes, 20, size, size]."""
    rows: dict[str, list[NDArray[np.uint8]]] = {split: [] for split in SPLITS}
    for character in steps(characters, "rendering glyphs"):
        rows[split_of(character)].append(examples(character, size))
    return {split: np.array(row, np.uint8).reshape(-1, EXAMPLES, size, size) for split, row in rows.items()}


def split_of(character: str) -> str:
    """The split that the character's script belongs to.

    >>> split_of("A"), split_of("Ж"), split_of("ش")
    ('train', 'validation', 'test')
    """
    words = set(name(character, "").replace("-", " ").split())
    return next((split for split, scripts in SCRIPTS.items() if words & scripts), "train")


def candidates() -> list[str]:
    """Letters, numbers, punctuation and symbols that the faces have and that are no variant of another character.

    Left out: marks, spaces and control characters; composed ones (é is e with a mark, 𝐀 a bold A); and what is
    not legible or not distinct at this size: block elements, hexagrams, tiles, cards, faces.
    """
    unclear = (range(0x2500, 0x25A0), range(0x4DC0, 0x4E00), range(0x1D300, 0x1D360), range(0x1F000, 0x20000))
    points = sorted({point for face in FACES for point in coverage(face)})
    return [
        character
        for point in points
        if category(character := chr(point))[0] in "LNPS"
        and not decomposition(character)
        and not any(point in block for block in unclear)
    ]


def distinct(characters: list[str]) -> list[str]:
    """`characters` without the blank, the mere dots and lines, and those that look like one before, or its turns.

    >>> distinct(["A", "Α", "А", "∀", "B", "|", " "])  # Latin, Greek, Cyrillic A; A on its head
    ['A', 'B']
    """
    names, thin, bold = [], [], []
    for character in characters:
        ink = next(inks(character), None)
        if ink and max(ink.size) >= SMALLEST and max(ink.size) <= SLENDER * min(ink.size):
            names.append(character)
            thin.append(prototype(ink))
            bold.append(prototype(next(inks(character, BOLD), ink)))
    across = resemblance(thin, bold)
    alike = np.maximum(resemblance(thin, thin), np.maximum(across, across.T))
    kept: list[int] = []
    for index, row in enumerate(alike):
        if not kept or row[kept].max() < ALIKE:
            kept.append(index)
    return [names[index] for index in kept]


def prototype(ink: Image.Image) -> NDArray[np.float64]:
    """A character without jitter, slightly blurred, around its mean: [28, 28] whole numbers, so sums are exact."""
    picture = np.asarray(master(ink, 28).reduce(2).filter(ImageFilter.GaussianBlur(1)), np.float64)
    centred: NDArray[np.float64] = picture * picture.size - picture.sum()
    return centred


def resemblance(one: list[NDArray[np.float64]], other: list[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Correlation of each of `one` with each of `other`, turned as suits best by quarters: [one, other]."""
    best = np.full((len(one), len(other)), -1.0)
    flat = np.array(one).reshape(len(one), -1)
    for quarter in range(4):
        turned = np.rot90(np.array(other), quarter, (1, 2)).reshape(len(other), -1)
        product = flat @ turned.T
        product /= np.linalg.norm(flat, axis=1)[:, None]
        product /= np.linalg.norm(turned, axis=1)
        np.maximum(best, product, out=best)
    return best


@cache
def coverage(face: str) -> frozenset[int]:
    """The code points that a face has."""
    return frozenset(FT2Font(str(_file(face))).get_charmap())


@cache
def font(face: str) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(_file(face)), FONT_SIZE, layout_engine=ImageFont.Layout.BASIC)


def _file(face: str) -> Path:
    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{face}.ttf"


def inks(character: str, faces: tuple[str, ...] = FACES) -> Iterator[Image.Image]:
    """The character in each of the faces that has it, cut out along its ink; those without ink are left out."""
    for face in faces:
        if ord(character) in coverage(face):
            left, top, right, bottom = map(int, font(face).getbbox(character))
            picture = Image.new("L", (max(right - left, 0) + 2, max(bottom - top, 0) + 2))
            ImageDraw.Draw(picture).text((1 - left, 1 - top), character, fill=255, font=font(face))
            if box := picture.getbbox():
                yield picture.crop(box)


def master(ink: Image.Image, size: int) -> Image.Image:
    """The ink scaled and centred, at twice the size, [2 size, 2 size]."""
    side = 2 * size
    width, height = (max(1, round(FILL * side * length / max(ink.size))) for length in ink.size)
    picture = Image.new("L", (side, side))
    picture.paste(ink.resize((width, height), Image.Resampling.LANCZOS), ((side - width) // 2, (side - height) // 2))
    return picture


def examples(character: str, size: int) -> NDArray[np.uint8]:
    """The 20 pictures of a character, uint8 [20, size, size]; always the same ones."""
    masters = islice(cycle([master(ink, size) for ink in inks(character)]), EXAMPLES)
    numbers = torch.rand(EXAMPLES, 6, generator=numbered_generator(SEED, ord(character)))
    return np.array([np.asarray(jitter(*pair)) for pair in zip(masters, numbers.double().numpy(), strict=True)])


def jitter(picture: Image.Image, numbers: NDArray[np.float64]) -> Image.Image:
    """A master after a small affine change drawn by six numbers in 0..1, at half its size."""
    side = picture.width
    turn, shear, *shift = (2 * numbers[:4] - 1) * (np.deg2rad(TURN), SHEAR, SHIFT * side, SHIFT * side)
    scale = SCALE[0] + (SCALE[1] - SCALE[0]) * numbers[4:]
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    back = np.linalg.inv(rotation @ np.array([[1, shear], [0, 1]]) @ np.diag(scale))
    centre = np.full(2, side / 2)
    offset = centre - back @ (centre + shift)
    data = (*back[0], offset[0], *back[1], offset[1])
    moved = picture.transform(picture.size, Image.Transform.AFFINE, data, Image.Resampling.BICUBIC)
    return moved.reduce(2)
