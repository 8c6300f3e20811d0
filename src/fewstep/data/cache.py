"""Where data lie: folders that the user has, files downloaded once, arrays built once."""

from __future__ import annotations

import hashlib
import inspect
import os
import sys
import tempfile
import time
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import platformdirs
import pooch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, track

from fewstep.data.places import expanded, is_folder
from fewstep.errors import InputError

PART, DAY = "fewstep-", 24 * 3600
Arrays = dict[str, NDArray[Any]]
Item = TypeVar("Item")


def cache_folder() -> Path:
    """Where downloads and built arrays go: `$FEWSTEP_CACHE`, else the user's own cache folder.

    >>> cache_folder().is_absolute()
    True
    """
    given = os.environ.get("FEWSTEP_CACHE")
    return expanded(given).absolute() if given else platformdirs.user_cache_path("fewstep")


def data_folders(name: str, root: Path | None = None) -> list[Path]:
    """Folders of the user's own to look for the data set `name` in: of `root`, else of `$FEWSTEP_DATA`, else none.

    >>> [folder.name for folder in data_folders("omniglot", Path("/"))]
    ['omniglot', '']
    """
    given = os.environ.get("FEWSTEP_DATA")
    if root is None and not given:
        return []
    top = expanded((given or "") if root is None else root).absolute()
    if not is_folder(top):
        source = "$FEWSTEP_DATA names" if root is None else "root names"
        raise InputError(f"{source} {top}, which is no folder; give the folder that holds the data")
    return [top / name, top]


def one_of(name: str, value: object, options: Iterable[str]) -> None:
    """Raise `InputError` unless `value` is one of `options`.

    >>> one_of("split", "dev", ("train", "test"))
    Traceback (most recent call last):
    fewstep.errors.InputError: split must be 'train' or 'test', but 'dev' came
    """
    if value not in (known := list(options)):
        raise InputError(f"{name} must be {' or '.join(map(repr, known))}, but {value!r} came")


def cached_arrays(stem: str, names: tuple[str, ...], recipe: object, build: Callable[[], Arrays]) -> Arrays:
    """The arrays `names` that `build()` gives, built once and kept in the cache folder.

    The file is keyed by the text of `recipe`, whatever the arrays depend on, and by the source of the module that
    `build` is of. It appears whole or not at all, so that two processes may build at once; one that cannot be
    read is built again.
    """
    path = cache_path(f"{stem}.npz", (names, recipe), build.__module__)
    arrays = _read(path, names)
    if arrays is None:
        arrays = built = build()
        try:
            write_whole(path, lambda file: np.savez_compressed(file, **built))  # type: ignore[arg-type]
        except OSError as error:
            warn_unwritable(path, error)
    return arrays


def cache_path(name: str, recipe: object, module: str) -> Path:
    """The file `name` in the cache folder, with a digest of all that it depends on: `recipe`, and a module's source."""
    source = ""
    with suppress(OSError, TypeError):  # without its source, as in a frozen program
        source = inspect.getsource(sys.modules[module])
    digest = hashlib.sha256(repr((recipe, source)).encode()).hexdigest()[:16]
    stem, _, suffix = name.rpartition(".")
    return cache_folder() / f"{stem}-{digest}.{suffix}"


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Have `write` fill a file that is there whole or not at all, also where two processes write it at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _clear(path.parent)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=PART, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
        Path(temporary).replace(path)
    finally:
        with suppress(FileNotFoundError):
            Path(temporary).unlink()


def _clear(folder: Path) -> None:
    """Delete what processes that were killed left half-written; what is being written was touched a moment ago."""
    for path in folder.glob(f"{PART}*.part"):
        with suppress(OSError):  # another process was faster
            if time.time() - path.stat().st_mtime > DAY:
                path.unlink()


def warn_unwritable(path: Path, error: OSError) -> None:
    """Say that the work will have to be done again next time."""
    warnings.warn(
        f"{path} cannot be written ({error}); set FEWSTEP_CACHE to a folder that you may write to", stacklevel=3
    )


def _read(path: Path, names: tuple[str, ...]) -> Arrays | None:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: archive[name] for name in names}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None


def fetch(url: str, known_hash: str, folder: Path) -> Path:
    """The file at `url`, downloaded into `folder` unless it lies there already with the right hash."""
    name = url.rsplit("/", 1)[-1]
    bar = _DownloadBar(name)
    downloader = pooch.HTTPDownloader(progressbar=bar, chunk_size=1 << 16)
    try:
        return Path(pooch.retrieve(url, known_hash, fname=name, path=folder, downloader=downloader))
    except (OSError, ValueError) as error:
        if (response := getattr(error, "response", None)) is not None:
            response.close()
        reason = " ".join(str(error).split())
        raise InputError(
            f"{url} could not be downloaded into {folder} ({reason}); try again, or give a folder that holds "
            "the data with FEWSTEP_DATA"
        ) from error
    finally:
        bar.close()


class _DownloadBar:
    """A rich progress bar in the form that pooch asks for; drawn on a terminal only."""

    def __init__(self, name: str) -> None:
        self.total = 0
        columns = (TextColumn(name), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty())
        self._task = self._progress.add_task(name, total=None)

    def update(self, count: int) -> None:
        self._progress.start()
        self._progress.update(self._task, advance=count, total=self.total or None)

    def reset(self) -> None:
        self._progress.reset(self._task)

    def close(self) -> None:
        self._progress.stop()


def steps(items: Iterable[Item], what: str, total: int | None = None) -> Iterable[Item]:
    """`items`, with a progress bar on a terminal."""
    return track(items, what, total, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
