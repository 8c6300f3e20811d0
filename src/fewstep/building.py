"""C++ is built beside Inductor's Python: the two share the wait for a first step, one and two thirds of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from torch import device

from fewstep.errors import FallbackWarning

Built = Callable[[], Any]


@contextmanager
def beside(where: device) -> Iterator[list[Built]]:
    """Inside, what Inductor writes in C++ is built in the background, and a call of it waits until it is.

    The list gets a function for each build, which waits for it and raises what went wrong. PyTorch's header, which all
    of them need, is built at once: that takes seconds, once a machine.
    """
    from torch._inductor.codecache import CppWrapperCodeCache  # imported here: it doubles the import time of torch

    if where.type != "cpu":
        yield []
        return
    cache: Any = CppWrapperCodeCache
    builds: list[Built] = []
    pool = ThreadPoolExecutor(1)

    def begin(*about: Any, **more: Any) -> Callable[..., Any]:
        built = cache.load_pybinding_async(*about, submit_fn=pool.submit, **more)
        builds.append(built)
        return lambda *handles: built()(*handles)

    pool.submit(cache.load_async, "", needs_vec_isa=True)
    cache.load_pybinding = begin
    try:
        yield builds
    finally:
        del cache.load_pybinding  # PyTorch's own is inherited
        pool.shutdown(wait=False)


def built_or_plain(run: Callable[..., Any], builds: Sequence[Built], plain: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, or where the builds that it waits for fail, `plain`, with a warning."""
    chosen: list[Callable[..., Any]] = []

    def call(*tensors: Any) -> Any:
        if not chosen:
            chosen.append(_tried(run, builds, plain))
        return chosen[0](*tensors)

    return call


def _tried(run: Callable[..., Any], builds: Sequence[Built], plain: Callable[..., Any]) -> Callable[..., Any]:
    try:
        for built in builds:
            built()
    except Exception as error:  # compilers fail in any way
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        warnings.warn(f"running a part without compilation, which failed: {reason}", FallbackWarning, stacklevel=2)
        return plain
    return run
