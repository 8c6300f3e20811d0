"""Pictures, and folders of them, for tests."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image

from fewstep.data import ImageTable

NAMES = {"train": ["a", "b", "c"], "val": ["d", "e"], "test": ["f", "g"]}


def picture(value: int, size: tuple[int, int] = (12, 12), mode: str = "RGB", kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, value if mode in ("L", "P") else (value, 0, 255 - value, 100)[: len(mode)]).save(file, kind)
    return file.getvalue()


def put(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def red(table: ImageTable) -> list[int]:
    """The red of each picture, which tells pictures apart."""
    values: list[int] = table.images[:, 0, 0, 0].tolist()
    return values


def make_by_folders(top: Path) -> None:
    for stem, classes in NAMES.items():
        for number, name in enumerate(classes):
            for i in range(2):
                put(top / stem / name / f"{i}.png", picture(2 * number + i))


def own_folder(top: Path, classes: int = 10, pictures: int = 3) -> Path:
    for name in range(classes):
        for i in range(pictures):
            put(top / f"class {name}" / f"{i}.png", picture(10 * name + i))
    return top
