"""Run a computation again exactly as it ran before: the same random numbers, the same autocast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moment:
    """The state of the random generators and of autocast at one moment on one device."""

    device: torch.device
    cpu: Tensor
    accelerator: Tensor | None
    autocast: bool
    autocast_dtype: torch.dtype

    @classmethod
    def now(cls, device: torch.device) -> Moment:
        accelerator = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(*_which(device))
        return cls(
            device,
            torch.get_rng_state(),
            accelerator,
            torch.is_autocast_enabled(device.type),
            torch.get_autocast_dtype(device.type),
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
        torch.set_rng_state(self.cpu)
        if self.accelerator is not None:
            torch.get_device_module(self.device).set_rng_state(self.accelerator, *_which(self.device))


def _which(device: torch.device) -> tuple[torch.device, ...]:
    """What the generator functions of a device's module take: that for Apple's GPU, the only one, takes no device."""
    return () if device.type == "mps" else (device,)
