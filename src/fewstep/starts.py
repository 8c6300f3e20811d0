"""Where adaptation starts, if not at the meta-parameters themselves. A start is any object of the form `Start`."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from fewstep.engine import Runner
from fewstep.errors import InputError
from fewstep.functional import Objective, Place, Tensors, tensors_by_name
from fewstep.labels import absent, members
from fewstep.patterns import linear_head, matching
from fewstep.per_task import per_task
from fewstep.task import Batch, is_pair

Known = Hashable


class Start(Protocol):
    """For ONE task, the adapted tensors that start elsewhere, by name: `start(objective, tensors, support, known)`.

    tensors : the meta-parameters by name ("model.0.weight", ...);  support : of that task, without a task axis
    known : what `known(support)` told of all tasks' support sets [B, ...] together; it decides shapes
    """

    def known(self, support: Batch) -> Known: ...

    def __call__(self, objective: Objective, tensors: Tensors, support: Batch, known: Any) -> Tensors: ...


def first(start: Start | None, objective: Objective, runner: Runner, support: Batch) -> Tensors:
    """Where adaptation starts: the meta-parameters themselves, or [B, ...] what `start` makes of the support sets."""
    if start is None:
        return tensors_by_name(objective.adapted, objective.parameters(objective.adapted))
    names = [*objective.adapted, *objective.shared]
    own = objective.parameters(names)
    leaves, form = tree_flatten(support)
    known = start.known(support)

    def one(*tensors: Tensor) -> tuple[Tensor, ...]:
        with runner.engine.numerics(tensors[-1].device):
            named = tensors_by_name(names, tensors[: len(names)])
            named |= start(objective, named, tree_unflatten(tensors[len(names) :], form), known)
        return tuple(named[name] for name in objective.adapted)

    axis = [False] * len(names) + [True] * len(leaves)
    same = partial(objective.structure.check_state, objective.structure.state())
    values = per_task(runner, ("start", form, known), one, [*own, *leaves], axis, same)
    return tensors_by_name(objective.adapted, values)


class Zeros:
    """Parameters that start at zero in every task, whatever value they have in the model (CAVIA's context)."""

    def __init__(self, model: nn.Module, patterns: str | Sequence[str]) -> None:
        names = [name for name, value in model.named_parameters() if value.requires_grad]
        self.names = [f"model.{name}" for name in matching(names, patterns)]

    def known(self, support: Batch) -> Known:
        return None

    def __call__(self, objective: Objective, tensors: Tensors, support: Batch, known: Any) -> Tensors:
        return {name: torch.zeros_like(tensors[name]) for name in self.names}


class HeadStart:
    """What starts of a linear head have in common: its name, and the number of ways, read from the labels."""

    def __init__(self, model: nn.Module, head: str | None = None) -> None:
        self.head, module = linear_head(model, head)
        place = ".".join(filter(None, ["model", self.head]))  # a model may be nothing but its head
        self.weight, self.bias = f"{place}.weight", f"{place}.bias"
        self.has_bias = module.bias is not None

    def known(self, support: Batch) -> Known:
        """The number of ways N: labels run from 0 to N - 1 in every task."""
        y = support[1] if is_pair(support) or _is_padded(support) else None
        if not isinstance(y, Tensor) or y.is_floating_point() or y.numel() == 0:
            raise InputError("this start of the head needs (x, y) batches with integer labels from 0 to ways - 1")
        ways = int(y.max()) + 1
        y = y.flatten(1)
        if int(y.min()) < 0 or ways > y.shape[1] or absent(y, ways).any():  # the bound first: classes are looked for
            raise InputError(f"every class 0..{ways - 1} needs an example in the support set of every task")
        return ways

    def check(self, objective: Objective) -> None:
        """Raise `InputError` where the head does not adapt: no start would have an effect on all of it."""
        for name in [self.weight, self.bias] if self.has_bias else [self.weight]:
            if name not in objective.adapted:
                raise InputError(
                    f"this start sets the head, but its parameter '{name.removeprefix('model.')}' does not adapt; "
                    "choose patterns adapt=... that leave the head in"
                )


class SharedVector(HeadStart):
    """One vector for all classes: each row of the head starts at the mean of its rows (UNICORN-MAML)."""

    def __call__(self, objective: Objective, tensors: Tensors, support: Batch, known: Any) -> Tensors:
        self.check(objective)
        found = {self.weight: tensors[self.weight].mean(0).expand(known, -1)}
        return found | ({self.bias: tensors[self.bias].mean().expand(known)} if self.has_bias else {})


class ZeroHead(HeadStart):
    """A head of zeros with a row for each class: all classes start alike, however many there are."""

    def __call__(self, objective: Objective, tensors: Tensors, support: Batch, known: Any) -> Tensors:
        self.check(objective)
        weight = tensors[self.weight]
        found = {self.weight: weight.new_zeros(known, weight.shape[1])}
        return found | ({self.bias: weight.new_zeros(known)} if self.has_bias else {})


class Prototypes(HeadStart):
    """The head that answers as the nearest class mean does: w_k = 2 c_k, b_k = -|c_k|^2 (Triantafillou et al. 2020).

    c_k is the mean of the support features of class k, what the head's input is for them; gradients flow through it.
    """

    def __init__(self, model: nn.Module, head: str | None = None) -> None:
        super().__init__(model, head)
        if not self.has_bias:
            raise InputError(f"prototypes need a head with a bias, but {self.head!r} has none")

    def __call__(self, objective: Objective, tensors: Tensors, support: Batch, known: Any) -> Tensors:
        self.check(objective)
        features = inputs_of(self.head, objective, objective.at(Place(0, query=False), tensors), support)
        features = features.to(tensors[self.weight].dtype)  # autocast may have lowered it
        # Not `one_hot`, which looks at values where it is both batched and differentiated.
        member = members(support[1].flatten(), known)
        if _is_padded(support):  # what is filled in counts for nothing
            member = member & support[2]
        member = member.to(features.dtype)
        means = member @ features / member.sum(1, keepdim=True)
        return {self.weight: 2 * means, self.bias: -means.square().sum(1)}


def _is_padded(batch: Batch) -> bool:
    """Whether a batch is `(x, y, mask)`, as `pad_tasks` makes it."""
    three = isinstance(batch, tuple | list) and len(batch) == 3
    return three and isinstance(batch[2], Tensor) and batch[2].dtype == torch.bool


class _FoundError(Exception):
    """Carries what a layer was given out of a forward pass that need not go on."""


def inputs_of(layer: str, objective: Objective, tensors: Tensors, batch: Batch) -> Tensor:
    """What the model's layer of this name is given for one task's batch, [examples, features]."""
    found: list[Tensor] = []

    def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.append(args[0])
        raise _FoundError

    handle = objective.model.get_submodule(layer).register_forward_pre_hook(look)
    try:
        objective.call(tensors, batch, query=False)
    except _FoundError:
        pass
    finally:
        handle.remove()
    if not found:
        raise InputError(f"the layer {layer!r} was not called in the model's forward pass")
    return found[0]
