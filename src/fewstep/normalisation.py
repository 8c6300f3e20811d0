"""By which statistics batch normalisation normalises a task: a choice that decides what an accuracy means.

    "batch"     the batch at hand. A prediction depends on the other queries: transductive (the paper's way).
    "support"   the support set, for the query set too. Each query is answered alone: inductive.
    "running"   averages over training tasks, measured by `fewstep.calibrate`, or those that the model brings along
    "per_step"  the same, of each inner step by itself (MAML++; Antoniou et al. 2019, arXiv 1810.09502)

The model is not touched: `torch.nn.functional.batch_norm` is replaced while a loss is computed, and running statistics
are never written. Training goes by the batch or the support set, as batch normalisation always does; averages are for
evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from fewstep.errors import InputError

Policy = Literal["batch", "support", "running", "per_step"]
MEANINGS: dict[Policy | None, str] = {
    None: "as the model's layers do by themselves",
    "batch": "batch statistics (transductive)",
    "support": "support statistics (inductive)",
    "running": "running statistics of training tasks (inductive)",
    "per_step": "running statistics of training tasks for each step (inductive)",
}


_POLICY: ContextVar[Policy | None] = ContextVar("policy", default=None)  # that of the loss being computed


class Statistics(nn.Module):
    """Mean and variance of each batch normalisation in the order of their calls: `mean_0` [points, C], `var_0`, ...

    The first point is the average over the inner steps, the others are those after 0, 1, ... of them. In the model of
    one task there is no axis of points. Not a part of `state_dict`: they are measured anew.
    """

    @property
    def known(self) -> bool:
        """Whether anything has been measured."""
        return bool(self._buffers)

    def names(self, policy: Policy | None) -> list[str]:
        """The names of those that a policy uses."""
        return list(self._buffers) if policy in ("running", "per_step") else []

    def set(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """(mean, variance) of each call."""
        self._buffers.clear()
        self._non_persistent_buffers_set.clear()
        for number, (mean, variance) in enumerate(pairs):
            self.register_buffer(f"mean_{number}", mean, persistent=False)
            self.register_buffer(f"var_{number}", variance, persistent=False)

    def of(self, call: int) -> tuple[Tensor, Tensor]:
        """Mean and variance of a call."""
        if f"mean_{call}" not in self._buffers:
            raise InputError("the statistics are of another model; measure them anew with fewstep.calibrate")
        return self.get_buffer(f"mean_{call}"), self.get_buffer(f"var_{call}")


def check_policy(policy: Policy | None) -> Policy | None:
    """The policy; `InputError` where it is none."""
    if policy is not None and policy not in get_args(Policy):
        raise InputError(f"the normalisation must be None or one of {get_args(Policy)}, but {policy!r} came")
    return policy


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """The layers of `model` that normalise by batches."""
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


@contextmanager
def normalised(policy: Policy | None, statistics: Statistics, layers: Sequence[nn.Module], before: int = 0,
               total: int = 0) -> Iterator[None]:  # fmt: skip
    """Inside, batch normalisation goes by a policy.

    layers : the `batch_norms` of the model;  before : how many of a batch's `total` examples are the support set's
    """
    if policy is None:
        yield
        return

    def norm(call: int, x: Tensor, *args: Any) -> Tensor:
        if policy == "support" and before:
            return _by_first(before, total, x, *args)
        if policy in ("batch", "support"):
            return _by_batch(call, x, *args)
        return _by_statistics(policy, statistics.of(call) if statistics.known else None, x, *args)

    token = _POLICY.set(policy)
    try:
        with _held(layers), _Replacing(norm):
            yield
    finally:
        _POLICY.reset(token)


@contextmanager
def _held(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, the layers are in eval mode: in train mode they would count batches. What they go by is replaced."""
    modes = [layer.training for layer in layers]
    try:
        for layer in layers:
            layer.training = False
        yield
    finally:
        for layer, mode in zip(layers, modes, strict=True):
            layer.training = mode


@contextmanager
def observed() -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Inside, batch normalisation goes by the batch. Gives (mean, variance) [C] of each call, as they come."""
    found: list[tuple[Tensor, Tensor]] = []

    def look(call: int, x: Tensor, *args: Any) -> Tensor:
        found.append(_moments(x))
        return _by_batch(call, x, *args)

    with _Replacing(look):
        yield found


@contextmanager
def no_batch_statistics(message: str) -> Iterator[None]:
    """Inside, batch normalisation by the batch at hand raises `InputError`."""
    with _Refusing(message):
        yield


class Settled(nn.Module):
    """A model whose batch normalisation goes by fixed statistics, or by the batch at hand."""

    def __init__(self, model: nn.Module, policy: Policy, statistics: Statistics) -> None:
        super().__init__()
        self.model, self.policy, self.statistics = model, policy, statistics
        self.layers = batch_norms(model)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with normalised(self.policy, self.statistics, self.layers):
            return self.model(*args, **kwargs)


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


class _Replacing(TorchFunctionMode):
    """Inside, `norm(number of the call, x, mean, variance, weight, bias, eps)` runs for batch normalisation."""

    def __init__(self, norm: Callable[..., Tensor]) -> None:
        super().__init__()
        self.norm, self.calls = norm, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not functional.batch_norm:
            return func(*args, **(kwargs or {}))
        self.calls += 1
        return self._call(*args, **(kwargs or {}))

    def _call(self, x: Tensor, mean: Tensor | None, variance: Tensor | None, weight: Tensor | None = None,
              bias: Tensor | None = None, training: bool = False, momentum: float = 0.1,
              eps: float = 1e-5) -> Tensor:  # fmt: skip
        return self.norm(self.calls - 1, x, mean, variance, weight, bias, eps)


class _Refusing(TorchFunctionMode):
    """Inside, there is no batch normalisation by the batch at hand."""

    def __init__(self, message: str) -> None:
        super().__init__()
        self.message = message

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.batch_norm:
            training, policy = kwargs.get("training", args[5] if len(args) > 5 else False), _POLICY.get()
            if training if policy is None else policy in ("batch", "support"):
                raise InputError(self.message)
        return func(*args, **kwargs)


def _by_batch(call: int, x: Tensor, mean: Any, variance: Any, weight: Any, bias: Any, eps: float) -> Tensor:
    return functional.batch_norm(x, None, None, weight, bias, training=True, eps=eps)


def _by_first(before: int, total: int, x: Tensor, mean: Any, variance: Any, weight: Any, bias: Any,
              eps: float) -> Tensor:  # fmt: skip
    rows, rest = divmod(len(x), total)  # a model may give each example several rows, such as those of a sequence
    if rest:
        raise InputError(
            f"normalising by support statistics needs the {total} examples of support and query set as the first axis "
            f"of what is normalised, but {tuple(x.shape)} came; use another normalisation"
        )
    mean, variance = _moments(x[: before * rows])
    return _scaled(x, mean, variance, weight, bias, eps)


def _by_statistics(policy: Policy, known: tuple[Tensor, Tensor] | None, x: Tensor, mean: Any, variance: Any,
                   weight: Any, bias: Any, eps: float) -> Tensor:  # fmt: skip
    if known is None and (mean is None or policy == "per_step"):
        raise InputError(
            f"the normalisation {policy!r} has no statistics to go by; measure them with "
            "fewstep.calibrate(learner, episodes)"
        )
    mean, variance = known or (mean, variance)
    return _scaled(x, mean, variance, weight, bias, eps)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance of each channel of x [examples, C, ...]."""
    dims = [0, *range(2, x.dim())]
    variance, mean = torch.var_mean(_wide(x), dims, correction=0)
    return mean, variance


def _scaled(x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None,
            eps: float) -> Tensor:  # fmt: skip
    shape = (-1, *[1] * (x.dim() - 2))
    scale = (variance + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    result = (_wide(x) - mean.reshape(shape)) * scale.reshape(shape)
    return (result if bias is None else result + bias.reshape(shape)).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    """In at least float32, as fused batch normalisation computes."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
