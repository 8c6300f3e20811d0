"""Every benchmark runs for one tiny step, so that it cannot rot."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks import memory, speed
from benchmarks.workloads import miniimagenet, omniglot, sinusoid


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors on several threads wait for each other, and on a busy machine for very long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_speed_of_the_sinusoid() -> None:
    workload = sinusoid(tasks=3)
    timings = speed.compare(workload, speed.contenders("sinusoid", workload, compiled=False), repeats=1)
    assert [timing.contender for timing in timings] == ["naive loop", "loop by hand", "ours"]
    assert all(timing.error < 1e-4 for timing in timings)
    Console(quiet=True).print(speed.as_table("sinusoid", timings))


def test_speed_of_omniglot() -> None:
    workload = omniglot(tasks=3)
    timings = speed.compare(workload, speed.contenders("omniglot-5way-1shot", workload, compiled=False), repeats=1)
    assert len(timings) == 4
    assert all(timing.error < 0.05 for timing in timings)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of the resident set is Linux's")
@pytest.mark.parametrize("name", ["ours", "naive loop"])
def test_memory(name: memory.Name) -> None:
    peak = memory.measure(name, steps=3, images=(5, 5), size=16, threads=0)
    assert peak.resident >= 0
    assert peak.allocated > 0
    assert peak.seconds > 0


def test_memory_workload_agrees_with_the_naive_loop() -> None:
    workload = miniimagenet(steps=2, support=5, query=5, size=16)
    ours, naive = workload.meta_gradient(workload.ours()), workload.meta_gradient(workload.naive)
    assert (ours - naive).norm() < 1e-3 * naive.norm()
