"""Pickles that others made, read without running what they may hold: numbers, texts, containers and arrays only."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from fewstep.errors import InputError

# What NumPy's arrays and plain containers are made of, under the names of NumPy 1 and 2.
PLAIN = {
    *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    *((f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")),
    *(("numpy", name) for name in ("ndarray", "dtype")),
    ("_codecs", "encode"),
    *((builtin, name) for builtin in ("builtins", "__builtin__") for name in ("list", "dict", "set", "tuple")),
    *(("collections", name) for name in ("OrderedDict", "defaultdict")),
}


class _Plain(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in PLAIN:
            raise pickle.UnpicklingError(f"it would run {module}.{name}")
        return super().find_class(module, name)


def load_plain(path: Path) -> Any:
    """What a pickle holds; `InputError` where it is damaged, or holds more than data.

    Text of Python 2 is read as Latin-1.
    """
    try:
        with path.open("rb") as file:
            return _Plain(file, encoding="latin1").load()
    except Exception as error:  # a damaged pickle can make its reader fail in any way
        raise InputError(
            f"{path} is no pickle of plain arrays ({' '.join(str(error).split())}); fewstep reads no other, since a "
            "pickle can run any code"
        ) from error
