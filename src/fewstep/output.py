"""Which process prints, and what is said of an output that nobody reads and of a path that nobody may use."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

from fewstep.distributed import is_first
from fewstep.errors import InputError

UNREAD = 141  # as a shell tells of a program that SIGPIPE ended


@contextmanager
def speaking() -> Iterator[None]:
    """Of several processes that work together, only the first prints; it ends quietly when its reader has gone.

    `fewstep list recipes | head -3` is such a reader: the command leaves with exit code 141, as other programs do.
    """
    if not is_first():
        with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            yield
        return
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        try:
            print(flush=True)  # fails as well if the broken pipe is this one, and not one to another process
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
            sys.exit(UNREAD)
        raise


UNUSABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP}


@contextmanager
def paths_told() -> Iterator[None]:
    """Make an `InputError` of what the system says of a path that the user gave."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNUSABLE or not isinstance(error.filename, str):
            raise
        raise InputError(f"{error.filename} cannot be used ({error.strerror}); give a path that you may use") from error
