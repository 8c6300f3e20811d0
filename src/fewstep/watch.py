"""What modules and functions read besides tensors: plain numbers, flags and names that decide what they compute.

A compiled function is a recording. It is good as long as these are what they were.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from operator import is_, itemgetter
from typing import Any

from torch import Tensor, nn

from fewstep.reach import PLAIN, Captured, is_holder, is_known, is_plain, reached, within

ALL_MODULES_HOOKS: list[Mapping[Any, Any]] = [
    nn.modules.module._global_forward_pre_hooks, nn.modules.module._global_forward_hooks
]  # fmt: skip
# What every module has, such as dicts of hooks, and nobody replaces; what is in these is found elsewhere.
_OF_EVERY_MODULE = vars(nn.Module()).keys() - {"training", "_parameters", "_buffers", "_modules"}


class Watch:
    """The plain values behind some objects, at any moment.

    Watched are attributes of modules, of the callable objects that they hold, and of other callable objects, those of
    their classes (PyTorch's own aside), the closures, defaults and globals that their code names, also that of the
    functions and methods that it calls by a name of its own or of these objects, and which objects all these are, such
    as modules, parameters, buffers, functions and the hooks of forward passes. Where the code names a dict, a class or
    an object without a call, such as a configuration, names and values in it are watched, three deep. Not watched are
    the inside of lists, the content of tensors, and what is in other Python modules.

    tensors : whether it matters which parameters and buffers the modules have

    >>> layer = nn.Dropout(0.5)
    >>> watch = Watch([layer])
    >>> before = watch.values()
    >>> layer.p = 0.1
    >>> watch.values() == before
    False
    """

    def __init__(self, objects: Sequence[Any], *, tensors: bool = True) -> None:
        self._objects, self._tensors = list(objects), tensors
        self._looks = 0
        self._first: list[Any] = []
        self._seen: list[Any] = []
        self._within: list[tuple[Any, ...]] = []
        self._last: tuple[Any, ...] = ()
        self._look()

    def _look(self) -> None:
        """Find what there is to watch."""
        objects, self._looks = self._objects, self._looks + 1
        self._own = [*ALL_MODULES_HOOKS, *[space for item in objects for space in _namespaces(item, self._tensors)]]
        spaces = [*self._own, *_classes(objects)]
        # One C call for each namespace: this runs in every step, also where a step takes a fraction of a millisecond.
        self._getters = [(space, getter) for space in spaces if (getter := _getter(space))]
        self._spaces, self._sizes = spaces, [len(space) for space in self._own]
        self._first = []
        self._reach()

    def _reach(self) -> None:
        """Find what the functions come to read, and what they name that holds further values."""
        functions = [function for item in self._objects for function in _functions(item)]
        self._captured: list[Captured] = reached(functions, self._spaces)
        names = {name for captured in self._captured for name in captured.names.attributes}
        named = [space[name] for space in self._spaces for name in names & space.keys()]
        named += chain.from_iterable(captured.values() for captured in self._captured)
        spaces = {*map(id, self._spaces)}
        self._holders = [*{id(item): item for item in named if id(item) not in spaces and is_holder(item)}.values()]

    def _found(self) -> list[Any]:
        found = [*chain.from_iterable([getter(space) for space, getter in self._getters])]
        for captured in self._captured:
            found += captured.values()
        return found

    def __reduce__(self) -> Any:
        """A copy watches the copies of the objects."""
        return partial(Watch, tensors=self._tensors), (self._objects,)

    def values(self) -> tuple[Any, ...]:
        """Equal to the values of another moment if nothing that is watched has changed since."""
        if [*map(len, self._own)] != self._sizes:  # an attribute has come or gone
            self._look()
        try:
            now = self._found()
        except KeyError:  # one has come and another one gone
            self._look()
            return self.values()
        if len(now) != len(self._first) or any(
            old is not new and not isinstance(new, (*PLAIN, Tensor)) for old, new in zip(self._first, now, strict=True)
        ):
            self._reach()
            self._first = now = self._found()
        held = [tuple(map(_identity, within(holder))) for holder in self._holders]
        same = bool(self._last) and len(now) == len(self._seen) and all(map(is_, now, self._seen))
        if not same or held != self._within:
            self._seen, self._within = now, held
            self._last = (self._looks, *map(_identity, now), *held)
        return self._last

    def objects(self) -> list[Any]:
        """What the values stand for. As long as it is held, no other object has the identity of one of these."""
        return [[*space.values()] for space in self._spaces] + [
            *(captured.values() for captured in self._captured), *map(within, self._holders)
        ]  # fmt: skip


class _Slots(Mapping[str, Any]):
    """The attributes of an object that has no dict for them."""

    def __init__(self, item: Any) -> None:
        self._item = item

    def _names(self) -> list[str]:
        slots = [vars(kind).get("__slots__", ()) for kind in type(self._item).__mro__]
        names = [name for own in slots for name in ((own,) if isinstance(own, str) else own)]
        return [name for name in names if name not in ("__dict__", "__weakref__") and hasattr(self._item, name)]

    def __getitem__(self, name: str) -> Any:
        try:
            return getattr(self._item, name)
        except AttributeError as error:
            raise KeyError(name) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._names())

    def __len__(self) -> int:
        return len(self._names())


def _getter(space: Mapping[str, Any]) -> Any:
    """A function that takes the entries out of such a namespace, as a tuple; None where there are none."""
    keys = [k for k in space if not (isinstance(k, str) and (k[:2] == "__" or k in _OF_EVERY_MODULE))]
    return itemgetter(keys[0], *keys) if keys else None


def _identity(value: Any) -> Any:
    return value if is_plain(value) else id(value)


def _classes(objects: Sequence[Any]) -> list[Mapping[str, Any]]:
    """What the classes of the objects, and of what these hold, have themselves."""
    held = [part for item in objects for part in _held(item)]
    kinds = {kind: None for item in held for kind in type(item).__mro__ if not is_known(kind)}
    return [vars(kind) for kind in kinds]


def _held(item: Any) -> list[Any]:
    """The object, or what it is made of, and the callable objects in that."""
    if isinstance(item, nn.Module):
        return [part for module in item.modules() for part in (module, *_callables(module))]
    if isinstance(item, partial):
        return _held(item.func)
    return _held(item.__self__) if inspect.ismethod(item) else [item]


def _namespaces(item: Any, tensors: bool) -> Iterator[Mapping[str, Any]]:
    """The dicts behind `item` whose entries decide what it computes."""
    if isinstance(item, nn.Module):
        for module in item.modules():
            yield from (vars(module), module._modules)
            yield from (module._parameters, module._buffers) if tensors else ()
            yield from (module._forward_pre_hooks, module._forward_hooks)  # type: ignore[misc]
            for own in _callables(module):
                yield from _attributes(own)
    elif isinstance(item, partial):
        yield item.keywords
        yield dict(enumerate(item.args))  # type: ignore[arg-type]
        yield from _namespaces(item.func, tensors)
    elif inspect.ismethod(item):
        yield from _namespaces(item.__self__, tensors)
    elif not isinstance(item, type):
        yield from _attributes(item)


def _attributes(item: Any) -> Iterator[Mapping[str, Any]]:
    if hasattr(item, "__dict__"):
        yield vars(item)
    if slots := _Slots(item):
        yield slots


def _callables(module: nn.Module) -> list[Any]:
    """The objects that a module calls and that are no modules, such as the update rule in another one."""
    held = [value for value in (*vars(module).values(), *hooks_of(module)) if callable(value)]
    return [value for value in held if not isinstance(value, type | partial) and not inspect.isroutine(value)]


def hooks_of(module: nn.Module) -> list[Any]:
    """The hooks of its own forward passes."""
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]


def _functions(item: Any) -> Iterator[Any]:
    """The Python functions that `item` runs first."""
    if isinstance(item, nn.Module):
        own = {type(module).forward for module in item.modules() if not type(module).__module__.startswith("torch.")}
        yield from (function for function in own if inspect.isfunction(function))
        for module in item.modules():
            yield from (function for held in (*_callables(module), *hooks_of(module)) for function in _functions(held))
    elif isinstance(item, partial):
        yield from _functions(item.func)
    elif inspect.ismethod(item):
        yield from _functions(item.__func__)
    elif inspect.isfunction(item):
        yield item
    elif inspect.isfunction(getattr(type(item), "__call__", None)):  # noqa: B004
        yield type(item).__call__
