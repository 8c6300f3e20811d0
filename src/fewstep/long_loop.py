"""Long inner loops: what of each step is kept for the backward pass, and where.

Autograd keeps theta of every step, and what the update rule needs. Two ways to keep less of it on the device; neither
changes the result:

    segment  keep theta and the rule's state at the ends of segments of k steps, and compute the steps between them
             again in the backward pass: steps/k + k sets of tensors in place of `steps`, least at k = sqrt(steps)
             (Chen et al. 2016, arXiv 1604.06174). It costs one more gradient per step.
    offload  keep them in host memory. It costs two copies per step, and is of use on an accelerator only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from math import isqrt
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.checkpoint import checkpoint

from fewstep.errors import InputError
from fewstep.functional import Objective, Tensors
from fewstep.replay import Moment
from fewstep.updates import Update

Step = Callable[[Tensors, Any, int], tuple[Tensors, Any]]


@dataclass(frozen=True)
class Memory:
    """What an inner loop keeps for the backward pass.

    segment : steps from one kept theta to the next; "sqrt" takes the square root of the number of steps; None keeps all
    offload : keep it in host memory; where the model is there already, this only makes copies

    >>> Memory("sqrt").length(1000), Memory(7).length(1000), Memory().length(1000)
    (32, 7, 1)
    """

    segment: int | Literal["sqrt"] | None = None
    offload: bool = False

    def __post_init__(self) -> None:
        number = isinstance(self.segment, int) and not isinstance(self.segment, bool) and self.segment > 0
        if not (number or self.segment in (None, "sqrt")):
            raise InputError(f"segment must be None, 'sqrt' or at least 1 inner step, but {self.segment!r} came")
        if not isinstance(self.offload, bool):
            raise InputError(f"offload must be True or False, but {self.offload!r} came")

    def length(self, steps: int) -> int:
        """The steps of a segment, in a loop of `steps`."""
        if self.segment == "sqrt":
            return isqrt(steps - 1) + 1 if steps else 1
        return self.segment or 1

    def walk(self, step: Step, theta: Tensors, steps: int, objective: Objective,
             fixed: Callable[[], Sequence[Tensor]]) -> Iterator[Tensors]:  # fmt: skip
        """theta after each of `steps` steps; `theta, state = step(theta, state, number)`, where state starts as None.

        fixed : gives the tensors that are the same in every step: all parameters and buffers, and last the batch
        """
        state: Any = None
        if not torch.is_grad_enabled() or (self.segment is None and not self.offload):
            for number in range(steps):
                theta, state = step(theta, state, number)
                yield theta
            return
        length = self.length(steps)
        take = _taken if self.segment is None else partial(_computed_again, objective, fixed)
        for low in range(0, steps, length):
            with _in_host_memory(fixed()) if self.offload else nullcontext():
                path, state = take(step, theta, state, range(low, min(low + length, steps)))
            theta = path[-1]
            while path:
                yield path.pop(0)


def _taken(step: Step, theta: Tensors, state: Any, numbers: range) -> tuple[list[Tensors], Any]:
    """theta after each of these steps, and the state after the last."""
    path = []
    for number in numbers:
        theta, state = step(theta, state, number)
        path.append(theta)
    return path, state


def _computed_again(objective: Objective, fixed: Callable[[], Sequence[Tensor]], step: Step, theta: Tensors, state: Any,
                    numbers: range) -> tuple[list[Tensors], Any]:  # fmt: skip
    """The same; but for the backward pass only the start is kept, from which the steps are computed again.

    Autograd watches the arguments of a checkpoint. So the fixed tensors are arguments, although the steps find them by
    themselves: writing to one between forward and backward pass raises an error, as it does without segments.
    """
    leaves, form = tree_flatten((theta, state))
    count = len(leaves)  # all that `run` needs of them: holding them would defeat offload
    watched, modes, shifts = fixed(), objective.structure.state(), objective.shifts
    moment = Moment.now(watched[-1].device)
    ran = False

    def run(*tensors: Any) -> tuple[list[Tensors], Any]:
        nonlocal ran
        objective.structure.check_state(modes)
        if list(map(id, fixed())) != list(map(id, watched)):
            raise InputError("a parameter or a buffer was replaced between forward and backward pass")
        # The checkpoint's own care for random numbers leaves out Apple's GPU.
        present, ran = moment.again() if ran else nullcontext(), True
        with present, objective.shifted(shifts):
            theta, state = tree_unflatten(tensors[:count], form)
            return _taken(step, theta, state, numbers)

    # The check compares shapes only, and what it stores for that would grow with every step.
    result: tuple[list[Tensors], Any] = checkpoint(
        run, *leaves, *watched, use_reentrant=False, preserve_rng_state=False, determinism_check="none"
    )
    return result


def _in_host_memory(fixed: Sequence[Tensor]) -> AbstractContextManager[None]:
    """Inside, what autograd saves goes to host memory, except the `fixed` tensors, of which it saves no copies."""
    stay = {tensor.untyped_storage().data_ptr() for tensor in fixed}

    def pack(tensor: Tensor) -> tuple[torch.device, Tensor, int | None]:
        if tensor.untyped_storage().data_ptr() in stay:
            return tensor.device, tensor, tensor._version
        return tensor.device, to_host(tensor), None

    def unpack(packed: tuple[torch.device, Tensor, int | None]) -> Tensor:
        device, tensor, version = packed
        if version is None:
            return tensor.to(device, non_blocking=device.type == "cuda")
        if tensor._version != version:  # under hooks autograd leaves this check to them
            raise InputError(
                "a parameter, a buffer or a batch was written in place between forward and backward pass, which would "
                "make the meta-gradient wrong; write to it after the backward pass"
            )
        return tensor

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def to_host(tensor: Tensor) -> Tensor:
    """A copy in host memory.

    From CUDA it goes to pinned memory, and nothing waits for it: the way back is a copy on the same stream, hence after
    it, and the allocators of both memories give nothing away before a stream is through with it.
    """
    pinned = tensor.device.type == "cuda"
    host = torch.empty_like(tensor, device="cpu", pin_memory=pinned, requires_grad=False)
    return host.copy_(tensor.detach(), non_blocking=pinned)


def repeatable(update: Update) -> Update:
    """The rule, which is called twice in each of its first two steps: `InputError` if the results differ.

    A rule that keeps its state in itself would give something else when it is computed again. The first step may
    start it anew, the second does not.
    """

    def checked(theta: Tensors, gradient: Tensors, state: Any, step: int) -> tuple[Tensors, Any]:
        if step > 1:
            return update(theta, gradient, state, step)
        with torch.no_grad():
            moment = Moment.now(next(iter(gradient.values())).device)
            with moment.again():
                before = tree_leaves(update(theta, gradient, state, step))
        result = update(theta, gradient, state, step)
        after = tree_leaves(result)
        if len(before) != len(after) or not all(map(_same, before, after)):
            raise InputError(
                f"called twice with the same arguments in step {step}, the update rule gave different results; with "
                "`segment` its steps are computed again, so it must keep what it remembers in the state that it "
                "returns, and write to nothing in place"
            )
        return result

    return checked


def _same(left: Any, right: Any) -> bool:
    """Whether two leaves of a rule's result are equal, as far as they can be compared."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        same_form = left.shape == right.shape and left.dtype == right.dtype
        return same_form and bool(torch.isclose(left, right, rtol=0, atol=0, equal_nan=True).all())
    return not isinstance(left, int | float) or left == right
