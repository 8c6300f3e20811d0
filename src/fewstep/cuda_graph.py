"""A function of tensors on a CUDA GPU, recorded once as a graph of kernels and replayed.

Launching a kernel takes longer than most kernels of a few tasks run; a replay launches all of them at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fewstep.compilation import foreign_random

Function = Callable[..., tuple[Tensor, ...]]


class Recording:
    """`recording(*tensors)` is `function(*tensors)`, for tensors like those that it was made with.

    fresh : the positions of the tensors that may be others in each call. All others, and whatever else the function
        reads, have to lie where they lay, as parameters do; the function may write to them.
    Raises whatever the function raises while it is recorded, as where it asks for a tensor's value, and `RuntimeError`
    where it draws random numbers. Nothing has changed then.
    """

    _pools: ClassVar[dict[torch.device, Any]] = {}  # one for all recordings on a device, which run one after another

    def __init__(self, function: Function, tensors: Sequence[Tensor], fresh: Sequence[int]) -> None:
        self._fresh = fresh
        self._inputs = [tensor.clone() if i in fresh else tensor for i, tensor in enumerate(tensors)]
        fixed = [tensor for i, tensor in enumerate(tensors) if i not in fresh]
        before = [tensor.detach().clone() for tensor in fixed]
        with torch.cuda.device(tensors[0].device):
            aside: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            aside.wait_stream(torch.cuda.current_stream())
            try:
                with torch.cuda.stream(aside):
                    self._graph, self._results = self._recorded(function, aside)
            finally:
                torch.cuda.current_stream().wait_stream(aside)
                with torch.no_grad():
                    for tensor, value in zip(fixed, before, strict=True):
                        tensor.copy_(value)

    def _recorded(self, function: Function, stream: Any) -> tuple[Any, tuple[Tensor, ...]]:
        generators = torch.get_rng_state(), torch.cuda.get_rng_state()
        function(*self._inputs)  # what is compiled, chosen or allocated at a first call has no place in a recording
        drawn = _drawn()
        function(*self._inputs)
        if _drawn() != drawn:
            torch.set_rng_state(generators[0])
            torch.cuda.set_rng_state(generators[1])
            raise RuntimeError("the model draws random numbers, whose recomputation is not recorded")
        graph: Any = torch.cuda.CUDAGraph()
        pool = self._pools.setdefault(torch.device("cuda", torch.cuda.current_device()), torch.cuda.graph_pool_handle())
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            results = function(*self._inputs)
        return graph, results

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        for i in self._fresh:
            self._inputs[i].copy_(tensors[i], non_blocking=True)
        self._graph.replay()
        return tuple(result.clone() for result in self._results)


def _drawn() -> tuple[object, ...]:
    """The states of all random generators."""
    own = torch.get_rng_state(), torch.cuda.get_rng_state()
    return (*[state.numpy().tobytes() for state in own], *foreign_random())
