"""Other functions in place of PyTorch's, for a while."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch.overrides import TorchFunctionMode


class Replacing(TorchFunctionMode):
    """Inside, other functions run in place of PyTorch's.

    >>> import torch
    >>> with Replacing({torch.add: torch.mul}):
    ...     torch.add(torch.tensor(2), torch.tensor(3))
    tensor(6)
    """

    def __init__(self, table: Mapping[Any, Callable[..., Any]]) -> None:
        super().__init__()
        self.table = table

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.table.get(func, func)(*args, **(kwargs or {}))
