"""What of a model adapts, by name, for methods that have to know it before there is a learner."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import nn

from fewstep.errors import InputError
from fewstep.functional import Tensors, head_of, matching


def adapted_parameters(model: nn.Module, adapt: str | Sequence[str] = "*") -> Tensors:
    """The parameters that adapt under these patterns, named as in theta: what learned update rules are built from.

    adapt : as for `Learner`

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    >>> {name: tuple(value.shape) for name, value in adapted_parameters(model, "1.*").items()}
    {'model.1.weight': (2, 4), 'model.1.bias': (2,)}
    """
    own = {name: value for name, value in model.named_parameters() if value.requires_grad}
    return {f"model.{name}": own[name] for name in matching(list(own), adapt)}


def adapted_part(model: nn.Module, part: Literal["head", "body"], adapt: str | Sequence[str] = "*",
                 head: str | None = None) -> list[str]:  # fmt: skip
    """Of the parameters that adapt under the patterns `adapt` those of the head, or all others: patterns as well.

    head : the submodule's name; the last linear layer unless given
    `InputError` where there is no such submodule, or nothing is left to adapt.

    >>> model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    >>> adapted_part(model, "head"), adapted_part(model, "body", "~*.bias")
    (['1.weight', '1.bias'], ['0.weight'])
    """
    head = head_of(model) if head is None else head
    modules = dict(model.named_modules())
    if head not in modules:
        raise InputError(f"the model has no submodule {head!r}; there are: {', '.join(filter(None, modules))}")
    names = [name.removeprefix("model.") for name in adapted_parameters(model, adapt)]
    of_head = {name for name in names if name.startswith(f"{head}." if head else "")}
    chosen = [name for name in names if (name in of_head) == (part == "head")]
    if not chosen:
        raise InputError(
            f"no parameter of the {part} is left to adapt: the head is {head!r}, and the patterns {adapt!r} leave "
            f"{', '.join(names)}; name another head or other patterns"
        )
    return chosen
