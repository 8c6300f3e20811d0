"""Picture files in folders and zips: which there are, and by what their content is known."""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from fewstep.errors import InputError

SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"),
    *(".jp2", ".avif", ".tga", ".ico"),
)


class Picture(NamedTuple):
    """A picture that has not been read yet.

    name : its path within the folder or zip, with slashes;  where : in full, for messages
    stamp : stands for its content: what differs has been changed
    read : gives the file's content, or pixels uint8 [height, width, channels]
    """

    name: str
    where: str
    stamp: object
    read: Callable[[], Any]


@contextmanager
def pictures_in(places: Iterable[Path]) -> Iterator[dict[str, Picture]]:
    """All pictures of some folders and zips by name; zips stay open meanwhile."""
    found: dict[str, Picture] = {}
    with ExitStack() as stack:
        for place in places:
            pictures = below(place) if place.is_dir() else _members(place, stack)
            found.update((picture.name, picture) for picture in pictures)
        yield found


def below(folder: Path, top: Path | None = None) -> list[Picture]:
    """The pictures in a folder and its sub-folders by name, which starts at `top`; links are followed, hidden files
    left out."""
    found: list[Picture] = []
    _descend(top or folder, folder, set(), found)
    return sorted(found, key=lambda picture: picture.name)


def _descend(top: Path, folder: Path, above: set[Path], found: list[Picture]) -> None:
    real = folder.resolve()
    if real in above:
        raise InputError(f"{folder} is a link to a folder that it lies in; delete that link")
    for entry in entries(folder):
        if entry.is_dir():
            _descend(top, entry, above | {real}, found)
        elif _is_picture(entry.name):
            found.append(_of_file(entry, entry.relative_to(top).as_posix()))


def one_file(path: Path) -> Picture:
    """A picture by its path, whatever its name."""
    return _of_file(path, path.name)


def _of_file(path: Path, name: str) -> Picture:
    try:
        about = path.stat()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); mend or delete it") from error
    return Picture(name, str(path), (about.st_size, about.st_mtime_ns), path.read_bytes)


def entries(folder: Path) -> list[Path]:
    """What lies in a folder, by name, without hidden files; `InputError` where it cannot be listed."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise InputError(
            f"{folder} cannot be listed ({error.strerror}); give the path of a folder that you may read"
        ) from error


def _members(path: Path, stack: ExitStack) -> Iterator[Picture]:
    try:
        archive = stack.enter_context(zipfile.ZipFile(path))
    except (zipfile.BadZipFile, OSError) as error:
        raise InputError(damaged(path, error)) from error
    for info in archive.infolist():
        if _is_picture(PurePosixPath(info.filename).name):
            stamp = info.file_size, info.CRC
            yield Picture(info.filename, f"{info.filename} in {path}", stamp, partial(archive.read, info))


def damaged(path: Path | str, error: Exception) -> str:
    """The message that tells of a file that cannot be read."""
    return f"{path} is damaged ({' '.join(str(error).split())}); delete it, or download it again"


def _is_picture(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in SUFFIXES and not name.startswith(".")
