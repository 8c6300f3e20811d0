"""This library, with compilation."""

from __future__ import annotations

from typing import Any

from benchmarks.contenders import ours
from benchmarks.workloads import Workload

NEEDS = None
build = ours.build


def variants(workload: Workload) -> dict[str, dict[str, Any]]:
    """The engines that compile."""
    return ours.variants(workload, compiled=True)
