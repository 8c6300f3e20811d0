"""How much memory a computation takes at most, and how much there is."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

CGROUP = Path("/sys/fs/cgroup")
TRIM_THRESHOLD, TOP_PAD, MMAP_MAX = -1, -2, -4  # of malloc.h


def footprint(work: Callable[[], object], device: torch.device) -> int | None:
    """Run `work` and return the bytes that it took at most beyond those held before; None where nobody counts them.

    On CUDA these are PyTorch's own allocations; its statistics of the peak start anew. On the CPU it is the growth of
    the process's resident set, which the kernel of Linux watches: scratch space is in it too. The first run of `work`
    takes more, for what is made once.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    base = None
    if device.type == "cpu":
        with suppress(OSError, AttributeError):  # neither file nor function is there on other systems
            base = reset_resident_peak()
    work()
    return None if base is None else max(0, process_status("VmHWM") - base)


def reset_resident_peak() -> int:
    """Give freed memory back, let the kernel forget the peak of the resident set, and return its size now."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return process_status("VmRSS")


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next allocation; other C libraries go on as they are.

    By default it gives every large block back to the kernel at once, and each step pays again for pages of zeros: with
    the tensors of Mini-ImageNet, a third of a step. The process stays as large as it was at most.
    """
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(TRIM_THRESHOLD, -1)  # never
        mallopt(MMAP_MAX, 0)  # no block apart from the others
        mallopt(TOP_PAD, 64 * 2**20)


def process_status(field: str) -> int:
    """A size in bytes from /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be had on a device, None where nobody says: on CUDA and on the CPU of a Linux machine."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type != "cpu":
        return None
    free = []
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free.append(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")))
    with suppress(OSError, ValueError):  # a container's own limit; "max" where there is none
        free.append(int((CGROUP / "memory.max").read_text()) - int((CGROUP / "memory.current").read_text()))
    return min(free, default=None)
