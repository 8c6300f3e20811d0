"""What is mended in Inductor, PyTorch's compiler, while this library compiles: wrong results, failures and waste."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial, partialmethod
from pathlib import Path
from typing import Any, cast


@contextmanager
def mended() -> Iterator[None]:
    """Inside, Inductor's C++ is right, and takes less time to come."""
    from torch._inductor.codegen import cpp

    fused: Any = cpp.OuterLoopFusedSchedulerNode
    check = fused.check_outer_fusion_loop_level_attr
    fused.check_outer_fusion_loop_level_attr = partialmethod(_one_row_at_a_time, check)
    try:
        with _spared():
            yield
    finally:
        fused.check_outer_fusion_loop_level_attr = check


def _one_row_at_a_time(fused: Any, check: Any, kernels: Any, *about: Any) -> bool:
    """Whether loops may share their outer ones.

    PyTorch 2.13 does not ask how many rows an outer loop takes at a time, and gives what lies between the inner ones
    a buffer of one row: the last row's numbers then stand for all (pytorch/pytorch#185702, silently wrong).
    """
    from torch._inductor.virtualized import V

    loops = [loop for kernel in kernels for loop in kernel.loop_nest.loops[: fused.outer_loop_fusion_depth]]
    if getattr(V.local_buffer_context, "local_buffers", None) and any(loop.steps != 1 for loop in loops):
        return False
    return bool(check(fused, kernels, *about))


@contextmanager
def _spared() -> Iterator[None]:
    """Spare Inductor what takes up to half of its time: where it asks, PyTorch 2.13 gives the same answers sooner.

    And mend its C++ where a sum in bfloat16 goes to two places: it declares one variable twice. And its cache.
    """
    from torch._inductor import cpu_vec_isa, dtype_propagation, lowering  # noqa: F401  (it completes the table of types)
    from torch._inductor.codegen import cpp as module

    cpp: Any = module
    types: Any = dtype_propagation.DtypePropagationOpsHandler
    instructions: Any = cpu_vec_isa.VecISA
    stride, fill = getattr(cpp, "stride_at_vec_range", None), types.__init__
    check = getattr(instructions, "check_build", None)
    if stride is None or check is None or types() is not types():  # another version
        yield
        return
    cpp.stride_at_vec_range = lru_cache(maxsize=None)(partial(_stride, stride))
    types.__init__ = lambda self: None  # one object, filled again at each use
    instructions.check_build = _once(check)
    _whole_libraries()
    store = cpp.CppVecKernel.store_reduction
    cpp.CppVecKernel.store_reduction = lambda kernel, *about: _in_braces(kernel.reduction_suffix, store, kernel, *about)
    try:
        yield
    finally:
        cpp.CppVecKernel.store_reduction = store
        cpp.stride_at_vec_range, types.__init__, instructions.check_build = stride, fill, check


def _in_braces(code: Any, write: Any, *about: Any) -> None:
    """Let `write` add to the code in a scope of its own."""
    code.writeline("{")
    write(*about)
    code.writeline("}")


def _once(check: Any) -> Any:
    """Whether a compiler knows a set of instructions: it is asked for the widest first, which stand for the others."""
    known: list[bool] = []

    def check_widest(instructions: Any, code: str) -> bool:
        if not any(known):
            known.append(check(instructions, code))
        return known[-1]

    return check_widest


def _stride(general: Any, index: Any, var: Any, vec_length: int | None = None) -> Any:
    """How far `index` moves with `var`: by `expand`, in place of `simplify`, where it has no quotients."""
    import sympy

    if index.has(sympy.Function):
        return general(index, var, vec_length)
    return sympy.expand(index.subs(var, var + 1) - index)


@lru_cache(maxsize=1)
def _whole_libraries() -> None:
    """From now on: builds outlast the time in which the rest is mended."""
    from torch._inductor.cpp_builder import CppBuilder

    builder, build = cast("Any", CppBuilder), CppBuilder.build
    builder.build = lambda self: _all_or_nothing(build, self)


def _all_or_nothing(build: Any, builder: Any) -> None:
    """Build under another name at first: a process that is killed leaves no half of a library in the cache."""
    target, output = builder._target_file, builder._output
    part = f"{target}.{os.getpid()}"
    builder._output = output.replace(target, part)
    try:
        build(builder)
    finally:
        builder._output = output
    if Path(part).exists():
        Path(part).replace(target)
