"""What several update rules share: reductions that keep the task axis, checks, and names that a module can hold."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.errors import InputError
from fewstep.functional import Tensors

Rule = Callable[[Tensors, Tensors, Any, int], tuple[Tensors, Any]]
"""An update rule as its wrappers see it; `fewstep.updates.Update` says what it has to do."""


def evaluations(rule: Rule, step: int) -> int:
    """How many gradients the rule takes in this step: 1 where it does not say.

    >>> evaluations(lambda theta, gradient, state, step: (theta, state), 0)
    1
    """
    own = getattr(rule, "evaluations", None)
    return 1 if own is None else int(own(step))


def positive(value: float, what: str) -> float:
    """The value, or `InputError` unless it is above 0 and finite."""
    if not 0 < value < inf:
        raise InputError(f"{what} must be above 0 and finite, but {value} came")
    return value


def fraction(value: float, what: str) -> float:
    """The value, or `InputError` unless it is at least 0 and below 1."""
    if not 0 <= value < 1:
        raise InputError(f"{what} must be at least 0 and below 1, but {value} came")
    return value


def count(steps: int | None) -> int | None:
    """The number of steps that have learned values of their own, or None; `InputError` for anything else."""
    if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
        raise InputError(f"steps must be None or an integer of at least 1, but {steps!r} came")
    return steps


def squared_norms(tensors: Tensors) -> Tensor:
    """|.|^2 of each task over all its tensors: [B].

    >>> squared_norms({"w": torch.tensor([[3.0, 0.0], [1.0, 1.0]]), "b": torch.tensor([4.0, 1.0])})
    tensor([25.,  3.])
    """
    return torch.stack([_rows(value).square().sum(1) for value in tensors.values()]).sum(0)


def means(tensors: Tensors, names: Sequence[str]) -> Tensor:
    """The mean of each task's tensors of these names: [B, names].

    >>> means({"w": torch.tensor([[3.0, 0.0], [1.0, 1.0]]), "b": torch.tensor([4.0, 2.0])}, ["b", "w"])
    tensor([[4.0000, 1.5000],
            [2.0000, 1.0000]])
    """
    return torch.stack([_rows(tensors[name]).mean(1) for name in names], 1)


def along(values: Tensor, tensor: Tensor) -> Tensor:
    """One value for each task, [B], in a form that broadcasts against `tensor`, [B, ...]."""
    return values.reshape(-1, *[1] * (tensor.dim() - 1))


def _rows(tensor: Tensor) -> Tensor:
    """[B, ...] as [B, n]; a parameter that is a single number has n = 1."""
    return tensor.reshape(tensor.shape[0], -1)


def of_step(values: Tensor, step: int, steps: int | None) -> Tensor:
    """The values of this step where there is one set for each, in the first axis; after the last step, the last set."""
    return values if steps is None else values[min(step, steps - 1)]


def key(name: str) -> str:
    """A parameter's name as a name that a module can hold: without dots.

    >>> key("model.0.weight")
    'model/0/weight'
    """
    return name.replace(".", "/")


def check_parameters(parameters: Mapping[str, Tensor]) -> None:
    """Raise `InputError` unless these are tensors by name."""
    if not isinstance(parameters, Mapping) or not all(isinstance(value, Tensor) for value in parameters.values()):
        raise InputError(
            "the rule needs the parameters that adapt, by name: "
            "{f'model.{name}': value for name, value in model.named_parameters()}"
        )
    if not parameters:
        raise InputError("the rule needs at least one parameter, but none came")


def check_names(known: Collection[str], theta: Tensors, *, every: bool = False) -> None:
    """Raise `InputError` where theta has a name that a rule does not know, or with `every` lacks one that it needs."""
    unknown = [name for name in theta if name not in known]
    missing = [name for name in known if name not in theta] if every else []
    if unknown or missing:
        problem = f"'{unknown[0]}' came" if unknown else f"'{missing[0]}' is missing"
        raise InputError(
            f"the update rule was built for the parameters {', '.join(known)}, but {problem}; build it from those "
            "that adapt, with the names 'model.NAME'"
        )


def two_layers(inputs: int, outputs: int, start: float, like: Tensor) -> nn.Sequential:
    """A small network with ReLU, hidden size as its input, that gives `start` for any input before it has learned."""
    first, last = nn.Linear(inputs, inputs), nn.Linear(inputs, outputs)
    nn.init.zeros_(last.weight)
    nn.init.constant_(last.bias, start)
    return nn.Sequential(first, nn.ReLU(), last).to(like)
