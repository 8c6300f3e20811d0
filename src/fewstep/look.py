"""One look at a model and its loss before they are differentiated, for what would take derivatives away."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fewstep.engine import Engine
from fewstep.errors import FallbackWarning, InputError
from fewstep.functional import DATA, Objective, Tensors
from fewstep.replay import Moment
from fewstep.task import Batch, Task, map_tensors

OfOne = Callable[[Batch], tuple[Tensors, Batch]]
_TRACKING: tuple[Any, ...] = (Tensor.requires_grad_, Tensor.requires_grad.__set__)  # type: ignore[attr-defined]


def look_once(objective: Objective, tasks: Task, of_one: OfOne, engine: Engine, *, exact: bool,
              one_query: bool) -> None:  # fmt: skip
    """Run the loss of one task once in each mode of the model, to find what would take derivatives away.

    A loss may depend on no parameter but those that it is handed. PyTorch loses the derivative of a bias's own
    gradient in fused norms that have a bias and no weight (`tests/test_gradient.py` pins the fault). And fused
    attention has no second derivative: from here on the objective takes the math kernel, which has one. And `x.data`
    hides x from the innermost of several derivatives only: from here on `x.detach()` runs in its place.
    """
    both = objective.module.inner_loss is not None and torch.is_grad_enabled()  # else there is no query set
    kind = (exact, both, engine.method, engine.product, *objective.structure.modes())
    if kind in objective.looked_at:
        return
    device = tree_leaves(tasks.support)[0].device
    with torch.enable_grad(), Moment.now(device).again(), _Calls() as calls, _Operators(exact) as seen:
        first = Task(*[map_tensors(lambda leaf: leaf[0].detach(), batch) for batch in tasks])
        own, batch = of_one(first.support)
        plain = [name for name in objective.adapted if not own[name].requires_grad]
        own |= {name: own[name].detach().requires_grad_() for name in plain}  # what a model may ask for
        losses = [objective(own, batch, query=False)]
        if both:
            with nullcontext() if one_query else suppress(Exception):
                losses.append(objective(own, objective.query_of(first), query=True))
    objective.reads_data |= calls.reads_data
    if any(leaf not in calls.leaves for loss in losses for leaf in map(id, _leaves(loss))):
        raise InputError(
            "the loss or the start depends on a parameter that is neither the model's nor its own, whose gradient "
            "would be lost; make the loss an nn.Module that holds it"
        )
    if exact and engine.method == "vmap" and calls.detaches:
        raise InputError(
            "x.detach_() hides x from the innermost of several derivatives only; write x = x.detach(), or take "
            "engine='loop'"
        )
    if exact and engine.method == "vmap" and calls.hooks:
        raise InputError(
            "a hook that the model puts on a tensor acts on some of several derivatives only; take engine='loop'"
        )
    if exact and engine.product == "forward" and calls.without_grad:
        raise InputError(
            "the model computes something without gradients (torch.no_grad), of which forward mode takes no notice; "
            "use product='reverse', or x.detach() in the model"
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


def _leaves(loss: Tensor) -> Iterator[Tensor]:
    """The tensors at the ends of a loss's graph."""
    if loss.requires_grad and loss.grad_fn is None:
        yield loss
    found: set[Any] = set()
    todo = [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in found:
            found.add(node)
            todo += [following for following, _ in node.next_functions]
            if hasattr(node, "variable"):
                yield node.variable


class _Calls(TorchFunctionMode):
    """Note what a model calls that hides from some derivatives, and the leaves that it makes itself.

    leaves : by identity, held meanwhile
    """

    def __init__(self) -> None:
        super().__init__()
        self.reads_data = self.detaches = self.hooks = self.without_grad = False
        self.leaves: dict[int, Tensor] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.reads_data |= func == DATA
        self.detaches |= func == Tensor.detach_
        self.hooks |= func == Tensor.register_hook
        self.without_grad |= not torch.is_grad_enabled()
        result = func(*args, **kwargs)
        if func in _TRACKING:
            self.leaves[id(args[0])] = args[0]
        elif kwargs.get("requires_grad") and isinstance(result, Tensor):
            self.leaves[id(result)] = result
        return result


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
