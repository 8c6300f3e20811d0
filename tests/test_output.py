"""Output whose reader goes away, as `head` does: no traceback, and none of another broken pipe's is hidden."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from fewstep.output import UNREAD, speaking


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", ["list recipes", "train sinusoid --help"])
def test_a_reader_that_has_gone_ends_the_command_quietly(command: str, unbuffered: str) -> None:
    unread, pipe = os.pipe()
    os.close(unread)
    process = [sys.executable, "-m", "fewstep", *command.split()]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    ended = subprocess.run(
        process, stdout=pipe, stderr=subprocess.PIPE, text=True, timeout=120, check=False, env=environment
    )
    os.close(pipe)
    assert ended.stderr == ""
    assert ended.returncode == UNREAD


def test_another_broken_pipe_is_told() -> None:
    with pytest.raises(BrokenPipeError, match="a worker's"), speaking():
        raise BrokenPipeError("a worker's")
