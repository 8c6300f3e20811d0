"""A few-shot task, and a batch of tasks: every tensor has a leading task axis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map

from fewstep.errors import InputError

Batch = Any
"""A tensor, or any nesting of tuples, lists and dicts of tensors. `(x, y)` is the usual one."""


class Task(NamedTuple):
    """What a learner adapts to (`support`) and what it is then judged by (`query`).

    Both are batches of the same form, usually `(x, y)`. Wherever several tasks go in at once, every tensor has
    a leading task axis of length B.

    >>> x, y = torch.zeros(4, 10, 1), torch.zeros(4, 10, 1)   # B = 4 tasks of 10 examples
    >>> Task(support=(x, y), query=(x, y)).size
    4
    """

    support: Batch
    query: Batch

    @property
    def size(self) -> int:
        """B, the number of tasks. Raises `InputError` where the tensors disagree about it."""
        return task_count(self)

    def select(self, chosen: slice | Tensor) -> Task:
        """The tasks at the indices `chosen`, still with a task axis."""
        return tree_map(lambda leaf: leaf[chosen], self)  # type: ignore[no-any-return]

    def to(self, device: torch.device | str) -> Task:
        """The same tasks on another device."""
        return tree_map(lambda leaf: leaf.to(device), self)  # type: ignore[no-any-return]


class Point(NamedTuple):
    """A task's query set seen from one step of adaptation.

    loss : [B];  prediction : [B, ...] where batches are `(x, y)`, else None
    """

    loss: Tensor
    prediction: Tensor | None


class Joint(NamedTuple):
    """Query examples, with those before them by which norm layers go: those of the support set."""

    before: Tensor
    x: Tensor
    y: Tensor


def is_pair(batch: Batch) -> bool:
    """Whether a batch is `(x, y)`, so that its loss is `loss(model(x), y)`."""
    return isinstance(batch, tuple | list) and len(batch) == 2


def one_task(batch: Batch) -> Batch:
    """Give the tensors of one task the leading task axis of length 1."""
    check_tensors(batch)
    return tree_map(lambda leaf: leaf.unsqueeze(0), batch)


def check_tensors(batch: Batch) -> None:
    """Raise `InputError` where a batch holds something else than tensors."""
    for leaf in tree_leaves(batch):
        if not isinstance(leaf, Tensor):
            raise InputError(f"a task holds tensors only, but a {type(leaf).__name__} came: {leaf!r:.60}")


def task_count(batch: Batch) -> int:
    """B, the length of the task axis that all tensors of `batch` share.

    Raises `InputError` where there is no tensor, a tensor is not one, lacks the axis, is empty, or disagrees.
    """
    leaves = tree_leaves(batch)
    if not leaves:
        raise InputError("a batch of tasks holds no tensor; expected Task(support=(x, y), query=(x, y))")
    check_tensors(batch)
    for leaf in leaves:
        if leaf.dim() == 0:
            raise InputError("every tensor of a task needs a leading task axis, but a scalar came")
        if leaf.numel() == 0:
            raise InputError(f"a tensor of shape {tuple(leaf.shape)} came; support and query need at least one example")
    counts = {leaf.shape[0] for leaf in leaves}
    if len(counts) > 1:
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in leaves)
        raise InputError(f"the tensors disagree about the number of tasks (their first axis): shapes {shapes}")
    return int(counts.pop())


def quickly_flat(tasks: Task) -> tuple[list[Any], Any]:
    """The leaves, and what tells apart tasks that are nested otherwise; for pairs without a walk through a tree.

    >>> x = torch.zeros(4, 10, 1)
    >>> len(quickly_flat(Task((x, x), (x, x)))[0])
    4
    """
    if type(tasks) is Task and type(tasks.support) is tuple and type(tasks.query) is tuple:
        leaves = [*tasks.support, *tasks.query]
        if all([isinstance(leaf, Tensor) for leaf in leaves]):  # noqa: C419  (a generator takes twice as long)
            return leaves, (len(tasks.support), len(tasks.query))
    return tree_flatten(tasks)


def at_step(support: Batch, step: int, stream: bool, axis: int = 0) -> Batch:
    """The batch of an inner step: of a stream, whose tensors have an `axis` of batches, the one whose turn it is.

    >>> at_step((torch.tensor([7.0, 8.0]),), 3, stream=True)
    (tensor(8.),)
    """
    if not stream:
        return support
    for leaf in tree_leaves(support):
        if isinstance(leaf, Tensor) and leaf.dim() <= axis:
            shape = tuple(leaf.shape)
            raise InputError(f"a stream's tensors need an axis of batches, [tasks, batches, ...], but {shape} came")
    return tree_map(lambda leaf: leaf.select(axis, step % leaf.shape[axis]), support)


def map_tensors(function: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    """`batch` with `function` applied to each tensor."""
    return tree_map(function, batch)
