"""By which statistics batch normalisation normalises a task: a choice that decides what an accuracy means.

    "batch"     the batch at hand. A prediction depends on the other queries: transductive (the paper's way).
    "support"   the support set, for the query set too. Each query is answered alone: inductive.
    "running"   averages over training tasks, measured by `fewstep.calibrate`, or those that the model brings along
    "per_step"  the same, of each inner step by itself (MAML++; Antoniou et al. 2019, arXiv 1810.09502)

The model is not touched: `torch.nn.functional.batch_norm` is replaced while a loss is computed. Training goes by the
batch or the support set, as batch normalisation always does; averages are for evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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


class Statistics(nn.Module):
    """Mean and variance of each batch normalisation in the order of their calls: `mean_0` [points, C], `var_0`, ...

    There is one point, or one for each number of inner steps. Not a part of `state_dict`: it is measured anew.
    """

    @property
    def known(self) -> bool:
        """Whether anything has been measured."""
        return bool(self._buffers)

    def names(self, policy: Policy | None) -> list[str]:
        """The names of those that a policy uses."""
        return list(self._buffers) if policy in ("running", "per_step") else []

    def set(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        """(mean, variance) of each call, both [points, C]."""
        self._buffers.clear()
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


def keep_still(model: nn.Module, policy: Policy | None) -> None:
    """Under a policy, keep the norm layers of `model` from writing to the running statistics that they may have."""
    for module in model.modules():
        if policy is not None and isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.training = False


@contextmanager
def normalised(policy: Policy | None, statistics: Statistics, before: int) -> Iterator[None]:
    """Inside, batch normalisation goes by a policy; `before` examples of a batch are those of the support set."""
    if policy is None:
        yield
    elif policy == "batch" or (policy == "support" and not before):
        with _Replacing(_by_batch):
            yield
    elif policy == "support":
        with _Replacing(lambda call, *args: _by_first(before, *args)):
            yield
    else:
        with _Replacing(lambda call, *args: _by_statistics(statistics.of(call) if statistics.known else None, *args)):
            yield


@contextmanager
def observed() -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Inside, batch normalisation goes by the batch. Gives (mean, variance) [C] of each call, as they come."""
    found: list[tuple[Tensor, Tensor]] = []

    def look(call: int, x: Tensor, *args: Any) -> Tensor:
        found.append(_moments(x))
        return _by_batch(call, x, *args)

    with _Replacing(look):
        yield found


class Settled(nn.Module):
    """A model whose batch normalisation goes by fixed statistics, or by the batch at hand."""

    def __init__(self, model: nn.Module, policy: Policy, statistics: Statistics) -> None:
        super().__init__()
        self.model, self.policy, self.statistics = model, policy, statistics

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with normalised(self.policy, self.statistics, 0):
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


def _by_batch(call: int, x: Tensor, mean: Any, variance: Any, weight: Any, bias: Any, eps: float) -> Tensor:
    return functional.batch_norm(x, None, None, weight, bias, training=True, eps=eps)


def _by_first(before: int, x: Tensor, mean: Any, variance: Any, weight: Any, bias: Any, eps: float) -> Tensor:
    return _scaled(x, *_moments(x[:before]), weight, bias, eps)


def _by_statistics(known: tuple[Tensor, Tensor] | None, x: Tensor, mean: Any, variance: Any, weight: Any, bias: Any,
                   eps: float) -> Tensor:  # fmt: skip
    if known is None and mean is None:
        raise InputError("the model has no running statistics; measure them with fewstep.calibrate(learner, episodes)")
    return _scaled(x, *(known or (mean, variance)), weight, bias, eps)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance of each channel of x [examples, C, ...]."""
    dims = [0, *range(2, x.dim())]
    variance, mean = torch.var_mean(x, dims, correction=0)
    return mean, variance


def _scaled(x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None,
            eps: float) -> Tensor:  # fmt: skip
    shape = (-1, *[1] * (x.dim() - 2))
    scale = (variance + eps).rsqrt()
    scale = scale if weight is None else scale * weight
    result = (x - mean.reshape(shape)) * scale.reshape(shape)
    return result if bias is None else result + bias.reshape(shape)
