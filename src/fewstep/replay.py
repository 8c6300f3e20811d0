"""Run a computation again exactly as it ran before: the same random numbers, the same autocast, nothing around it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moment:
    """The state of the random generators and of autocast at one moment on one device.

    cpu, accelerator : None where there is nothing to restore
    """

    device: torch.device
    cpu: Tensor | None
    accelerator: Tensor | None
    autocast: bool
    autocast_dtype: torch.dtype

    @classmethod
    def now(cls, device: torch.device) -> Moment:
        return cls(
            device,
            torch.get_rng_state(),
            None if device.type == "cpu" or _is_recorded(device) else _state(device),
            torch.is_autocast_enabled(device.type),
            torch.get_autocast_dtype(device.type),
        )

    def of_use(self) -> Moment:
        """The same without what has not changed since: a model that draws no numbers keeps 5 KB less of each step."""
        present = Moment.now(self.device)
        return replace(
            self, cpu=_changed(self.cpu, present.cpu), accelerator=_changed(self.accelerator, present.accelerator)
        )

    @contextmanager
    def again(self) -> Iterator[None]:
        """Return to this moment, and afterwards to the present."""
        present = Moment.now(self.device)
        self._restore_random()
        try:
            with torch.autocast(self.device.type, self.autocast_dtype, enabled=self.autocast):
                yield
        finally:
            present._restore_random()

    def _restore_random(self) -> None:
        if self.cpu is not None:
            torch.set_rng_state(self.cpu)
        if self.accelerator is not None:
            torch.get_device_module(self.device).set_rng_state(self.accelerator, *_which(self.device))


def _state(device: torch.device) -> Tensor:
    state: Tensor = torch.get_device_module(device).get_rng_state(*_which(device))
    return state


def _is_recorded(device: torch.device) -> bool:
    """Whether a CUDA graph is being recorded: its generator tells no state, and what draws is not recorded."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _changed(before: Tensor | None, now: Tensor | None) -> Tensor | None:
    return None if before is None or now is None or torch.equal(before, now) else before


@contextmanager
def no_saved_tensors_hooks() -> Iterator[None]:
    """Without the hooks for saved tensors that are active outside: torch.func refuses to run under any.

    They are for what an operator saves in the end, not for the graphs inside it.
    """
    autograd: Any = torch._C._autograd
    paused = []
    while (hooks := autograd._top_saved_tensors_default_hooks(False)) is not None:
        paused.append(hooks)
        autograd._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for pack, unpack in reversed(paused):
            autograd._push_saved_tensors_default_hooks(pack, unpack)


def _which(device: torch.device) -> tuple[torch.device, ...]:
    """What the generator functions of a device's module take: that for Apple's GPU, the only one, takes no device."""
    return () if device.type == "mps" else (device,)
