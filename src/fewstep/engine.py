"""How the loss of one task and its derivatives run over many tasks: the choices, and the one place where it happens.

Everything below `Runner` is written for ONE task, without a task axis. Each order of differentiation stays inside
the `vmap`: `grad` of a `vmap` of `grad` is silently wrong in PyTorch through fused batch, layer and instance norm
(pytorch/functorch#534).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args, get_type_hints

import torch
from torch import Tensor
from torch.nn import functional

from fewstep.channels_last import conv2d_channels_last
from fewstep.compilation import compiled
from fewstep.convolution import conv2d_by_matmul
from fewstep.errors import FallbackWarning, InputError
from fewstep.pooling import max_pool2d_by_comparison
from fewstep.replacing import Replacing

MOST_COMPILED = 64
Convolution = Literal["native", "channels_last", "matmul"]
Part = Literal["pieces", "step"]
Precision = Literal["full", "bfloat16"]
Extra = Literal["a CUDA graph", "keep", "compilation"]
EXTRAS: dict[Extra, dict[str, Any]] = {
    "a CUDA graph": {"graph": False}, "keep": {"keep": False}, "compilation": {"compile": "no", "keep": False},
}  # fmt: skip
Function = Callable[..., tuple[Tensor, ...]]
Scalar = Callable[..., Tensor]
GradAndValue = Callable[[Scalar, tuple[int, ...]], Callable[..., tuple[tuple[Tensor, ...], Tensor]]]


@dataclass(frozen=True, kw_only=True)
class Engine:
    """How the tasks of a batch are computed. None of the choices but `precision` changes a result beyond rounding.

    method : "vmap" batches the tasks; "loop" takes them one by one, for models without batching rules (RNNs)
    chunk : tasks at a time under "vmap"; None takes all at once. Fewer need less memory, and cache better.
    compile : "no"; "pieces" compiles the inner gradient, its derivative and the query gradient, each once whatever the
        number of inner steps; "step" compiles a whole meta-step, which is faster and takes longer to compile with each
        inner step
    product : the derivative of the inner gradient by reverse mode over reverse mode, or forward over reverse
    convolution : PyTorch's own; "channels_last", its own in that memory format, under "loop" only; or "matmul",
        unfolded into matrix products, which suits the small convolutions of many tasks with weights of their own.
        A convolution in groups, or whose padding is a word, stays PyTorch's own.
    keep : with compiled pieces, what the matrix products, convolutions and random generators of an inner step gave,
        and what is small, is kept for its derivative and not computed again. That takes less time, and memory for each
        step and task.
    graph : on a CUDA GPU, a whole training step (`MetaStep`) is recorded as a graph of kernels and replayed, compiled
        or not: no time goes into launching them
    precision : "bfloat16" computes the loss in it where autocast says so; the inner updates, the meta-gradient and
        theta of each step stay in the parameters' own precision
    """

    method: Literal["vmap", "loop"] = "vmap"
    chunk: int | None = None
    compile: Literal["no", "pieces", "step"] = "no"
    product: Literal["reverse", "forward"] = "reverse"
    convolution: Convolution = "native"
    keep: bool = False
    graph: bool = False
    precision: Precision = "full"

    def __post_init__(self) -> None:
        kinds = get_type_hints(Engine)
        for field in fields(self):
            value, choices = getattr(self, field.name), get_args(kinds[field.name])
            choices = choices or (True, False)
            if field.name != "chunk" and value not in choices:
                raise InputError(f"the engine's {field.name} must be one of {choices}, but {value!r} came")
        if self.chunk is not None and (not isinstance(self.chunk, int) or self.chunk < 1):
            raise InputError(f"the engine's chunk must be at least 1 task, but {self.chunk!r} came")
        if self.method == "loop" and self.chunk not in (None, 1):
            raise InputError(f"the method 'loop' takes one task at a time, but chunk={self.chunk} came; set it to None")
        if self.product == "forward" and (self.method == "loop" or self.compile == "step"):
            came = f"method={self.method!r} and compile={self.compile!r} came"
            raise InputError(
                f"the product 'forward' needs the method 'vmap', and has no part in a whole step, but {came}"
            )
        if self.keep and (self.compile != "pieces" or self.product == "forward"):
            came = f"compile={self.compile!r} and product={self.product!r} came"
            raise InputError(f"keep=True needs compile='pieces' and product='reverse', but {came}; set them too")
        if self.method == "vmap" and self.convolution == "channels_last":
            raise InputError("PyTorch has no channels-last format under the method 'vmap'; use 'loop' or 'matmul'")

    def __str__(self) -> str:
        """The choices that are not the default's.

        >>> print(Engine(chunk=4, compile="pieces"), "|", Engine())
        vmap, chunk 4, compile pieces | vmap
        """
        default = asdict(Engine())
        said = [
            f"{name} {value}" for name, value in asdict(self).items() if value != default[name] and name != "method"
        ]
        return ", ".join([self.method, *said])

    def at_a_time(self, tasks: int) -> int:
        """How many of so many tasks are computed at once.

        >>> Engine(chunk=4).at_a_time(3), Engine(chunk=4).at_a_time(9), Engine(method="loop").at_a_time(9)
        (3, 4, 1)
        """
        return 1 if self.method == "loop" else min(self.chunk or tasks, tasks)

    @property
    def differentiate(self) -> GradAndValue:
        """The gradient that goes with the method: torch.func under vmap, plain autograd in the loop."""
        return _func_grad_and_value if self.method == "vmap" else _autograd_grad_and_value

    @contextmanager
    def numerics(self, device: torch.device) -> Iterator[None]:
        """Inside, losses are computed with the engine's precision, convolution and pooling."""
        replaced: dict[Any, Any] = {}
        if self.convolution != "native":
            replaced[torch.conv2d] = conv2d_by_matmul if self.convolution == "matmul" else conv2d_channels_last
        if self.compile != "no":  # compiled, the derivative of PyTorch's own searches every window for every pixel
            replaced[torch.max_pool2d] = replaced[functional.max_pool2d] = max_pool2d_by_comparison
        with ExitStack() as stack:
            if self.precision == "bfloat16":  # without its cache, which would leak tensors out of vmap
                stack.enter_context(torch.autocast(device.type, torch.bfloat16, cache_enabled=False))
            if replaced:
                stack.enter_context(Replacing(replaced))
            yield


class Runner:
    """Runs functions of one task over batches of tasks, as an engine says, and keeps what it compiled."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._compiled: dict[Any, Any] = {}
        self._last: tuple[Any, Any] = (None, None)
        self._worlds: dict[Any, Any] = {}
        self._world: Any = None

    def __reduce__(self) -> Any:
        """A copy starts anew: what is remembered here belongs to one model."""
        return Runner, (self.engine,)

    def enter(self, world: Any, objects: Any) -> None:
        """Tell the runner all that a compiled function depends on besides its tensors, see `watch.py`.

        The objects behind it are held as long as the runner is: none other may get the identity of one of them.
        """
        self._worlds.setdefault(world, objects)
        self._world = world

    def run(self, key: Any, function: Function, tensors: Sequence[Tensor], stacked: Sequence[bool],
            summed: Sequence[bool] | None = None, *, part: Part = "pieces") -> list[Tensor]:  # fmt: skip
        """`function(*tensors)` for every task.

        stacked : which tensors have a task axis. The others are the same for all tasks.
        summed : which results are summed over the tasks, by default none. The others come back with a task axis.
        key : names the function among all that this runner runs, to find its compiled form again.
        part : the function is a piece of a meta-step, or a whole step
        """
        tensors = [tensor.detach() for tensor in tensors]
        chunks = self.chunks(tensors, stacked)
        return joined([self._one_chunk(key, function, piece, stacked, summed, part) for piece in chunks], summed)

    def chunks(self, tensors: Sequence[Tensor], stacked: Sequence[bool]) -> Iterator[Sequence[Tensor]]:
        """The tensors of as many tasks at a time as the engine takes."""
        count = next(tensor.shape[0] for tensor, has in zip(tensors, stacked, strict=True) if has)
        size = self.engine.at_a_time(count)
        if size == count:
            yield tensors
            return
        for low in range(0, count, size):
            yield [t[low : low + size] if has else t for t, has in zip(tensors, stacked, strict=True)]

    def _one_chunk(self, key: Any, function: Function, tensors: Sequence[Tensor], stacked: Sequence[bool],
                   summed: Sequence[bool] | None, part: Part) -> tuple[Tensor, ...]:  # fmt: skip
        key = (key, tuple(stacked), None if summed is None else tuple(summed))
        return self.call(key, lambda *tensors: self.over_tasks(function, tensors, stacked, summed), tensors, part)

    def over_tasks(self, function: Function, tensors: Sequence[Tensor], stacked: Sequence[bool],
                   summed: Sequence[bool] | None) -> tuple[Tensor, ...]:  # fmt: skip
        """`function` over the tasks of one chunk: under "loop" there is one."""
        if self.engine.method == "loop":
            single = function(*(t[0] if has else t for t, has in zip(tensors, stacked, strict=True)))
            results = tuple(result.unsqueeze(0) for result in single)
        else:
            in_dims = tuple(0 if has else None for has in stacked)
            results = torch.func.vmap(function, in_dims=in_dims, randomness="different")(*tensors)
        if summed is None:
            return results
        return tuple(r.sum(0) if is_sum else r for r, is_sum in zip(results, summed, strict=True))

    def call(self, key: Any, function: Function, tensors: Sequence[Tensor], part: Part) -> tuple[Tensor, ...]:
        """`function(*tensors)`, compiled if the engine compiles such parts, once for each key and form of tensors."""
        if self.engine.compile != part:
            return function(*tensors)
        if any([0 in stride for stride in map(Tensor.stride, tensors)]):  # noqa: C419  (a generator takes twice as long)
            tensors = [dense(tensor) for tensor in tensors]
        known = self.recorded("compilation", key, tensors, lambda: compiled(function, tensors))
        return (known or function)(*tensors)

    def recorded(self, what: Extra, key: Any, tensors: Sequence[Tensor], record: Callable[[], Any]) -> Any:
        """What `record` made for this key and such tensors; where it fails, None, and a warning.

        what : the engine does this no more then
        """
        device = tensors[-1].device
        autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
        form = tuple([(tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors])
        full_key = (what, key, self._world, device, autocast, torch.get_default_dtype(), form)
        if full_key != self._last[0]:  # to compare takes less than to look up
            if full_key not in self._compiled:
                self._compiled[full_key] = self._try_to(record, what)
            self._last = full_key, self._compiled[full_key]
        return self._last[1]

    def _try_to(self, record: Callable[[], Any], what: Extra) -> Any:
        try:
            if len(self._compiled) >= MOST_COMPILED:
                raise RuntimeError(f"the model, or the tasks' shapes, changed {MOST_COMPILED} times")
            return record()
        except Exception as error:  # compilers fail in any way
            self.without(what, error)
            return None

    def without(self, what: Extra, error: Exception) -> None:
        """Go on without what failed, with a warning."""
        self.engine = replace(self.engine, **EXTRAS[what])
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        warnings.warn(f"running without {what}, which failed: {reason}", FallbackWarning, stacklevel=3)


def joined(parts: Sequence[Sequence[Tensor]], summed: Sequence[bool] | None) -> list[Tensor]:
    """The results for all tasks out of those of each chunk."""
    if len(parts) == 1:
        return list(parts[0])
    columns = list(zip(*parts, strict=True))
    return [
        torch.stack(column).sum(0) if is_sum else torch.cat(column)
        for column, is_sum in zip(columns, summed or [False] * len(columns), strict=True)
    ]


def dense(tensor: Tensor) -> Tensor:
    """What is the same for all tasks in the form of what is not: compiled code is made for one form."""
    return tensor.clone(memory_format=torch.contiguous_format) if 0 in tensor.stride() else tensor


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


def value_and_gradient(engine: Engine, function: Scalar, wanted: tuple[int, ...],
                       tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:  # fmt: skip
    """The scalar that `function` gives for `tensors`, and its gradient by those at the positions `wanted`."""
    if not wanted:
        return (function(*tensors),)
    grads, value = engine.differentiate(function, wanted)(*tensors)
    return (value, *grads)


def dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """The inner product of two lists of tensors."""
    return torch.stack([(a * b).sum() for a, b in zip(left, right, strict=True)]).sum()
