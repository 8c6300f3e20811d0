"""What of a model adapts, by name."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Literal

from torch import Tensor, nn

from fewstep.errors import InputError


def matching(names: Sequence[str], patterns: str | Sequence[str], what: str = "trainable parameter") -> list[str]:
    """The names that a pattern chooses: `*` and `?` as in file names; `~` in front takes names away.

    Patterns are read from left to right; a first pattern with `~` starts from all names. `InputError` where a
    pattern matches nothing. `what` the names stand for is said in the message.

    >>> matching(["body.weight", "head.weight", "head.bias"], "head.*")
    ['head.weight', 'head.bias']
    >>> matching(["body.weight", "head.weight", "head.bias"], ["~body.*", "~*.bias"])
    ['head.weight']
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    chosen: set[str] = set(names) if patterns and patterns[0].startswith("~") else set()
    for pattern in patterns:
        found = {name for name in names if fnmatchcase(name, pattern.removeprefix("~"))}
        if not found:
            raise InputError(f"the pattern {pattern!r} matches no {what}; there are: {', '.join(names) or 'none'}")
        chosen = chosen - found if pattern.startswith("~") else chosen | found
    if not chosen:
        raise InputError(f"the patterns {patterns} leave no {what} to adapt; there are: {', '.join(names)}")
    return [name for name in names if name in chosen]


def head_of(model: nn.Module, head: str | None = None) -> str:
    """The name of the model's head: the submodule `head`, or its last linear layer. `InputError` where there is none.

    >>> head_of(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    '2'
    """
    modules: dict[str, nn.Module] = dict(model.named_modules())
    if head is None:
        linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
        if not linear:
            raise InputError(
                f"the model {type(model).__name__} has no linear layer to be its head; name one with head=..."
            )
        return linear[-1]
    if head not in modules:
        raise InputError(f"the model has no submodule {head!r}; there are: {', '.join(filter(None, modules))}")
    return head


def linear_head(model: nn.Module, head: str | None = None) -> tuple[str, nn.Linear]:
    """The name of the head, found as by `head_of`, and the layer; `InputError` unless it is an `nn.Linear`."""
    name = head_of(model, head)
    if not isinstance(module := model.get_submodule(name), nn.Linear):
        raise InputError(f"the head must be a linear layer, but {name!r} names a {type(module).__name__}")
    return name, module


def adapted_parameters(model: nn.Module, adapt: str | Sequence[str] = "*") -> dict[str, Tensor]:
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
    head = head_of(model, head)
    first = dict(model.named_parameters())
    for name, _ in model.get_submodule(head).named_parameters(remove_duplicate=False):
        if (whole := f"{head}.{name}".removeprefix(".")) not in first:
            raise InputError(
                f"'{whole}' of the head is a parameter of the body as well: untie them, or name another head"
            )
    names = [name.removeprefix("model.") for name in adapted_parameters(model, adapt)]
    of_head = {name for name in names if name.startswith(f"{head}." if head else "")}
    chosen = [name for name in names if (name in of_head) == (part == "head")]
    if not chosen:
        raise InputError(
            f"no parameter of the {part} is left to adapt: the head is {head!r}, and the patterns {adapt!r} leave "
            f"{', '.join(names)}; name another head or other patterns"
        )
    return chosen
