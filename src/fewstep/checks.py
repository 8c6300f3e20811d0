"""Clear words for input that cannot work: shapes are checked before, values where something went wrong."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fewstep.errors import FallbackWarning, FewstepError, InputError
from fewstep.functional import Objective, Tensors
from fewstep.labels import check_query
from fewstep.normalisation import Policy, normalised
from fewstep.replay import Moment
from fewstep.task import Batch, Task, is_pair, map_tensors, one_task, task_count


def check_tasks(tasks: Task) -> None:
    """Raise `InputError` unless `tasks` is a Task whose tensors agree about their axes."""
    if not isinstance(tasks, Task):
        raise InputError(f"expected fewstep.Task(support=..., query=...), but a {type(tasks).__name__} came")
    task_count(tasks)
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


OfOne = Callable[[Batch], tuple[Tensors, Batch]]


def look_once(objective: Objective, tasks: Task, of_one: OfOne, *, exact: bool, one_query: bool) -> None:
    """Run the loss of one task once in each mode of the model, to find what would take derivatives away.

    A loss may depend on no parameter but those that it is handed. PyTorch loses the derivative of a bias's own
    gradient in fused norms that have a bias and no weight (`tests/test_gradient.py` pins the fault). And fused
    attention has no second derivative: from here on the objective takes the math kernel, which has one.
    """
    both = objective.module.inner_loss is not None and torch.is_grad_enabled()  # else there is no query set
    kind = (exact, both, *objective.modes())
    if kind in objective.looked_at:
        return
    device = tree_leaves(tasks.support)[0].device
    with torch.enable_grad(), Moment.now(device).again(), _as_differentiated(), _Operators(exact) as seen:
        first = Task(*[map_tensors(lambda leaf: leaf[0].detach(), batch) for batch in tasks])
        own, batch = of_one(first.support)
        losses = [objective(own, batch, query=False)]
        if both:
            with nullcontext() if one_query else suppress(Exception):
                losses.append(objective(own, objective.query_of(first), query=True))
    if any(loss.requires_grad for loss in losses):
        raise InputError(
            "the loss or the start depends on a parameter that is neither the model's nor its own, whose gradient "
            "would be lost; make the loss an nn.Module that holds it"
        )
    if exact and seen.fused_attention:
        objective.math_attention = True
        warnings.warn(
            "attention runs by the math kernel: fused attention has no second derivative; the derivatives "
            "'finite_difference' and 'none' keep it",
            FallbackWarning,
            stacklevel=2,
        )
    objective.looked_at.add(kind)


@contextmanager
def _as_differentiated() -> Iterator[None]:
    """Let transformer layers do what they do where gradients are taken: else they have a fused path of their own."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Note fused attention; raise `InputError` at a fused norm with a bias and without a weight.

    And `IndexError` at a label that is no class, as a CPU does: a GPU would serve this process no more.
    """

    def __init__(self, exact: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.exact = exact
        self.fused_attention = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        if name.startswith("_scaled_dot_product_") and "math" not in name:
            self.fused_attention = True
        if name in ("nll_loss_forward", "nll_loss2d_forward"):
            prediction, labels, ignored = args[0], args[1], args[4]
            classes = prediction.shape[min(1, prediction.dim() - 1)]
            if bool(((labels != ignored) & ((labels < 0) | (labels >= classes))).any()):
                raise IndexError(f"a label that is none of the {classes} classes of {tuple(prediction.shape)}")
        if self.exact and "norm" in name:
            given = dict(zip([argument.name for argument in func._schema.arguments], args, strict=False))
            if given.get("bias") is not None and given.get("weight", 0) is None:
                raise InputError(
                    f"{name} with a bias and no weight loses second derivatives in PyTorch; add "
                    "the bias yourself, pass a weight of ones, or use the derivative 'finite_difference'"
                )
        return func(*args, **(kwargs or {}))


@contextmanager
def guard(objective: Objective, tasks: Task, of_one: OfOne, ways: Callable[[], Any], *, exact: bool,
          batched: bool, one_query: bool) -> Iterator[None]:  # fmt: skip
    """Refuse what would make gradients wrong, and name the input where it is what made the model or the loss fail.

    of_one : the parameters and the first batch of one task whose support set is given
    ways : how many classes the start makes a head for; None where the model's own outputs count
    exact : whether second derivatives are taken;  batched : whether the tasks go through vmap
    one_query : whether the query set is one batch of the loss; an outer objective may make something else of it
    """
    objective.check_structure()
    objective.check_running_statistics()
    written, looked = objective.buffer_versions(), False
    try:
        look_once(objective, tasks, of_one, exact=exact, one_query=one_query)
        looked = True
        yield
    except FewstepError:
        raise
    except Exception as error:
        if "mutate a captured Tensor" in str(error):
            raise InputError(objective.written_buffers(list(written))) from error
        check_values(tasks)
        for name, batch in tasks._asdict().items():
            if is_pair(batch):
                known = ways()  # a start of the user's own may know other things
                one = map_tensors(lambda leaf: leaf[0], batch)
                _check_pair(objective, name, one, known if isinstance(known, int) else None)
        if batched and looked:
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
