"""Train and eval mode of all modules, for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import nn


class HasModes(Protocol):
    """A module, or what has modules."""

    def modules(self) -> Iterator[nn.Module]:
        """All of them."""

    def eval(self) -> Any:
        """Put them in eval mode."""


@contextmanager
def in_eval_mode(learner: HasModes) -> Iterator[None]:
    """Inside, all modules are in eval mode; afterwards each is in its own."""
    modes = [(module, module.training) for module in learner.modules()]
    learner.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
