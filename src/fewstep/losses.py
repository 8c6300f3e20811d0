"""Losses whose reduction is declared, because the inner learning rate acts on their scale."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from fewstep.errors import InputError


def summed_over_ways(prediction: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy as the MAML authors reduce it: the sum over all N*K examples, divided by K.

    That is N times the mean over the examples, so their inner rate of 0.4 for 5 ways is 2.0 on the mean. Of unequal
    numbers of examples each class that is there counts alike: else the largest would be all that is learned.

    prediction [Q, N], target [Q] from 0 to N - 1, or -100 for what does not count -> scalar

    >>> import torch
    >>> round(summed_over_ways(torch.zeros(5, 5), torch.arange(5)).item(), 4)   # 5 log 5
    8.0472
    """
    if target.dim() != 1 or target.is_floating_point():
        came = f"{target.dtype} {list(target.shape)} came"
        raise InputError(f"labels must be whole numbers [examples], but {came}; for others take another loss")
    losses = functional.cross_entropy(prediction, target, reduction="none")
    shares = (target >= 0) / (target[:, None] == target).sum(1).to(losses.dtype)
    return (losses * shares).sum() / shares.sum() * prediction.shape[-1]
