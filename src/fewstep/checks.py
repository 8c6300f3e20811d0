"""Clear words for input that cannot work: shapes are checked before, values where something went wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fewstep.engine import Engine
from fewstep.errors import FewstepError, InputError
from fewstep.functional import Objective
from fewstep.labels import check_query
from fewstep.look import OfOne, look_once
from fewstep.normalisation import Policy, normalised
from fewstep.task import Batch, Task, is_pair, map_tensors, one_task, task_count


def check_tasks(tasks: Task) -> None:
    """Raise `InputError` unless `tasks` is a Task whose tensors agree about their axes."""
    if not isinstance(tasks, Task):
        raise InputError(f"expected fewstep.Task(support=..., query=...), but a {type(tasks).__name__} came")
    task_count(tasks)
    if any(leaf.is_inference() for leaf in tree_leaves(tasks)):
        raise InputError("a tensor of the tasks was made in torch.inference_mode(): no gradient goes by it; clone it")
    check_examples(tasks.support, "support")
    check_examples(tasks.query, "query")


def check_examples(batch: Batch, name: str) -> None:
    """Raise `InputError` where x and y of an `(x, y)` batch disagree about the number of examples."""
    if not is_pair(batch) or not all(isinstance(part, Tensor) for part in batch):
        return
    x, y = batch
    if x.dim() < 2 or y.dim() < 2 or x.shape[1] != y.shape[1]:
        raise InputError(
            f"{name} x {tuple(x.shape)} and y {tuple(y.shape)} must agree in [tasks, examples], their first two axes"
        )


def check_values(tasks: Task) -> None:
    """Raise `InputError` where a tensor of the tasks holds NaN or infinity."""
    for name, batch in tasks._asdict().items():
        for leaf in tree_leaves(batch):
            bad = ~torch.isfinite(leaf)
            if bad.any():
                task = int(bad.nonzero()[0, 0])
                raise InputError(
                    f"the {name} set of task {task} holds NaN or infinity; clean the data or drop the task"
                )


def check_values_behind(loss: Tensor, tasks: Task) -> None:
    """Where a loss [B] is not finite, raise `InputError` if the tasks are not either. On the CPU only: it waits."""
    if loss.device.type == "cpu" and not torch.isfinite(loss).all():
        check_values(tasks)


@contextmanager
def guard(objective: Objective, tasks: Task, of_one: OfOne, ways: Callable[[], Any], engine: Engine, *, exact: bool,
          one_query: bool) -> Iterator[None]:  # fmt: skip
    """Refuse what would make gradients wrong, and name the input where it is what made the model or the loss fail.

    of_one : the parameters and the first batch of one task whose support set is given
    ways : how many classes the start makes a head for; None where the model's own outputs count
    exact : whether second derivatives are taken
    one_query : whether the query set is one batch of the loss; an outer objective may make something else of it
    """
    objective.structure.check()
    objective.check_running_statistics()
    written, looked = objective.buffer_versions(), False
    try:
        look_once(objective, tasks, of_one, engine, exact=exact, one_query=one_query)
        looked = True
        yield
    except FewstepError:
        raise
    except Exception as error:
        if "mutate a captured Tensor" in str(error):
            raise InputError(objective.written(list(written))) from error
        check_values(tasks)
        for name, batch in tasks._asdict().items():
            if is_pair(batch):
                known = ways()  # a start of the user's own may know other things
                one = map_tensors(lambda leaf: leaf[0], batch)
                _check_pair(objective, name, one, known if isinstance(known, int) else None)
        if engine.method == "vmap" and looked:
            reason = str(error).strip().splitlines()[0]
            raise InputError(
                f"the loss works for one task, but not batched by vmap ({reason}); try engine='loop', for models "
                "without batching rules such as RNNs"
            ) from error
        raise
    objective.check_buffers(written)


@torch.no_grad()
def _check_pair(objective: Objective, name: str, batch: Any, ways: int | None) -> None:
    """Find out with one task whether the model takes x, and whether y fits what it gives, or the ways of the start."""
    x, y = batch
    try:
        policy: Policy | None = objective.normalisation and "batch"
        with normalised(policy, objective.module.statistics, objective.module.layers):
            prediction = objective.model(x)
    except Exception as error:
        shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        reason = str(error).splitlines()[0]
        raise InputError(f"the model cannot take one task's {name} x {shape} {x.dtype}: {reason}") from error
    if not isinstance(prediction, Tensor) or not isinstance(y, Tensor) or prediction.dim() < 2:
        return
    outputs = prediction.shape[1] if ways is None else ways
    if ways is not None and name == "query":
        check_query(one_task(batch), ways)
    elif not y.is_floating_point() and (int(y.max()) >= outputs or int(y.min()) < 0):
        raise InputError(
            f"{name} labels run from {int(y.min())} to {int(y.max())}, but the model has {outputs} outputs, for labels "
            f"0..{outputs - 1}; relabel the classes or build the model with more ways"
        )
