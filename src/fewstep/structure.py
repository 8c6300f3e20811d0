"""What of a module must not change: its structure while a learner has it, and its state until the backward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from fewstep.errors import InputError
from fewstep.watch import Watch

State = tuple[list[Any], list[tuple[Tensor, int]], list[Any]]


class Structure:
    """What a module was when this was made, and what it is.

    functions : what it calls that is no module

    >>> layer = nn.Linear(2, 2)
    >>> structure = Structure(layer)
    >>> structure.check()
    >>> layer.bias = None
    >>> structure.check()  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    ...
    fewstep.errors.InputError: parameters of the model came or went, as by pruning or weight_norm, after the ...
    """

    def __init__(self, module: nn.Module, functions: Sequence[Any] = ()) -> None:
        self._module: Any = module
        self._modules = list(module.modules())
        self._watch = Watch([module, *functions], tensors=False)
        self._at_end: list[Any] = []  # of the present call: what is watched, when it ended
        self._moving: set[int] = set()  # the places of what forward passes change
        self._names, self._ties = self._named(), self._tied()
        self._frozen = [
            (part, name) for part in self._modules for name, value in part._parameters.items()
            if value is not None and not value.requires_grad
        ]  # fmt: skip

    def check(self) -> None:
        """Raise `InputError` where the learner would go on with what was there when it was built."""
        now = list(self._module.modules())
        again = "after the learner was built; build the learner again"
        if len(now) != len(self._modules) or any(a is not b for a, b in zip(now, self._modules, strict=True)):
            raise InputError(f"a submodule of the model was replaced {again}")
        if self._named() != self._names:
            raise InputError(f"parameters of the model came or went, as by pruning or weight_norm, {again}")
        if thawed := [name for part, name in self._frozen if part._parameters[name].requires_grad]:  # type: ignore[union-attr]
            raise InputError(f"'{thawed[0]}' was frozen, and got requires_grad=True {again}")
        if self._tied() != self._ties:
            raise InputError(f"parameters of the model were tied, or are tied no more, {again}")

    @contextmanager
    def one_call(self) -> Iterator[None]:
        """Around a call of the learner: what does not change in it may not change from its end on."""
        self._at_end, before = [], self._watch.values()
        at_end = self._at_end
        yield
        after = self._watch.values()
        at_end.append(after)
        if after != before:  # a forward pass counts, or keeps something
            alike = len(before) == len(after)
            pairs = enumerate(zip(before, after, strict=False))
            self._moving.update(place for place, (old, new) in pairs if old != new or not alike)

    def modes(self) -> list[Any]:
        """By what batch norm goes, and which submodules are in train mode."""
        return [self._module.normalisation, *[part.training for part in self._modules]]

    def state(self) -> State:
        """What decides the loss beside the tensors that are handed in, as far as it is seen."""
        return self.modes(), self._held(), self._at_end

    def check_state(self, before: State) -> None:
        """Raise `InputError` where this has changed: recomputing would give something else."""
        between = "between forward and backward pass"
        wrong = f"{between}, which would make the meta-gradient wrong; do that after the backward pass"
        modes, held, at_end = before
        if self.modes() != modes:
            raise InputError(f"the model went from train to eval mode, or back, or to another normalisation, {between}")
        now = self._held()
        if len(now) != len(held) or any(a is not b or i != j for (a, i), (b, j) in zip(now, held, strict=True)):
            raise InputError(f"a buffer or a frozen parameter was written in place, or replaced, {wrong}")
        values = self._watch.values()
        if at_end and values != at_end[0]:
            pairs = enumerate(zip(values, at_end[0], strict=False))
            if any(old != new for place, (old, new) in pairs if place not in self._moving):
                raise InputError(f"an attribute or a hook of the model, or a number of the loss, changed {wrong}")

    def _held(self) -> list[tuple[Tensor, int]]:
        """The buffers and the frozen parameters, and how often each was written in place."""
        buffers = [value for part in self._modules for value in part._buffers.values() if value is not None]
        frozen = [value for part, name in self._frozen if (value := part._parameters[name]) is not None]
        return [(value, value._version) for value in (*buffers, *frozen)]

    def _named(self) -> list[list[tuple[str, bool]]]:
        return [[(name, value is None) for name, value in part._parameters.items()] for part in self._modules]

    def _tied(self) -> list[int]:
        """For each parameter the number of the first place that holds the same one."""
        values = [value for part in self._modules for value in part._parameters.values() if value is not None]
        first: dict[int, int] = {}
        return [first.setdefault(id(value), place) for place, value in enumerate(values)]


def owners(module: nn.Module, names: Sequence[str]) -> dict[str, tuple[nn.Module, str]]:
    """For each dotted name the submodule that holds the tensor, and its name there."""
    parts = {name: name.rpartition(".") for name in names}
    return {name: (module.get_submodule(path), last) for name, (path, _, last) in parts.items()}


def twins_of(module: nn.Module) -> dict[str, str]:
    """For tensors that several submodules hold, each further place by name, and the name of the first.

    >>> one, two = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    >>> two.weight = one.weight
    >>> twins_of(nn.Sequential(one, two, one))
    {'1.weight': '0.weight'}
    """
    first: dict[int, str] = {}
    twins = {}
    for path, part in module.named_modules():
        for last, value in [*part._parameters.items(), *part._buffers.items()]:
            name = f"{path}.{last}".removeprefix(".")
            if value is not None and first.setdefault(id(value), name) != name:
                twins[name] = first[id(value)]
    return twins
