"""This library, without compilation."""

from __future__ import annotations

import warnings
from typing import Any

from benchmarks.contenders.with_torch import TorchContender
from benchmarks.workloads import Workload
from fewstep.engine import Engine
from fewstep.errors import FallbackWarning

NEEDS = None

# The one place that knows the engines' options. Chunks and convolutions are left out where they make no difference.
ENGINES: dict[str, list[dict[str, Any]]] = {
    "eager": [
        {}, {"chunk": 4}, {"chunk": 8}, {"chunk": 4, "convolution": "channels_last"},
        {"chunk": 4, "convolution": "matmul"}, {"convolution": "matmul"},
    ],
    "compiled": [
        {"compile": "pieces"}, {"compile": "pieces", "chunk": 4},
        {"compile": "pieces", "chunk": 4, "convolution": "matmul"}, {"compile": "pieces", "convolution": "matmul"},
        {"compile": "step"}, {"compile": "step", "chunk": 4},
        {"compile": "step", "chunk": 4, "convolution": "matmul"}, {"compile": "step", "convolution": "matmul"},
    ],
}  # fmt: skip


def variants(workload: Workload, kind: str = "eager") -> dict[str, dict[str, Any]]:
    """The engines that differ on this workload."""
    most = 1 if workload.tiny else workload.tasks.size
    convolves = workload.name not in ("sinusoid", "transformer")
    return {
        str(Engine(**options)): options
        for options in ENGINES[kind]
        if options.get("chunk", 0) < most and (convolves or "convolution" not in options)
    }


def build(workload: Workload, **options: Any) -> TorchContender:
    """The loss of all tasks and one backward pass, as in training. What cannot be compiled does not take part."""
    warnings.simplefilter("error", FallbackWarning)
    learner = workload.ours(engine=Engine(**options))

    def backward() -> None:
        learner(workload.tasks).sum().backward()

    return TorchContender(workload, backward)
