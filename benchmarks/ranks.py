"""A benchmark in several processes that take turns or work together."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

from fewstep.distributed import gathered, is_first
from fewstep.launch import launch


def in_ranks(module: str, call: str, procs: int) -> None:
    """Run `call`, in which `main` is that of benchmarks.`module`, as so many ranks."""
    start = f"import os, sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})"
    program = f"{start}; from benchmarks.{module} import *; {call}; sys.stdout.flush(); os._exit(0)"
    if code := launch([sys.executable, "-c", program], procs):
        sys.exit(code)


def together(work: Callable[[], object]) -> float:
    """Seconds that the slowest rank takes, all at once."""
    gathered(None)
    start = time.perf_counter()
    work()
    return max(gathered(time.perf_counter() - start))


def alone(work: Callable[[], object]) -> float:
    """Seconds that the first rank takes while the others wait."""
    return together(work if is_first() else lambda: None)
