"""Picture files in folders and zips: which there are, and what they hold."""

from __future__ import annotations

import lzma
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from fewstep.data.places import entries, is_folder, reason, stamp_of
from fewstep.errors import InputError
from fewstep.progress import narrate_once

SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"),
    *(".pnm", ".jp2", ".avif", ".tga", ".ico"),
)
# Pictures that are not read; they are listed all the same, so that they are named and not missing without a word.
UNREAD = (".heic", ".heif", ".jxl", ".psd", ".svg", ".eps", ".dng", ".cr2", ".cr3", ".nef", ".arw")
# What reading a member of a zip may raise; RuntimeError where it is encrypted.
DAMAGE = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, RuntimeError)


class Picture(NamedTuple):
    """A picture that has not been read yet.

    name : its path within the folder or zip, with slashes;  where : in full, for messages
    stamp : what has the same stamp as at another time has the same content
    read : gives the file's content, or pixels uint8 [height, width, channels]
    """

    name: str
    where: str
    stamp: object
    read: Callable[[], Any]

    def content(self) -> Any:
        """What `read` gives; text that says what is amiss where that is damaged."""
        try:
            return self.read()
        except OSError as error:  # may be another time
            raise InputError(f"{self.where} cannot be read ({reason(error)}); mend that, or delete it") from error
        except DAMAGE as error:
            return " ".join(str(error).split()) or type(error).__name__


@contextmanager
def pictures_in(places: Iterable[Path]) -> Iterator[dict[str, Picture]]:
    """All pictures of some folders and zips by name; zips stay open meanwhile."""
    found: dict[str, Picture] = {}
    with ExitStack() as stack:
        for place in places:
            for picture in walk(place)[0] if is_folder(place) else _members(place, stack):
                other = found.setdefault(picture.name, picture)
                if other.where != picture.where and other.content() != picture.content():
                    raise InputError(f"{other.where} and {picture.where} are different pictures; delete one of them")
                found[picture.name] = picture  # of two in one zip, the later replaces the other
        yield found


def below(folder: Path) -> list[Picture]:
    """The pictures in a folder and its sub-folders; other files are told of."""
    pictures, others = walk(folder)
    tell_ignored(folder, others)
    return pictures


def walk(folder: Path, top: Path | None = None) -> tuple[list[Picture], list[Path]]:
    """The pictures in a folder and its sub-folders by name, which starts at `top`, and all other files.

    Links are followed, hidden files left out.
    """
    pictures: list[Picture] = []
    others: list[Path] = []
    _descend(top or folder, folder, set(), pictures, others)
    return sorted(pictures, key=lambda picture: picture.name), others


def _descend(top: Path, folder: Path, above: set[Path], pictures: list[Picture], others: list[Path]) -> None:
    real = folder.resolve()
    if real in above:
        raise InputError(f"{folder} is a link to a folder that it lies in; delete that link")
    for entry in entries(folder):
        if is_folder(entry):
            _descend(top, entry, above | {real}, pictures, others)
        elif is_picture(entry.name):
            pictures.append(_of_file(entry, entry.relative_to(top).as_posix()))
        else:
            others.append(entry)


def tell_ignored(folder: Path, others: list[Path], why: str = "are no pictures by their names") -> None:
    """Say, once in a process, that there are files that are not looked at."""
    if others:
        narrate_once(f"{folder}: files that {why} are ignored: {others[0].relative_to(folder)}{more(len(others) - 1)}")


def more(count: int) -> str:
    """The end of a list that is too long.

    >>> more(3), more(0)
    (' and 3 more', '')
    """
    return f" and {count} more" if count > 0 else ""


def one_file(path: Path) -> Picture:
    """A picture by its path, whatever its name."""
    return _of_file(path, path.name)


def _of_file(path: Path, name: str) -> Picture:
    return Picture(name, str(path), stamp_of(path), path.read_bytes)


def _members(path: Path, stack: ExitStack) -> Iterator[Picture]:
    try:
        archive = stack.enter_context(zipfile.ZipFile(path))
    except (*DAMAGE, OSError) as error:
        raise InputError(damaged(path, error)) from error
    own = stamp_of(path)  # a member's checksum is in the directory even where the member is damaged
    for info in archive.infolist():
        if is_picture(PurePosixPath(info.filename).name):
            stamp = own, info.header_offset
            yield Picture(info.filename, f"{info.filename} in {path}", stamp, partial(archive.read, info))


def damaged(path: Path | str, error: Exception) -> str:
    """The message that tells of a file that cannot be read."""
    return f"{path} is damaged ({' '.join(str(error).split())}); delete it, or download it again"


def is_picture(name: str) -> bool:
    """Whether a file is one, by its name."""
    return PurePosixPath(name).suffix.lower() in (*SUFFIXES, *UNREAD) and not name.startswith(".")
