"""What a naive reference is given and what it gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fewstep.functional import Loss, Tensors
from fewstep.task import Task
from tests.reference import Value, forward_of, value_of


class Truth(NamedTuple):
    """The value [B] of each task, and numbers whose sum has the meta-gradient, which need not be the values."""

    values: Tensor
    objective: Tensor


@dataclass(frozen=True)
class Given:
    """The setting of a reference, which knows no learner.

    model : as it was before a method added layers to it
    own : all meta-parameters, by their names in the learner
    """

    model: nn.Module
    loss: Loss
    tasks: Task
    own: Tensors
    lr: float
    steps: int

    @property
    def theta(self) -> Tensors:
        """The model's parameters by their names in the model."""
        return {name.removeprefix("model."): value for name, value in self.own.items() if name.startswith("model.")}

    @property
    def value(self) -> Value:
        """The loss as a function of parameters."""
        return value_of(forward_of(self.model), self.loss)

    def adapted(self, adapt: str) -> list[str]:
        """The names that a pattern chooses, or leaves where it starts with `~`."""
        return [n for n in self.theta if fnmatchcase(n, adapt.removeprefix("~")) != adapt.startswith("~")]

    def head(self) -> str:
        """The name of the last linear layer."""
        linear: list[str] = [name for name, module in self.model.named_modules() if isinstance(module, nn.Linear)]
        return linear[-1]


def same(losses: Tensor | Sequence[Tensor]) -> Truth:
    """Where the meta-gradient is that of the values."""
    losses = losses if isinstance(losses, Tensor) else torch.stack(list(losses))
    return Truth(losses, losses)


def leaves(tensors: Mapping[str, Tensor]) -> Tensors:
    """The same values without their history."""
    return {name: value.detach().requires_grad_() for name, value in tensors.items()}


def flat(tensors: Mapping[str, Tensor]) -> Tensor:
    """All tensors as one vector."""
    return torch.cat([value.flatten() for value in tensors.values()])


def shaped(vector: Tensor, like: Mapping[str, Tensor]) -> Tensors:
    """A vector as tensors of these names and shapes."""
    parts = torch.split(vector, [value.numel() for value in like.values()])
    return {name: part.reshape(value.shape) for part, (name, value) in zip(parts, like.items(), strict=True)}
