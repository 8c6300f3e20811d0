"""First and second derivatives of one task's loss, and the one place where they run over many tasks.

Everything below `Engine` is written for ONE task, without a task axis. Each order of differentiation stays inside
the `vmap`: `grad` of a `vmap` of `grad` is silently wrong in PyTorch through fused batch, layer and instance norm
(pytorch/functorch#534).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep.errors import InputError

Function = Callable[..., tuple[Tensor, ...]]
Scalar = Callable[..., Tensor]
GradAndValue = Callable[[Scalar, tuple[int, ...]], Callable[..., tuple[tuple[Tensor, ...], Tensor]]]


@dataclass
class Engine:
    """How a function of one task runs over a batch of tasks.

    method : "vmap" batches the tasks; "loop" takes them one by one, for models without batching rules (RNNs)
    chunk : tasks at a time under "vmap"; None takes all at once. Fewer need less memory, and cache better.
    compile : compile the batched function with torch.compile
    """

    method: Literal["vmap", "loop"] = "vmap"
    chunk: int | None = None
    compile: bool = False
    _batched_functions: dict[Any, Function] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.method not in ("vmap", "loop"):
            raise InputError(f"the engine must be 'vmap' or 'loop', but {self.method!r} came")
        if self.chunk is not None and self.chunk < 1:
            raise InputError(f"tasks per chunk must be at least 1, but {self.chunk} came")

    def __getstate__(self) -> dict[str, Any]:
        """A copy starts anew: what is remembered here belongs to one model."""
        return {**self.__dict__, "_batched_functions": {}}

    @property
    def differentiate(self) -> GradAndValue:
        """The gradient that goes with the method: torch.func under vmap, plain autograd in the loop."""
        return _func_grad_and_value if self.method == "vmap" else _autograd_grad_and_value

    def run(self, key: Any, function: Function, tensors: Sequence[Tensor], stacked: Sequence[bool],
            summed: Sequence[bool] | None = None) -> list[Tensor]:  # fmt: skip
        """`function(*tensors)` for every task.

        stacked : which tensors have a task axis. The others are the same for all tasks.
        summed : which results are summed over the tasks, by default none. The others come back with a task axis.
        key : names the function among all that this engine runs, to find its batched form again.
        """
        tensors = [tensor.detach() for tensor in tensors]
        count = next(tensor.shape[0] for tensor, has in zip(tensors, stacked, strict=True) if has)
        size = 1 if self.method == "loop" else min(self.chunk or count, count)
        batched = self._batched(key, function, tuple(stacked), None if summed is None else tuple(summed))
        parts = [
            batched(*(t[low : low + size] if has else t for t, has in zip(tensors, stacked, strict=True)))
            for low in range(0, count, size)
        ]
        if len(parts) == 1:
            return list(parts[0])
        columns = list(zip(*parts, strict=True))
        return [
            torch.stack(column).sum(0) if is_sum else torch.cat(column)
            for column, is_sum in zip(columns, summed or [False] * len(columns), strict=True)
        ]

    def _batched(self, key: Any, function: Function, stacked: tuple[bool, ...],
                 summed: tuple[bool, ...] | None) -> Function:  # fmt: skip
        """`function` over the tasks of one chunk."""
        key = (key, stacked, summed)
        if key in self._batched_functions:
            return self._batched_functions[key]

        def over_chunk(*tensors: Tensor) -> tuple[Tensor, ...]:
            if self.method == "loop":
                single = function(*(t[0] if has else t for t, has in zip(tensors, stacked, strict=True)))
                results = tuple(result.unsqueeze(0) for result in single)
            else:
                in_dims = tuple(0 if has else None for has in stacked)
                results = torch.func.vmap(function, in_dims=in_dims, randomness="different")(*tensors)
            if summed is None:
                return results
            return tuple(r.sum(0) if is_sum else r for r, is_sum in zip(results, summed, strict=True))

        batched = self._compiled(over_chunk) if self.compile else over_chunk
        self._batched_functions[key] = batched
        return batched

    def _compiled(self, function: Function) -> Function:
        """`function` compiled at its first call. Where that fails, a warning, and from then on nothing is compiled."""
        from torch._dynamo.exc import TorchDynamoException  # imported here: they double the import time of torch
        from torch._inductor.exc import InductorError

        # Dynamo counts recompilations by code object: a copy of its own keeps one function from using up another's.
        function.__code__ = function.__code__.replace()
        options: dict[str, Any] = {"fallback_random": True}  # a recomputation draws what the forward pass drew
        compiled: Function = torch.compile(function, fullgraph=True, dynamic=False, options=options)

        def call(*tensors: Tensor) -> tuple[Tensor, ...]:
            if self.compile:
                try:
                    return compiled(*tensors)
                except (TorchDynamoException, InductorError) as error:
                    self.compile = False
                    reason = str(error).strip().splitlines()[0]
                    warnings.warn(f"running without torch.compile, which failed: {reason}", stacklevel=2)
            return function(*tensors)

        return call


def _func_grad_and_value(function: Scalar, argnums: tuple[int, ...]) -> Callable[..., Any]:
    return torch.func.grad_and_value(function, argnums=argnums)


def _autograd_grad_and_value(function: Scalar, argnums: tuple[int, ...]) -> Callable[..., Any]:
    """`torch.func.grad_and_value` written with plain autograd, for what torch.func cannot run."""

    def grad_and_value(*args: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        nested = any(arg.requires_grad for arg in args)
        leaves = [
            arg.detach().requires_grad_() if i in argnums and not arg.requires_grad else arg
            for i, arg in enumerate(args)
        ]
        wanted = [leaves[i] for i in argnums]
        with torch.enable_grad():
            value = function(*leaves)
            if not value.requires_grad:
                return tuple(torch.zeros_like(leaf) for leaf in wanted), value
            grads = torch.autograd.grad(value, wanted, create_graph=nested, allow_unused=True, materialize_grads=True)
        return grads, value if nested else value.detach()

    return grad_and_value


def dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """The inner product of two lists of tensors."""
    return torch.stack([(a * b).sum() for a, b in zip(left, right, strict=True)]).sum()
