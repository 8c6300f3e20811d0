"""Tasks of different sizes in one batch: padded to the longest, with a mask that tells what is real."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.errors import InputError
from fewstep.normalisation import no_batch_statistics
from fewstep.task import Batch, Task


def pad_tasks(tasks: Sequence[Task]) -> Task:
    """One batch of tasks out of single tasks that have different numbers of examples.

    tasks : `Task(support=(x [n, ...], y [n, ...]), query=(x [m, ...], y [m, ...]))` each, without a task axis
    Gives `(x, y, mask)` batches, x [B, most, ...], y [B, most, ...], mask [B, most] (bool), for a `masked` loss. What
    is filled in repeats a task's first example: values that model and loss can take, and that count for nothing.
    Raises `InputError` where a batch is no pair of tensors, is empty, or has examples of another shape than the others.

    >>> one = torch.ones(1, 2), torch.tensor([1.0])
    >>> two = torch.zeros(2, 2), torch.tensor([3.0, 4.0])
    >>> x, y, mask = pad_tasks([Task(one, one), Task(two, one)]).support
    >>> y, mask
    (tensor([[1., 1.],
            [3., 4.]]), tensor([[ True, False],
            [ True,  True]]))
    """
    tasks = list(tasks)
    if not tasks:
        raise InputError("there are no tasks to pad; expected at least one Task(support=(x, y), query=(x, y))")
    return Task(*(_padded(name, [getattr(task, name) for task in tasks]) for name in ("support", "query")))


def masked(loss: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    """The mean of a per-example loss over the real examples of an `(x, y, mask)` batch.

        L = sum_i mask_i l(f(x_i), y_i) / sum_i mask_i

    Exact: losses and gradients are those of each task without padding. Any `Learner` and engine takes it, a metric
    learner does not; what it gives is `(L, f(x))`, so that "accuracy" and "mse" work, which count real examples only.

    loss : `loss(prediction, target)` with one value for each example, [n] or [n, ...], of which the mean is taken, such
        as `functools.partial(cross_entropy, reduction="none")`
    Raises `InputError` for models with batch normalisation by the batch at hand: padding would be a part of it.

    >>> from functools import partial
    >>> from torch.nn.functional import mse_loss
    >>> batch = torch.tensor([[1.0], [3.0]]), torch.zeros(2, 1), torch.tensor([True, False])
    >>> masked(partial(mse_loss, reduction="none"))(nn.Identity(), batch)[0]
    tensor(1.)
    """

    def averaged(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        x, y, mask = _parts(batch)
        with no_batch_statistics(
            "batch normalisation by the batch at hand would mix padding into the statistics of a task; take such tasks "
            "one at a time, unpadded, or use the normalisation 'running' or 'per_step', or a norm of single examples"
        ):
            prediction = model(x)
        each = loss(prediction, y)
        if each.dim() == 0 or len(each) != len(mask):
            raise InputError(
                f"a masked loss needs a value for each of {len(mask)} examples, but {tuple(each.shape)} came; leave "
                "the reduction out: functools.partial(cross_entropy, reduction='none')"
            )
        each = each.flatten(1).mean(1) if each.dim() > 1 else each
        return torch.where(mask, each, 0).sum() / mask.sum(), prediction

    return averaged


def _parts(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    if not isinstance(batch, tuple | list) or len(batch) != 3 or not all(isinstance(part, Tensor) for part in batch):
        raise InputError("a masked loss needs (x, y, mask) batches of tensors; fewstep.pad_tasks makes them")
    x, y, mask = batch
    return x, y, mask


def _padded(name: str, batches: Sequence[Batch]) -> tuple[Tensor, Tensor, Tensor]:
    for batch in batches:
        pair = isinstance(batch, tuple | list) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch)
        if not pair or batch[0].dim() == 0 or batch[0].shape[:1] != batch[1].shape[:1] or not len(batch[0]):
            came = [tuple(p.shape) if isinstance(p, Tensor) else p for p in batch] if pair else type(batch).__name__
            raise InputError(
                f"padding needs (x [n, ...], y [n, ...]) batches of at least one example, without a task axis, but a "
                f"{name} set with {came} came"
            )
        forms = [[(part.shape[1:], part.dtype) for part in some] for some in (batch, batches[0])]
        if forms[0] != forms[1]:
            raise InputError(f"the examples of all {name} sets must have one form, but {forms[1]} and {forms[0]} came")
    most = max(len(x) for x, _ in batches)
    x, y = (torch.stack([_filled(batch[i], most) for batch in batches]) for i in (0, 1))
    counts = torch.tensor([len(own) for own, _ in batches], device=x.device)
    return x, y, torch.arange(most, device=x.device) < counts[:, None]


def _filled(part: Tensor, most: int) -> Tensor:
    return torch.cat([part, part[:1].expand(most - len(part), *part.shape[1:])])
