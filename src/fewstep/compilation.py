"""A function of tensors, compiled: traced as plain operators, derivatives and batching included, then by Inductor.

Tracing sees through torch.func, so that a gradient of a gradient is one flat graph; the compiled call has no guards
and costs microseconds. What a trace cannot see is what Python decided on its way. So the caller's key must change with
everything plain that the model reads (`watch.py`), and a function that draws from Python's or NumPy's random
generators, or that asks for a tensor's value, is refused.
"""

from __future__ import annotations

import gc
import hashlib
import os
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from platformdirs import user_cache_dir
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from fewstep.building import Built, Failed, beside, built_or_plain
from fewstep.errors import InputError
from fewstep.mending import mended
from fewstep.replay import Moment
from fewstep.splitting import split

CACHE = "TORCHINDUCTOR_CACHE_DIR"
ASKING = ("item", "tolist", "numpy", "__array__", "__bool__", "__int__", "__float__", "__index__", "__complex__",
          "__contains__", "equal", "allclose", "is_nonzero")  # fmt: skip
_ONE_AT_A_TIME = threading.RLock()  # compiling changes what all threads share
Function = Callable[..., tuple[Tensor, ...]]


@contextmanager
def _no_collection() -> Iterator[None]:
    """Compiling makes millions of small objects, few of them in cycles: looking for these takes a tenth of its time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_no_collection()
def compiled(function: Function, examples: Sequence[Tensor]) -> Function:
    """`function` for tensors of the shapes, types and devices of `examples`.

    Raises whatever tracing or compiling raises. What was compiled is kept on disk for the next process, in the user's
    cache folder unless TORCHINDUCTOR_CACHE_DIR names another.
    """
    with torch.no_grad(), _one_at_a_time(examples) as builds:
        graph = _traced(function, examples)
        constants = _lifted(graph)
        run = _by_inductor(graph, [*examples, *constants])
        for built in builds:
            built()
        return _called(run, constants)


@_no_collection()
def compiled_in_two(
    function: Function, examples: Sequence[Tensor], late: int, failed: Failed
) -> tuple[Function, Function]:
    """`early(*known) -> (*first results, *kept)` and `later(*tensors, *kept) -> the other results`.

    late : how many of the tensors, the last ones, are not known at first, and how many results do not depend on those
    failed : is told where `later`, for which nobody waits before it is called, cannot be built; it runs plainly then
    All else is as in `compiled`.
    """
    with torch.no_grad(), _one_at_a_time(examples) as builds:
        graph = _traced(function, examples)
        constants = _lifted(graph)
        # Nothing is written to in place.
        graph = _traced(torch.func.functionalize(_as_traced(graph)), [*examples, *constants])
        early, later = split(graph, range(len(examples) - late, len(examples)), late)
        known = [*examples[:-late], *constants]
        first = _by_inductor(early, known)

        def finish(kept: Sequence[Tensor]) -> Function:
            begun, run = len(builds), _by_inductor(later, [*examples, *constants, *kept])
            return built_or_plain(run, builds[begun:], _as_traced(later), failed)

        second = finish(guess := _forms(_as_traced(early), known)[late:])
        with Moment.now(examples[-1].device).again():  # only the places of the results are of use yet
            results = list(first(*known))
        kept = results[late:]
        if [*map(_form, kept)] != [*map(_form, guess)]:  # convolutions choose their memory format where they run
            second = finish(kept)
    of_caller = {result.untyped_storage().data_ptr() for result in results[:late]}
    shared = {late + i for i, part in enumerate(kept) if part.untyped_storage().data_ptr() in of_caller}

    def own(*tensors: Tensor) -> tuple[Tensor, ...]:  # the caller may write to its results
        return tuple(part.clone() if i in shared else part for i, part in enumerate(first(*tensors)))

    return _called(own, constants), _called(second, constants, len(kept))


class _Asking(TorchFunctionMode):
    """Refuse to tell the value of a tensor that is held, not traced: the recording would take it for a constant."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ASKING and any(isinstance(arg, Tensor) and _is_held(arg) for arg in args):
            raise RuntimeError(f"the model asks for the value of a tensor that it holds ({name})")
        return func(*args, **(kwargs or {}))


def _is_held(tensor: Tensor) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return not isinstance(tensor, FakeTensor) and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)


@contextmanager
def _one_at_a_time(examples: Sequence[Tensor]) -> Iterator[list[Built]]:
    with _ONE_AT_A_TIME, mended(), _cache_of_the_user(), beside(examples[-1].device) as builds:
        yield builds


def _as_traced(graph: Callable[..., Any]) -> Callable[..., Any]:
    """The graph, which has the casts of autocast in it, without any more of them."""

    def run(*tensors: Tensor) -> Any:
        with torch.autocast(tensors[0].device.type, enabled=False):
            return graph(*tensors)

    return run


def _forms(graph: Callable[..., Any], examples: Sequence[Tensor]) -> list[Tensor]:
    """Tensors of the form of the graph's results, whose numbers nobody has to wait for."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        results = graph(*[mode.from_tensor(tensor) for tensor in examples])
    return [torch.empty_strided(r.shape, r.stride(), dtype=r.dtype, device=r.device) for r in results]


def _by_inductor(graph: fx.GraphModule, examples: Sequence[Tensor]) -> Callable[..., Any]:
    from torch._guards import TracingContext, tracing  # imported here: they double the import time of torch
    from torch._inductor import compile as inductor
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    from fewstep.hoisting import Hoist

    options: dict[str, Any] = {"fallback_random": True}  # a recomputation draws what the forward pass drew
    on_cpu: dict[str, Any] = {
        "cpp_wrapper": True,  # many short kernels: the time between them counts
        "unroll_reductions_threshold": 1,  # short sums as loops: half the code
        "realize_reads_threshold": 8,  # rather compute again than write and read: memory is slow
        "realize_opcount_threshold": 60,
        "post_grad_custom_post_pass": Hoist(),
        "max_fusion_buffer_group_pairwise_attempts": 8,  # fusions to try of each kernel, not 64: as fast later
        "split_reductions": False,  # one core reduces each channel: a second stage only strides through memory
    }
    if examples[0].device.type == "cpu":
        options |= on_cpu
    for node in graph.graph.find_nodes(op="placeholder"):
        node.meta.pop("val", None)  # what Inductor would take for the examples
    # Inductor keeps on disk only what was compiled under an environment of shapes; these are fixed.
    mode = FakeTensorMode(shape_env=ShapeEnv())
    inputs: list[Any] = [mode.from_tensor(tensor.detach(), static_shapes=True) for tensor in examples]
    with tracing(TracingContext(mode)):
        run: Callable[..., Any] = inductor(graph, inputs, options=options)
    return run


def _called(run: Callable[..., Any], constants: Sequence[Tensor], kept: int = 0) -> Function:
    """`run` with the constants after its tensors, but before the last `kept` ones."""
    forms = [_form(constant) for constant in constants]

    def call(*tensors: Tensor) -> tuple[Tensor, ...]:
        if [_form(constant) for constant in constants] != forms:
            raise InputError(
                "a frozen parameter or a buffer has another type, shape or device than when this was compiled; set the "
                "learner's engine anew: learner.engine = learner.engine"
            )
        own = len(tensors) - kept
        with torch.no_grad():
            return tuple(run(*tensors[:own], *[constant.detach() for constant in constants], *tensors[own:]))

    return call


def _form(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.device


def _traced(function: Function, examples: Sequence[Tensor]) -> fx.GraphModule:
    """The operators that `function` runs, derivatives and vmap resolved."""
    from torch.fx.experimental.proxy_tensor import make_fx

    before = foreign_random()
    with _Asking():
        graph: fx.GraphModule = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*examples)
    if foreign_random() != before:
        raise RuntimeError("the model draws from Python's or NumPy's random generator, not from PyTorch's")
    return graph


@contextmanager
def _cache_of_the_user() -> Iterator[None]:
    """Compile into the user's cache folder, which outlives a restart, unless the user named another.

    The code is for one kind of processor, and such folders are shared by machines: each kind has its own.
    """
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    before = os.environ.get(CACHE)
    if before in (None, default_cache_dir()):  # PyTorch writes its default there
        kind = hashlib.sha256(repr(sorted(torch.cpu.get_capabilities().items())).encode()).hexdigest()[:8]
        folder = Path(user_cache_dir("fewstep", appauthor=False)) / "inductor" / kind
        with suppress(OSError):  # where it cannot be written, PyTorch's default stays
            folder.mkdir(parents=True, exist_ok=True)
            if os.access(folder, os.W_OK):
                os.environ[CACHE] = str(folder)
    try:
        yield
    finally:
        os.environ.pop(CACHE, None)
        if before is not None:
            os.environ[CACHE] = before


def foreign_random() -> tuple[object, ...]:
    """The state of the random generators that a recording would take for constants."""
    numpy: Any = np.random.get_state(legacy=False)
    return random.getstate(), numpy["state"]["pos"], numpy["state"]["key"].tobytes()


def _lifted(graph: fx.GraphModule) -> list[Tensor]:
    """Turn the tensors that the graph holds into inputs, so that whatever is written to one is seen; return them."""
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    held: dict[str, fx.Node] = {}
    tensors = []
    for node in [node for node in graph.graph.nodes if node.op == "get_attr"]:
        name = str(node.target)
        if name not in held:
            with graph.graph.inserting_after([*inputs, *held.values()][-1]):
                held[name] = graph.graph.placeholder(name)
            tensors.append(getattr(graph, name))
        node.replace_all_uses_with(held[name])
        graph.graph.erase_node(node)
    graph.recompile()
    return tensors
