"""Start one command as several ranks on this machine, as torchrun does, and start them again where one is killed.

Unlike torchrun it tells a mistake (exit code 2, and a line from one rank) from a kill, which alone is worth a restart.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from fewstep.distributed import cores
from fewstep.errors import FewstepError
from fewstep.progress import narrate

RESTARTS = 3
PATIENCE = 10.0  # seconds that ranks have to end after another one failed: one may be writing a checkpoint


def launch(command: Sequence[str], count: int) -> int:
    """Run `command` as `count` ranks, and return their exit code: 0 where all ended well.

    Ctrl-C and SIGTERM are passed on; a second one kills. Raises `FewstepError` where ranks are killed again and again.
    """
    with _signals() as asked:
        for restart in range(1, RESTARTS + 2):
            codes = _run(command, count, asked)
            killed, code = min(codes), max(codes)
            if killed >= 0 or (asked and code > 0):
                return code
            if asked:
                raise KeyboardInterrupt  # no rank has lived to say so
            what = f"process {codes.index(killed)} was killed ({signal.Signals(-killed).name})"
            if restart <= RESTARTS:
                narrate(f"{what}; all start again from the last checkpoint, restart {restart} of {RESTARTS}")
    raise FewstepError(f"{what}, after {RESTARTS} restarts; the last checkpoint is intact")


def _run(command: Sequence[str], count: int, asked: list[int]) -> list[int]:
    """The exit codes of all ranks; negative, a signal's, only where others than we have killed."""
    # On any free port; a new one each time, as no key of the ranks before may be found.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for number in range(count):
            processes.append(subprocess.Popen(command, env=_environment(number, count, store.port)))
        passed_on, end = 0, None
        while None in (codes := [process.poll() for process in processes]):
            if len(asked) > passed_on:
                passed_on = len(asked)
                for process in processes:
                    process.send_signal(signal.SIGTERM)
            if end is None and set(codes) - {None, 0, 130}:
                end = time.monotonic() + PATIENCE
            if passed_on > 1:
                raise KeyboardInterrupt
            if end is not None and time.monotonic() > end:
                break
            time.sleep(0.02)
        return [code or 0 for code in codes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def _environment(number: int, count: int, port: int) -> dict[str, str]:
    """What torchrun would tell a rank; and a fair share of the cores, unless the user has said how many."""
    told = {
        "RANK": number,
        "LOCAL_RANK": number,
        "WORLD_SIZE": count,
        "LOCAL_WORLD_SIZE": count,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_USE_AGENT_STORE": True,  # the store is the launcher's, not the first rank's
    }
    threads = {"OMP_NUM_THREADS": str(max(1, cores() // count))}
    return {**threads, **os.environ, **{name: str(value) for name, value in told.items()}}


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The signals that asked to stop, as they come."""
    asked: list[int] = []

    def note(number: int, frame: Any) -> None:
        asked.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
