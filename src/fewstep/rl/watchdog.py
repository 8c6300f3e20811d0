"""An end for what never ends."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def no_longer_than(seconds: float | None) -> Iterator[None]:
    """Raise `TimeoutError` in the middle of what takes longer; None waits for ever.

    It goes by SIGALRM: in other threads than the first, and on Windows, nothing is ended, and what does not come back
    to Python is ended once it does. An alarm of others that comes sooner stays, and so does a later one afterwards.
    There is a twentieth of the time more, so that what was stopped (Ctrl-Z) can end once it goes on.

    >>> with no_longer_than(0.01):
    ...     while True: pass
    Traceback (most recent call last):
        ...
    TimeoutError: it took more than 0.01 s
    """
    if seconds is None or threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return

    over, done = False, False

    def end(signum: int, frame: Any) -> None:
        nonlocal over
        if done:  # while the alarm is put away
            return
        if over:
            raise TimeoutError(f"it took more than {seconds:g} s")
        over = True
        signal.setitimer(signal.ITIMER_REAL, seconds / 20, seconds)  # again, should somebody catch the first

    theirs, interval = signal.getitimer(signal.ITIMER_REAL)
    if 0 < theirs <= seconds:
        yield
        return
    before, began = signal.getsignal(signal.SIGALRM) or signal.SIG_DFL, time.monotonic()
    try:
        signal.signal(signal.SIGALRM, end)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    finally:
        done = True
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if theirs:
            signal.setitimer(signal.ITIMER_REAL, max(theirs - (time.monotonic() - began), 1e-6), interval)
