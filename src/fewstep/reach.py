"""What a Python function comes to read: its closure, defaults and globals, and those of the functions that it calls."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from types import CodeType
from typing import Any, NamedTuple
from weakref import ProxyTypes

from torch import Tensor

PLAIN = (bool, int, float, str, type(None))
# Packages in which nobody changes what a class has, or what a function reads; a trainer counts steps.
KNOWN = ("builtins", "torch", "abc", "typing", "functools", "fewstep", "numpy", "logging",
         "lightning", "pytorch_lightning", "lightning_fabric")  # fmt: skip
DEEPEST, LARGEST = 3, 256  # of what is looked into: objects in objects, and entries in all; what is larger is data
FILLED = (list, set, Tensor)  # what people fill, or write to, as they go on: only that it is one counts


class Names(NamedTuple):
    """Those of a piece of code, with the functions in it."""

    globals: frozenset[str]
    attributes: frozenset[str]


@lru_cache(maxsize=4096)
def names_in(code: CodeType) -> Names:
    """What the code reads by name.

    >>> sorted(names_in((lambda x: [FACTOR * x.size for _ in range(2)]).__code__).globals)
    ['FACTOR', 'range']
    """
    found: dict[str, set[str]] = {"globals": set(), "attributes": set()}
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            found["globals"].add(instruction.argval)
        elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"):
            found["attributes"].add(instruction.argval)
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            for kind, names in names_in(inner)._asdict().items():
                found[kind] |= names
    return Names(**{kind: frozenset(names) for kind, names in found.items()})


class Captured:
    """The values that a function reads without being handed them: now, and later."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.names = Names(frozenset(), frozenset()) if is_known(function) else names_in(function.__code__)
        self._globals, self._get = sorted(self.names.globals), function.__globals__.get

    def values(self) -> list[Any]:
        """Its code, its defaults, its closure, and the globals that its code names, or None."""
        function = self.function
        found = [function.__code__, *(function.__defaults__ or ()), *map(self._get, self._globals)]
        if function.__kwdefaults__:
            found += function.__kwdefaults__.values()
        if function.__closure__:
            found += map(_content, function.__closure__)
        return found


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return cell


def reached(functions: Iterable[Any], spaces: Sequence[Mapping[str, Any]]) -> list[Captured]:
    """The functions, those that they name, and those among the attributes in `spaces` whose names they use, and so on.

    spaces : attributes of objects and of classes
    """
    found: dict[Any, Captured] = {}
    waiting = [*functions]
    while waiting:
        function = waiting.pop(0)
        if function in found:
            continue
        found[function] = captured = Captured(function)
        waiting += filter(inspect.isfunction, captured.values())
        waiting += [method for space in spaces for name in captured.names.attributes & space.keys()
                    for method in _methods(space[name])]  # fmt: skip
    return [captured for captured in found.values() if len(captured.values()) > 1 or not is_known(captured.function)]


def _methods(value: Any) -> list[Any]:
    """The functions behind an attribute of a class."""
    if isinstance(value, property):
        return [part for part in (value.fget,) if inspect.isfunction(part)]
    value = getattr(value, "__func__", value)  # of a static method, or one of the class
    return [value] if inspect.isfunction(value) else []


def is_known(item: Any) -> bool:
    """Whether a class or a function comes from where nobody changes anything."""
    where = item.__globals__.get("__name__") if inspect.isfunction(item) else getattr(item, "__module__", "")
    return str(where).partition(".")[0] in KNOWN


def is_plain(value: Any) -> bool:
    """Whether it is a number, a flag, a name, or a tuple of such."""
    return all(map(is_plain, value)) if type(value) is tuple else type(value) in PLAIN


def is_holder(value: Any) -> bool:
    """Whether it is a dict, a class, or an object with attributes, that may hold what decides a computation."""
    try:
        if isinstance(value, ProxyTypes) or inspect.ismodule(value):
            return False
        kind = value if isinstance(value, type) else type(value)
        callable_object = callable(value) and not isinstance(value, type)
        return isinstance(value, dict) or not (callable_object or is_known(kind) or not hasattr(value, "__dict__"))
    except Exception:  # objects may do anything when they are asked
        return False


def within(holder: Any) -> list[Any]:
    """Names and values in a dict, a class or an object, and in those in it.

    >>> within({"rate": 0.5, "more": {"steps": 3}, "losses": [1, 2]})
    ['rate', 0.5, 'more', 'losses', <class 'list'>, 'steps', 3]
    """
    found: list[Any] = []
    seen, waiting = set[int](), [(holder, 1)]
    while waiting and len(found) < LARGEST:
        item, deep = waiting.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        try:
            entries = [*(item if isinstance(item, dict) else vars(item)).items()]
        except Exception:
            continue
        for name, value in entries[:LARGEST]:
            if isinstance(name, str) and name[:2] == "__":
                continue
            found.append(name)
            if deep < DEEPEST and is_holder(value):
                waiting.append((value, deep + 1))
            else:
                found.append(type(value) if isinstance(value, FILLED) else value)
    return found
