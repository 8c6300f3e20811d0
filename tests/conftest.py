"""What all tests share."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # small tensors: a second thread only waits
if sys.platform == "linux" and "DISPLAY" not in os.environ:
    os.environ.setdefault("MUJOCO_GL", "egl")  # read when MuJoCo is imported
# For a machine with a GPU: FEWSTEP_TEST_DEVICE=cuda makes tensors and models there where a test names no device.
if device := os.environ.get("FEWSTEP_TEST_DEVICE"):
    torch.set_default_device(device)


@pytest.fixture
def double() -> Iterator[None]:
    """Everything is in float64 unless a test says otherwise."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(scope="session")
def omniglot_root() -> Path:
    """The folder of the real Omniglot, or a skip with the reason."""
    given = os.environ.get("FEWSTEP_DATA")
    if not given:
        pytest.skip("FEWSTEP_DATA is not set: it names the folder of the real data sets")
    folder = Path(given) / "omniglot"
    if not (folder / "images_background.zip").is_file():
        pytest.skip(f"no Omniglot in {folder}")
    return folder


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def top(tmp_path: Path) -> Path:
    """A folder for data."""
    (tmp_path / "data").mkdir()
    return tmp_path / "data"
