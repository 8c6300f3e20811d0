"""Gymnasium, or `InputError` with what to install."""

from __future__ import annotations

from fewstep.errors import InputError

try:
    import gymnasium
except ImportError as error:
    raise InputError(
        "this needs Gymnasium: pip install 'fewstep[rl]', or 'fewstep[metaworld]' for Meta-World"
    ) from error

__all__ = ["gymnasium"]
