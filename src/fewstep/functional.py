"""A module and its loss as one pure function of chosen tensors: which adapt, which are shared, which stay put."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from fewstep.errors import InputError
from fewstep.task import Batch

Loss = Callable[..., Tensor]
Tensors = dict[str, Tensor]


class Objective:
    """The loss of `model` on one task's batch, as a function of the parameters that are handed in.

    loss : `loss(prediction, target)` for `(x, y)` batches, `loss(model, batch)` for any other; returns one number.
    adapt : name patterns of the parameters that the inner loop changes, see `matching`.
    `adapted` and `shared` name the parameters; those with `requires_grad=False` are in neither and stay constant.
    """

    def __init__(self, model: nn.Module, loss: Loss, adapt: str | Sequence[str] = "*") -> None:
        if not isinstance(model, nn.Module):
            raise InputError(f"the model must be a torch.nn.Module, but a {type(model).__name__} came")
        if hasattr(model, "_orig_mod"):
            raise InputError(
                "the model was compiled by torch.compile, which cannot be differentiated twice; "
                "hand in the module itself and compile the learner: maml(..., engine=Engine(compile='pieces'))"
            )
        if not callable(loss):
            raise InputError(f"the loss must be callable, but a {type(loss).__name__} came")
        self.model = model
        self.module = _LossOf(model, loss)
        own = [name for name, value in self.module.named_parameters() if value.requires_grad]
        trainable = [name.removeprefix("model.") for name in own if name.startswith("model.")]
        self.adapted = [f"model.{name}" for name in matching(trainable, adapt)]
        self.shared = [name for name in own if name not in set(self.adapted)]
        # Looking names up in a module is slow, and its structure does not change: remember who owns what.
        self._parameters = _owners(self.module, own)
        self._buffers = _owners(self.module, [name for name, _ in self.module.named_buffers()])
        self._modules = list(self.module.modules())
        self.looked_at: set[tuple[bool, ...]] = set()  # see `checks.look_once`
        self.math_attention = False  # see `checks.look_once`
        self._norms = [(name, m) for name, m in model.named_modules() if getattr(m, "running_mean", None) is not None]
        self.check_running_statistics()

    def parameters(self, names: Sequence[str]) -> list[Tensor]:
        """The module's own trainable tensors of these names."""
        return [getattr(*self._parameters[name]) for name in names]

    def buffers(self) -> Tensors:
        """The module's own buffers."""
        return {name: getattr(*owner) for name, owner in self._buffers.items()}

    def __call__(self, tensors: Tensors, batch: Batch) -> Tensor:
        """The loss of one task: a scalar."""
        return self.outputs(tensors, batch)[0]

    def outputs(self, tensors: Tensors, batch: Batch) -> tuple[Tensor, Any]:
        """The loss of one task and, for an `(x, y)` batch, the model's prediction (else None)."""
        # Buffers are handed in too, so that a module that replaces one does not keep what it wrote.
        everything = {**self.buffers(), **tensors}
        with sdpa_kernel(SDPBackend.MATH) if self.math_attention else nullcontext():
            loss, prediction = functional_call(self.module, everything, (batch,))
        if not isinstance(loss, Tensor) or loss.dim() != 0 or not loss.is_floating_point():
            came = f"{loss.dtype} {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise InputError(f"the loss must return one floating-point number for a task, but {came} came")
        return loss, prediction

    def buffer_versions(self) -> dict[str, int]:
        """How often each buffer has been written in place: `check_buffers` compares."""
        return {name: value._version for name, value in self.buffers().items()}

    def modes(self) -> list[bool]:
        """Which submodules are in train mode."""
        return [module.training for module in self._modules]

    def check_modes(self, before: list[bool]) -> None:
        """Raise `InputError` where a submodule changed its mode: recomputing would give something else."""
        if self.modes() != before:
            raise InputError("the model went from train to eval mode, or back, between forward and backward pass")

    def is_stacked(self, theta: Tensors) -> bool:
        """Whether adapted parameters have a task axis: at the start of adaptation they have none."""
        name = self.adapted[0]
        return theta[name].dim() > self.parameters([name])[0].dim()

    def in_order(self, theta: Tensors, count: int) -> Tensors:
        """What an update rule returned, each tensor with its task axis; `InputError` where names or shapes are off."""
        names = self.adapted
        if set(theta) != set(names):
            raise InputError(f"the update rule must return the tensors {', '.join(names)}, but {', '.join(theta)} came")
        result = {}
        for name, own in zip(names, self.parameters(names), strict=True):
            value = theta[name]
            if value.shape == own.shape:  # left alone at step 0
                value = value.expand(count, *own.shape)
            if value.shape != (count, *own.shape):
                came, expected = tuple(value.shape), (count, *own.shape)
                raise InputError(f"the update rule returned '{name}' with the shape {came} instead of {expected}")
            result[name] = value
        return result

    def check_structure(self) -> None:
        """Raise `InputError` where a submodule was replaced: the tensors of the old one would be used."""
        now = list(self.module.modules())
        if len(now) != len(self._modules) or any(a is not b for a, b in zip(now, self._modules, strict=True)):
            raise InputError(
                "a submodule of the model was replaced after the learner was built; build the learner again"
            )

    def check_running_statistics(self) -> None:
        """Raise `InputError` where a norm layer would update running statistics inside the inner loop."""
        for name, module in self._norms:
            if module.training and module.running_mean is not None:
                raise InputError(
                    f"{type(module).__name__} '{name}' keeps running statistics, which would mix the tasks of an inner "
                    "loop; call fewstep.use_batch_statistics(model) to normalise by the batch at hand, or put the "
                    "model in eval mode to keep the statistics that it has"
                )

    def check_buffers(self, before: dict[str, int]) -> None:
        """Raise `InputError` where a forward pass wrote to a buffer: recomputing it would give another result."""
        changed = [name for name, version in self.buffer_versions().items() if version != before.get(name, version)]
        if changed:
            raise InputError(self.written_buffers(changed))

    def written_buffers(self, names: Sequence[str]) -> str:
        """What to say of a forward pass that writes to one of these buffers."""
        listed = ", ".join(f"'{name.removeprefix('model.')}'" for name in names)
        return (
            f"the model writes to its buffer {listed} in its forward pass, which would make meta-gradients wrong; "
            "return a new tensor instead, or put that module in eval mode"
        )


class _LossOf(nn.Module):
    """One forward pass from batch to loss, so that one functional call swaps the parameters of both."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, batch: Batch) -> tuple[Any, Any]:
        if not is_pair(batch):
            return self.loss(self.model, batch), None
        x, y = batch
        prediction = self.model(x)
        return self.loss(prediction, y), prediction


def is_pair(batch: Batch) -> bool:
    """Whether a batch is `(x, y)`, so that its loss is `loss(model(x), y)`."""
    return isinstance(batch, tuple | list) and len(batch) == 2


def matching(names: Sequence[str], patterns: str | Sequence[str], what: str = "trainable parameter") -> list[str]:
    """The names that a pattern chooses: `*` and `?` as in file names; `~` in front takes names away.

    Patterns are read from left to right; a first pattern with `~` starts from all names. `InputError` where a
    pattern matches nothing. `what` the names stand for is said in the message.

    >>> matching(["body.weight", "head.weight", "head.bias"], "head.*")
    ['head.weight', 'head.bias']
    >>> matching(["body.weight", "head.weight", "head.bias"], ["~body.*", "~*.bias"])
    ['head.weight']
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    chosen: set[str] = set(names) if patterns and patterns[0].startswith("~") else set()
    for pattern in patterns:
        found = {name for name in names if fnmatchcase(name, pattern.removeprefix("~"))}
        if not found:
            raise InputError(f"the pattern {pattern!r} matches no {what}; there are: {', '.join(names) or 'none'}")
        chosen = chosen - found if pattern.startswith("~") else chosen | found
    if not chosen:
        raise InputError(f"the patterns {patterns} leave no {what} to adapt; there are: {', '.join(names)}")
    return [name for name in names if name in chosen]


def _owners(module: nn.Module, names: Sequence[str]) -> dict[str, tuple[nn.Module, str]]:
    """For each dotted name the submodule that holds the tensor, and its name there."""
    parts = {name: name.rpartition(".") for name in names}
    return {name: (module.get_submodule(path), last) for name, (path, _, last) in parts.items()}


def use_batch_statistics(model: nn.Module) -> nn.Module:
    """Make every norm layer of `model` normalise by the batch at hand, in place, and return the model.

    Running statistics are dropped. Evaluation is then transductive: a prediction depends on its batch.

    >>> use_batch_statistics(nn.BatchNorm1d(3)).running_mean is None
    True
    """
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
            module.track_running_stats = False
            module.running_mean = None
            module.running_var = None
            module.num_batches_tracked = None
    return model


def tensors_by_name(names: Sequence[str], tensors: Sequence[Tensor]) -> Tensors:
    """The two sequences as a dict."""
    return dict(zip(names, tensors, strict=True))
