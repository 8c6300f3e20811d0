"""Class labels of tasks: their checks, and which examples belong to which class."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep.errors import InputError
from fewstep.task import Batch, is_pair


def ways_of(support: Batch) -> int:
    """The number of classes in the support sets x [B, N*K, ...], y [B, N*K]; `InputError` where a task lacks one."""
    _, y = _labelled(support, "support")
    ways = int(y.max()) + 1
    if int(y.min()) < 0:
        raise InputError(f"support labels must be 0..ways-1, but {int(y.min())} came; relabel the classes")
    if ways > y.shape[1]:  # before as many classes are looked for
        raise InputError(f"support labels must be 0..ways-1, but {ways - 1} came among {y.shape[1]} examples; relabel")
    missing = absent(y, ways)
    if missing.any():
        task, label = missing.nonzero()[0].tolist()
        raise InputError(
            f"the support set of task {task} has no example of class {label}, though labels run up to {ways - 1}; "
            "label the classes of each task 0..ways-1, as many in each task of a batch"
        )
    return ways


def check_query(query: Batch, ways: int) -> None:
    """Raise `InputError` unless the labels of the query sets x [B, Q, ...], y [B, Q] are integers 0..ways-1."""
    _, y = _labelled(query, "query")
    least, most = int(y.min()), int(y.max())
    if least < 0 or most >= ways:
        raise InputError(
            f"query labels run from {least} to {most}, but the support set has the classes 0..{ways - 1}; leave out "
            "the queries of other classes"
        )


def members(y: Tensor, ways: int) -> Tensor:
    """Which examples belong to which class: y [examples] -> [ways, examples], boolean.

    >>> members(torch.tensor([0, 1, 1]), 2).int()
    tensor([[1, 0, 0],
            [0, 1, 1]], dtype=torch.int32)
    """
    return torch.arange(ways, device=y.device)[:, None] == y


def absent(y: Tensor, ways: int) -> Tensor:
    """Which classes have no example in a task: y [B, examples] -> [B, ways], boolean.

    >>> absent(torch.tensor([[0, 1, 1], [0, 0, 0]]), 2)
    tensor([[False, False],
            [False,  True]])
    """
    return ~(y[..., None] == torch.arange(ways, device=y.device)).any(1)


def _labelled(batch: Batch, name: str) -> tuple[Tensor, Tensor]:
    if not is_pair(batch) or not all(isinstance(part, Tensor) for part in batch):
        raise InputError(f"this needs batches (x, y) of two tensors, but the {name} set is of another form")
    x, y = batch
    if y.dim() != 2 or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise InputError(f"{name} labels must be integers [tasks, examples], but {y.dtype} {tuple(y.shape)} came")
    return x, y
