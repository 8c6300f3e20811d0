"""This library, without compilation."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor

from benchmarks.contenders import RATE
from benchmarks.contenders.with_torch import TorchContender
from benchmarks.workloads import Workload
from fewstep import Engine, MetaStep
from fewstep.errors import FallbackWarning
from fewstep.footprint import keep_freed_memory

NEEDS = None


# The one place that knows the engines' options, by what they are good for.
EAGER: list[dict[str, Any]] = [{}, {"chunk": 4}, {"chunk": 8}]
TINY: list[dict[str, Any]] = [{"compile": "pieces"}, {"compile": "step"}]
ATTENTION: list[dict[str, Any]] = [{"compile": "pieces"}, {"compile": "step", "method": "loop"}]
FEW_STEPS: list[dict[str, Any]] = [{"compile": "step", "chunk": size, "convolution": "matmul"} for size in (2, 1)]
MANY_STEPS: list[dict[str, Any]] = [{"compile": "pieces", "keep": True, "chunk": 1, "convolution": "matmul"}]
LARGE: list[dict[str, Any]] = [{"compile": "pieces", "keep": True, "method": "loop", "convolution": "channels_last"}]
# On a GPU: a step is a graph of kernels, and all tasks go at once.
GPU_EAGER: list[dict[str, Any]] = [{}, {"convolution": "matmul"}]
GPU_FEW_STEPS: list[dict[str, Any]] = [{"compile": "step", "convolution": "matmul"}]
GPU_MANY_STEPS: list[dict[str, Any]] = [{"compile": "pieces", "keep": True, "convolution": "matmul"}]
GPU_LARGE: list[dict[str, Any]] = [{"compile": "pieces", "keep": True}, *LARGE]


def variants(workload: Workload, compiled: bool = False) -> dict[str, dict[str, Any]]:
    """The engines that are worth a try on this workload."""
    if workload.device == "cuda":
        found = GPU_EAGER
        if compiled:
            found = GPU_FEW_STEPS if workload.steps == 1 else GPU_MANY_STEPS
            found = GPU_LARGE if workload.name.startswith("mini") else found
        found = [{**options, "graph": True} for options in found]
    elif not compiled:
        found = [options for options in EAGER if options.get("chunk", 0) <= workload.tasks.size]
        found = found[:1] if workload.tiny else found
    elif workload.name == "sinusoid":
        found = TINY
    elif workload.name == "transformer":
        found = ATTENTION
    elif workload.name.startswith("mini"):
        found = LARGE
    else:
        found = FEW_STEPS if workload.steps == 1 else MANY_STEPS
    return {str(Engine(**options)): options for options in found}


class Ours(TorchContender):
    """Training steps as `fewstep train` takes them. What cannot be compiled does not take part."""

    def __init__(self, workload: Workload, engine: Engine) -> None:
        warnings.simplefilter("error", FallbackWarning)
        keep_freed_memory()  # as the command line does
        self.tasks = workload.tasks
        learner = workload.ours(engine=engine)
        super().__init__(workload, lambda: None)
        self.iteration = MetaStep(learner, self.optimizer)

    def meta_gradient(self) -> None:
        self.optimizer.zero_grad()
        self.iteration.backward(self.tasks)

    def gradient(self) -> Tensor:
        return super().gradient() * self.tasks.size  # of the sum, not of the mean

    def step(self) -> None:
        self.iteration(self.tasks, RATE)


def build(workload: Workload, **options: Any) -> TorchContender:
    return Ours(workload, Engine(**options))
