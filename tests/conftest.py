"""What all tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)  # small tensors: a second thread only waits


@pytest.fixture(scope="session")
def omniglot_root() -> Path:
    """The folder of the real Omniglot, or a skip with the reason."""
    given = os.environ.get("FEWSTEP_DATA", str(Path(__file__).parents[2] / "shared" / "data"))
    folder = Path(given) / "omniglot"
    if not folder.is_dir():
        pytest.skip(f"no Omniglot in {folder}; set FEWSTEP_DATA to the folder that holds it")
    return folder
