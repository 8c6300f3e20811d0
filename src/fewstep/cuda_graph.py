"""A function of tensors on a CUDA GPU, recorded once as a graph of kernels and replayed.

Launching a kernel takes longer than most kernels of a few tasks run; a replay launches all of them at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Function = Callable[..., tuple[Tensor, ...]]
WARM_UPS = 2  # what is compiled, chosen or allocated at a first call has no place in a recording


class Recording:
    """`recording(*tensors)` is `function(*tensors)`, for tensors like those that it was made with.

    fresh : the positions of the tensors that may be others in each call. All others have to be the same ones, as
        parameters are; the function may write to those.
    Raises whatever the function raises while it is recorded, as where it asks for a tensor's value.
    """

    def __init__(self, function: Function, tensors: Sequence[Tensor], fresh: Sequence[int]) -> None:
        self.function, self.fresh = function, fresh
        self.fixed = [i for i in range(len(tensors)) if i not in fresh]
        self._record(tensors)

    def _record(self, tensors: Sequence[Tensor]) -> None:
        device = tensors[0].device
        fixed = [tensors[i] for i in self.fixed]
        self._addresses = _addresses(fixed)
        self._inputs = [tensor.clone() if i in self.fresh else tensor for i, tensor in enumerate(tensors)]
        before = [tensor.detach().clone() for tensor in fixed]
        drawn = torch.cuda.get_rng_state(device)
        aside: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        aside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(aside):
            for _ in range(WARM_UPS):
                self.function(*self._inputs)
        torch.cuda.current_stream(device).wait_stream(aside)
        if not torch.equal(drawn, torch.cuda.get_rng_state(device)):
            torch.cuda.set_rng_state(drawn, device)
            _restore(fixed, before)
            raise RuntimeError("the model draws random numbers, whose recomputation is not recorded")
        self._graph: Any = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.device(device), torch.cuda.graph(self._graph):
                self._results = self.function(*self._inputs)
        finally:
            _restore(fixed, before)

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        if _addresses([tensors[i] for i in self.fixed]) != self._addresses:
            self._record(tensors)
        for i in self.fresh:
            self._inputs[i].copy_(tensors[i], non_blocking=True)
        self._graph.replay()
        return tuple(result.clone() for result in self._results)


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def _restore(tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)
