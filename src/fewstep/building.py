"""C++ is built beside Inductor's Python: the two share the wait for a first step, one and two thirds of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from functools import cache
from threading import Thread
from typing import Any

from torch import device

Built = Callable[[], Any]
Failed = Callable[[Exception], None]
# What calls the kernels, line after line, takes g++ longer than all of these, and without its effort is as fast.
ENTRY = "\nvoid inductor_entry_impl("
AS_WRITTEN = """
#if defined(__clang__)
__attribute__((optnone))
#elif defined(__GNUC__)
__attribute__((optimize("O0")))
#endif"""


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
    libraries: Any = CppWrapperCodeCache
    builds: list[Built] = []

    def begin(*, main_code: str, **more: Any) -> Callable[..., Any]:
        code = main_code.replace(ENTRY, AS_WRITTEN + ENTRY)
        built = libraries.load_pybinding_async(main_code=code, submit_fn=_begun, **more)
        builds.append(built)
        return lambda *handles: built()(*handles)

    _begun(lambda: libraries.load_async("", needs_vec_isa=True))
    libraries.load_pybinding = begin
    try:
        yield builds
    except BaseException:
        libraries.cache_clear()  # which would fail in the same way for ever
        raise
    finally:
        del libraries.load_pybinding  # PyTorch's own is inherited


def _begun(job: Callable[[], Any]) -> Future[Any]:
    """The job in a thread that no process waits for at its end."""
    future: Future[Any] = Future()

    def work() -> None:
        try:
            future.set_result(job())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=work, daemon=True).start()
    return future


def built_or_plain(run: Callable[..., Any], builds: Sequence[Built], plain: Callable[..., Any],
                   failed: Failed) -> Callable[..., Any]:  # fmt: skip
    """`run`, or where the builds that it waits for fail, `plain`, after `failed` was told."""
    from torch._inductor.codecache import CppWrapperCodeCache

    @cache
    def chosen() -> Callable[..., Any]:
        try:
            for built in builds:
                built()
        except Exception as error:  # compilers fail in any way
            CppWrapperCodeCache.cache_clear()
            failed(error)
            return plain
        return run

    return lambda *tensors: chosen()(*tensors)
