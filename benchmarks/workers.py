"""Contenders in processes of their own, which live through the whole comparison and wait without spinning.

A contender gets the cores in two ways: one process with a thread for each core, or one process of one thread on each
core, every one with its part of the tasks, started together. The gradients of the parts are not summed across the
processes (an all-reduce of them takes well under a millisecond here), for no contender.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks import contenders
from benchmarks.results import Layout
from benchmarks.workloads import WORKLOADS

What = Literal["step", "meta_gradient"]


# JAX would round the factors of products to 10 bits on a GPU, and take most of its memory.
ON_GPU = {"JAX_PLATFORMS": "cuda", "JAX_DEFAULT_MATMUL_PRECISION": "highest", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
_ONE_AT_A_TIME = threading.Lock()  # processes are started under an environment of their own


class FailureError(Exception):
    """A contender that cannot do a workload, and why."""


@dataclass(frozen=True)
class Job:
    """What one process does."""

    workload: str
    tasks: int
    family: str
    options: dict[str, Any]
    part: int = 0
    parts: int = 1
    cores: tuple[int, ...] = ()
    device: str = "cpu"

    def build(self) -> contenders.Contender:
        """The contender on its part of the tasks."""
        workload = WORKLOADS[self.workload](self.tasks).share(self.part, self.parts)
        workload = workload if self.family == "jax" else workload.to(self.device)  # JAX finds its device itself
        return contenders.build(self.family, workload, self.options)


@dataclass(frozen=True)
class Turn:
    """Seconds per step on the clock and of the busiest process's processor; the share of the cores busy otherwise."""

    seconds: float
    foreign: float
    processor: float = 0.0


class Group:
    """One contender in one layout. Raises `FailureError` where it cannot start within `limit` seconds."""

    def __init__(self, job: Job, layout: Layout, cores: int, limit: float, environment: dict[str, str]) -> None:
        available = usable_cores()[:cores]
        parts = cores if layout == "processes" else 1
        context = multiprocessing.get_context("spawn")
        barrier = context.Barrier(parts)
        self.connections: list[Connection[Any, Any]] = []
        self.processes = []
        environment = {
            **environment,
            "OMP_NUM_THREADS": str(cores // parts),
            **(ON_GPU if job.device == "cuda" else {}),
        }
        with _ONE_AT_A_TIME, _environment(environment):
            for part in range(parts):
                own = tuple(available) if parts == 1 else (available[part],)
                share = replace(job, part=part, parts=parts, cores=own)
                here, there = context.Pipe()
                process = context.Process(target=serve, args=(there, barrier, share, cores // parts), daemon=True)
                process.start()
                self.connections.append(here)
                self.processes.append(process)
        answers = self._answers(limit)
        self.gradient = torch.stack([torch.from_numpy(gradient) for gradient, _ in answers]).sum(0)
        self.first_step = max(seconds for _, seconds in answers)

    def turn(self, what: What, count: int) -> Turn:
        """`count` steps in a row, started together; the time is that of the slowest process."""
        before, start = busy_seconds(), time.perf_counter()
        answers = self._ask((what, count))
        elapsed, busy = time.perf_counter() - start, busy_seconds() - before
        own = sum(cpu for _, cpu in answers)
        foreign = max(busy - own, 0.0) / (elapsed * len(usable_cores()))
        clock, processor = (max(column) / count for column in zip(*answers, strict=True))
        return Turn(clock, foreign, processor)

    def peak(self) -> int:
        """Bytes that one step needs above what the process holds before it; see `benchmarks.memory`."""
        return sum(self._ask(("peak", 1)))

    def close(self) -> None:
        """End the processes."""
        for connection, process in zip(self.connections, self.processes, strict=True):
            connection.close()
            process.join(2)
            if process.is_alive():
                process.kill()
                process.join()

    def _ask(self, question: tuple[str, int]) -> list[Any]:
        for connection in self.connections:
            connection.send(question)
        return self._answers(600)

    def _answers(self, limit: float) -> list[Any]:
        answers = []
        end = time.monotonic() + limit
        for connection in self.connections:
            try:
                if not connection.poll(max(end - time.monotonic(), 0)):
                    raise FailureError(f"no answer within {limit:.0f} s")
                answer = connection.recv()
            except (EOFError, FailureError) as error:
                self.close()
                raise FailureError(str(error) or "its process died") from None
            if isinstance(answer, Exception):
                self.close()
                raise answer
            answers.append(answer)
        return answers


def serve(connection: Connection[Any, Any], barrier: Barrier, job: Job, threads: int) -> None:
    """Build the contender, tell its gradient, then do what is asked until the other end closes."""
    if job.cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, job.cores)
    torch.set_num_threads(threads)
    torch.backends.cudnn.allow_tf32 = False  # PyTorch would let convolutions round to 10 bits
    try:
        contender = job.build()
        start = time.perf_counter()
        gradient = contender.gradient()
        seconds = time.perf_counter() - start
        contender.step()
        finish()
    except Exception as error:  # whatever a peer throws is its result
        connection.send(FailureError(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"))
        return
    connection.send((gradient.cpu().numpy(), seconds))
    while True:
        try:
            what, count = connection.recv()
        except EOFError:
            return
        barrier.wait(600)
        peak = what == "peak"
        connection.send(_peak(contender, job.device == "cuda") if peak else _timed(getattr(contender, what), count))


def _timed(step: Any, count: int) -> tuple[float, float]:
    """Seconds on the clock and of the processor."""
    start, cpu = time.perf_counter(), time.process_time()
    for _ in range(count):
        step()
    finish()
    return time.perf_counter() - start, time.process_time() - cpu


def finish() -> None:
    """Wait until a GPU has done what it was asked for."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()


def _peak(contender: contenders.Contender, on_gpu: bool) -> int:
    import gc

    from fewstep.footprint import footprint, process_status, reset_resident_peak

    gc.collect()
    if on_gpu:  # of PyTorch only; JAX tells nothing of the kind
        known = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        return footprint(contender.meta_gradient, torch.device("cuda")) or 0 if known else 0
    base = reset_resident_peak()
    contender.meta_gradient()
    return process_status("VmHWM") - base


def agreement(gradient: Tensor, truth: Tensor) -> float:
    """The relative distance of two meta-gradients."""
    return float((gradient - truth).norm() / truth.norm())


def usable_cores() -> list[int]:
    """The cores that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def busy_seconds() -> float:
    """Seconds that all cores of this machine have been busy since it started; 0 where the system does not tell."""
    try:
        with Path("/proc/stat").open() as file:
            user, nice, system, _, _, irq, soft, steal, *_ = map(int, file.readline().split()[1:])
    except OSError:
        return 0.0
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")


@contextmanager
def _environment(changes: dict[str, str]) -> Iterator[None]:
    """What processes that are started meanwhile see."""
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
