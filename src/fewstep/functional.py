"""A module and its loss as one pure function of chosen tensors: which adapt, which are shared, which stay put."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.errors import InputError
from fewstep.loss_of import LossOf
from fewstep.normalisation import Policy, check_policy
from fewstep.patterns import matching
from fewstep.replacing import Replacing
from fewstep.structure import Structure, owners, twins_of
from fewstep.task import Batch, Joint, Task, is_pair

Loss = Callable[..., Tensor]
Tensors = dict[str, Tensor]
DATA: Any = Tensor.data.__get__  # type: ignore[attr-defined]


class Place(NamedTuple):
    """Where in adaptation a loss is taken: after how many inner steps, and on the query set or the support set."""

    step: int
    query: bool


class Objective:
    """The loss of `model` on one task's batch, as a function of the parameters that are handed in.

    loss : `loss(prediction, target)` for `(x, y)` batches, `loss(model, batch)` for any other; returns one number, the
        latter also `(number, prediction)`
    inner_loss : the same for the support set, where it is another one
    adapt : name patterns of the parameters that the inner loop changes, see `matching`.
    normalisation : by which statistics batch norm normalises, see `fewstep.normalisation`; None leaves it to the model
    `adapted` and `shared` name the parameters; those with `requires_grad=False` are in neither and stay constant.
    `per_step` holds shared parameters that have a value for each inner step, [steps, ...], in place of the model's.
    """

    def __init__(self, model: nn.Module, loss: Loss, adapt: str | Sequence[str] = "*", *,
                 inner_loss: Loss | None = None, normalisation: Policy | None = None) -> None:  # fmt: skip
        if not isinstance(model, nn.Module):
            raise InputError(f"the model must be a torch.nn.Module, but a {type(model).__name__} came")
        if hasattr(model, "_orig_mod"):
            raise InputError(
                "the model was compiled by torch.compile, which cannot be differentiated twice; "
                "hand in the module itself and compile the learner: maml(..., engine=Engine(compile='pieces'))"
            )
        if any(isinstance(part, torch.jit.ScriptModule) for part in model.modules()):
            raise InputError(
                "a part of the model was made by torch.jit, which hides its parameters; hand in the module"
            )
        if not callable(loss) or not callable(inner_loss or loss):
            raise InputError(f"the loss must be callable, but a {type(loss).__name__} came")
        self.model = model
        self.module = LossOf(model, loss, inner_loss)
        own = [name for name, value in self.module.named_parameters() if value.requires_grad]
        if complex_ := [name for name in own if self.module.get_parameter(name).is_complex()]:
            raise InputError(
                f"'{complex_[0].removeprefix('model.')}' is complex, and has no gradient step here; hold its "
                "real and imaginary parts (torch.view_as_real), or freeze it"
            )
        self._twins = twins_of(self.module)
        known = [*own, *[twin for twin, name in self._twins.items() if name in own]]
        chosen = matching([name.removeprefix("model.") for name in known if name.startswith("model.")], adapt)
        self.adapted = [f"model.{name}" for name in chosen if f"model.{name}" in own]
        for twin in [f"model.{name}" for name in chosen if f"model.{name}" in self._twins]:
            if (name := self._twins[twin]) not in self.adapted:
                raise InputError(
                    f"'{twin.removeprefix('model.')}' is the same parameter as '{name.removeprefix('model.')}', which "
                    "does not adapt; let both adapt, or none of them"
                )
        self._shared = [name for name in own if name not in set(self.adapted)]
        self.per_step: dict[str, nn.Parameter] = {}
        self.shifts: Mapping[int, Tensor] = {}  # see `shifted`
        # Looking names up in a module is slow, and its structure does not change: remember who owns what.
        self._parameters = owners(self.module, own)
        self._buffers = owners(self.module, [name for name, _ in self.module.named_buffers()])
        self.structure = Structure(self.module, [loss, inner_loss])
        self.looked_at: set[tuple[Any, ...]] = set()  # this and the next two: see `look.look_once`
        self.math_attention = self.reads_data = False
        self._norms = [(name, m) for name, m in model.named_modules() if getattr(m, "running_mean", None) is not None]
        self.normalisation = normalisation
        self.check_running_statistics()

    @property
    def normalisation(self) -> Policy | None:
        """By which statistics batch norm normalises; may be set anew at any time."""
        return self.module.normalisation

    @normalisation.setter
    def normalisation(self, policy: Policy | None) -> None:
        self.module.normalisation = check_policy(policy)

    @property
    def shared(self) -> list[str]:
        """What all tasks have in common: the parameters that do not adapt, and measured statistics that are used."""
        return [*self._shared, *(f"statistics.{name}" for name in self.module.statistics.names(self.normalisation))]

    def parameters(self, names: Sequence[str]) -> list[Tensor]:
        """The tensors of these names, as they are meta-learned: with an axis of steps where there is one for each."""
        own = [self._own(name) for name in names]
        return [value + self.shifts[id(value)] if id(value) in self.shifts else value for value in own]

    @contextmanager
    def shifted(self, by: Mapping[int, Tensor]) -> Iterator[None]:
        """Inside, these tensors are added to the parameters of these identities wherever the objective uses them."""
        before, self.shifts = self.shifts, by
        try:
            yield
        finally:
            self.shifts = before

    def _own(self, name: str) -> Tensor:
        if name in self.per_step:
            return self.per_step[name]
        if name.startswith("statistics."):
            return self.module.statistics.get_buffer(name.removeprefix("statistics."))
        value: Tensor = getattr(*self._parameters[name])
        return value

    def at(self, place: Place, tensors: Tensors) -> Tensors:
        """`tensors` as they are used at this place: of what has an axis of steps one entry, beyond its end the last."""
        return {name: self._entry(place, name, value) for name, value in tensors.items()}

    def _entry(self, place: Place, name: str, value: Tensor) -> Tensor:
        if name in self.per_step:  # the query set goes by what the last step went by (Antoniou et al. 2019)
            return value[min(max(place.step - place.query, 0), len(value) - 1)]
        if name.startswith("statistics."):  # the first is the average over the steps
            return value[min(place.step + 1, len(value) - 1) if self.normalisation == "per_step" else 0]
        return value

    def shared_at(self, place: Place) -> Tensors:
        """What all tasks have in common, as it is used at this place."""
        return self.at(place, tensors_by_name(self.shared, self.parameters(self.shared)))

    def give_each_step(self, patterns: str | Sequence[str], steps: int) -> None:
        """Give the shared parameters of these patterns a value of their own for each of `steps` inner steps."""
        names = [name.removeprefix("model.") for name in self._shared]
        for name in matching(names, patterns, "shared parameter") if patterns else ():
            own = self._own(f"model.{name}").detach()
            self.per_step[f"model.{name}"] = nn.Parameter(own.repeat(steps, *[1] * own.dim()))

    def buffers(self) -> Tensors:
        """The module's own buffers."""
        return {name: getattr(*owner) for name, owner in self._buffers.items()}

    def query_of(self, tasks: Task) -> Batch:
        """What the query loss is computed from: with the statistics of the support set, that set as well."""
        if self.normalisation != "support":
            return tasks.query
        if not all(is_pair(batch) and all(isinstance(part, Tensor) for part in batch) for batch in tasks):
            raise InputError(
                "normalising by support statistics needs (x, y) batches of tensors, but others came; use the "
                "normalisation 'running' or 'per_step'"
            )
        return Joint(tasks.support[0], *tasks.query)

    def __call__(self, tensors: Tensors, batch: Batch, *, query: bool = True) -> Tensor:
        """The loss of one task: a scalar. query : it is the query set's, else the support set's"""
        return self.outputs(tensors, batch, query=query)[0]

    def outputs(self, tensors: Tensors, batch: Batch, *, query: bool = True) -> tuple[Tensor, Any]:
        """The loss of one task and, for an `(x, y)` batch, the model's prediction (else None)."""
        with self._as_differentiated():
            loss, prediction = self.call(tensors, batch, query=query)
        if not isinstance(loss, Tensor) or loss.dim() != 0 or not loss.is_floating_point():
            came = f"{loss.dtype} {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise InputError(f"the loss must return one floating-point number for a task, but {came} came")
        return loss, prediction

    @contextmanager
    def _as_differentiated(self) -> Iterator[None]:
        """Let a model compute by what has all derivatives."""
        before = torch.backends.mha.get_fastpath_enabled()
        with ExitStack() as stack:
            if self.math_attention:
                stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if self.reads_data:
                stack.enter_context(Replacing({DATA: Tensor.detach}))
            if before:  # transformer layers in eval mode: a fused path of their own
                torch.backends.mha.set_fastpath_enabled(False)
                stack.callback(torch.backends.mha.set_fastpath_enabled, before)
            yield

    def call(self, tensors: Tensors, batch: Batch, *, query: bool) -> tuple[Any, Any]:
        """What the module gives for these tensors."""
        # Buffers are handed in too, so that a module that replaces one does not keep what it wrote.
        everything = {**self.buffers(), **tensors}
        everything |= {twin: everything[name] for twin, name in self._twins.items() if name in everything}
        # Not tied by PyTorch: in a module that is used twice it would leave what was handed in.
        result: tuple[Any, Any] = functional_call(self.module, everything, (batch, query), tie_weights=False)
        return result

    def buffer_versions(self) -> dict[str, int]:
        """How often each buffer has been written in place: `check_buffers` compares."""
        return {name: value._version for name, value in self.buffers().items()}

    def is_stacked(self, theta: Tensors) -> bool:
        """Whether adapted parameters have a task axis: at the start of adaptation they have none."""
        name = self.adapted[0]
        return theta[name].dim() > self.parameters([name])[0].dim()

    def in_order(self, theta: Tensors, start: Tensors, count: int) -> Tensors:
        """What an update rule returned, each tensor with its task axis; `InputError` where names or shapes are off.

        start : theta before the first step, with or without a task axis
        """
        names = self.adapted
        if set(theta) != set(names):
            raise InputError(f"the update rule must return the tensors {', '.join(names)}, but {', '.join(theta)} came")
        result = {}
        stacked = self.is_stacked(start)
        for name in names:
            value, own = theta[name], start[name].shape[1:] if stacked else start[name].shape
            if value.shape == own:  # left alone at step 0
                value = value.expand(count, *own)
            if value.shape != (count, *own):
                came, expected = tuple(value.shape), (count, *own)
                raise InputError(f"the update rule returned '{name}' with the shape {came} instead of {expected}")
            result[name] = value
        return result

    def check_running_statistics(self) -> None:
        """Raise `InputError` where a norm layer would update running statistics inside the inner loop."""
        for name, module in self._norms:
            if not module.training or module.running_mean is None:
                continue
            by_policy = "Learner(..., normalisation='batch') or " if module in self.module.layers else ""
            if by_policy == "" or self.normalisation is None:
                raise InputError(
                    f"{type(module).__name__} '{name}' keeps running statistics, which would mix the tasks of an inner "
                    f"loop; normalise by the batch at hand, with {by_policy}fewstep.use_batch_statistics(model), or "
                    "put the model in eval mode to keep the statistics that it has"
                )

    def check_buffers(self, before: dict[str, int]) -> None:
        """Raise `InputError` where a forward pass wrote to a buffer: recomputing it would give another result."""
        changed = [name for name, version in self.buffer_versions().items() if version != before.get(name, version)]
        if changed:
            raise InputError(self.written(changed))

    def written(self, names: Sequence[str]) -> str:
        """What to say of a forward pass that writes to one of these buffers, or to a tensor that is none."""
        listed = ", ".join(f"'{name.removeprefix('model.')}'" for name in names)
        what = f"its buffer {listed}" if names else "a tensor that it holds"
        return (
            f"the model writes to {what} in its forward pass, which would make meta-gradients wrong; "
            "return a new tensor instead, or put that module in eval mode"
        )


def tensors_by_name(names: Sequence[str], tensors: Sequence[Tensor]) -> Tensors:
    """The two sequences as a dict."""
    return dict(zip(names, tensors, strict=True))
