"""Ways to compute a second-order meta-step, one file each.

A file says which package it `NEEDS`, which `variants` of itself are worth trying on a workload (name -> options), and
how to `build` one: it returns a `Contender`.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol

from torch import Tensor

from benchmarks.workloads import Workload

RATE = 1e-8  # of Adam: too small to move a float32 weight, so that all contenders stay where they started

FAMILIES = {
    "autograd loop": "autograd_loop",
    "torch.func": "torch_func",
    "torch.func, compiled": "torch_func_compiled",
    "higher": "with_higher",
    "torchopt": "with_torchopt",
    "jax": "with_jax",
    "fewstep": "ours",
    "fewstep, compiled": "ours_compiled",
    "matrix product": "matrix_product",
}


class Contender(Protocol):
    """One way to train on a workload's tasks."""

    def gradient(self) -> Tensor:
        """The meta-gradient of the summed query losses as one flat vector, in the order of `model.parameters()`."""

    def meta_gradient(self) -> None:
        """Compute it, and wait until it is there."""

    def step(self) -> None:
        """The same and one step of Adam."""


def missing(family: str) -> str | None:
    """Why a family cannot take part here, or None."""
    needs: str | None = _module(family).NEEDS
    return f"{needs} is not installed" if needs and find_spec(needs) is None else None


def variants(family: str, workload: Workload) -> dict[str, dict[str, Any]]:
    """The variants of a family that are worth trying."""
    found: dict[str, dict[str, Any]] = _module(family).variants(workload)
    return found


def build(family: str, workload: Workload, options: dict[str, Any]) -> Contender:
    """One variant of a family."""
    contender: Contender = _module(family).build(workload, **options)
    return contender


def _module(family: str) -> Any:
    return import_module(f"benchmarks.contenders.{FAMILIES[family]}")
