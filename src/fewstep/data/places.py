"""Paths as a user gives them: what lies there, or an error that says why that cannot be told."""

from __future__ import annotations

import csv
import stat
from pathlib import Path

from fewstep.errors import InputError


def entries(folder: Path) -> list[Path]:
    """What lies in a folder, by name, without hidden files; `InputError` where it cannot be listed."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    except OSError as error:
        raise InputError(
            f"{folder} cannot be listed ({reason(error)}); give the path of a folder that you may read"
        ) from error


def is_folder(path: Path) -> bool:
    """Whether there is a folder; `InputError` where one may not look."""
    return stat.S_ISDIR(_mode(path))


def is_file(path: Path) -> bool:
    """Whether there is a file; `InputError` where one may not look."""
    return stat.S_ISREG(_mode(path))


def _mode(path: Path) -> int:
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0
    except OSError as error:
        raise InputError(
            f"{path.parent} cannot be entered ({path.name}: {reason(error)}); give a folder that you may read and enter"
        ) from error


def lines_of(path: Path) -> list[str]:
    """The lines of a list of names."""
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); give a text file in UTF-8 that you may read") from error


def rows_of(path: Path) -> list[list[str]]:
    """The cells of each line of a list with commas."""
    try:
        return [*csv.reader(lines_of(path))]
    except csv.Error as error:
        raise InputError(f"{path} is no list with commas ({error}); is a quote left open?") from error


def expanded(path: Path | str) -> Path:
    """The path, with the user's own folder in place of `~`."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(f"{path}: {error}; write the folder in full") from error


def reason(error: OSError) -> str:
    """What the system says."""
    return error.strerror or " ".join(str(error).split())


def stamp_of(path: Path) -> object:
    """What changes whenever a file's content does: who writes to it can set the time of change, but not ctime."""
    try:
        about = path.stat()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({reason(error)}); mend or delete it") from error
    if not stat.S_ISREG(about.st_mode):  # to read a pipe would wait for ever
        raise InputError(f"{path} is no file, but a pipe, a folder or a device; delete it")
    return str(path.absolute()), about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino
