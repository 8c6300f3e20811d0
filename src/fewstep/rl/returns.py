"""Returns and advantages as pure functions of arrays. The last axis is time; every other axis is a batch axis."""

from __future__ import annotations

import torch
from torch import Tensor


def discounted(rewards: Tensor, discount: float) -> Tensor:
    """R_t = r_t + discount * R_t+1 [..., H].

    >>> discounted(torch.tensor([1.0, 1.0, 1.0]), 0.5)
    tensor([1.7500, 1.5000, 1.0000])
    """
    total, found = torch.zeros_like(rewards[..., 0]), []
    for reward in reversed(rewards.unbind(-1)):
        total = reward + discount * total
        found.append(total)
    return torch.stack(found[::-1], -1)


def generalised_advantages(rewards: Tensor, values: Tensor, discount: float, decay: float = 1.0) -> Tensor:
    """A_t = sum_l (discount * decay)^l (r_t+l + discount * V_t+l+1 - V_t+l) [..., H] (Schulman et al. 2016, eq. 16).

    values : V_t [..., H], what a baseline expects; 0 after the last step
    decay : lambda; 1 gives R_t - V_t

    >>> generalised_advantages(torch.tensor([1.0, 1.0]), torch.tensor([1.5, 0.5]), discount=1.0)
    tensor([0.5000, 0.5000])
    """
    following = torch.cat([values[..., 1:], torch.zeros_like(values[..., :1])], -1)
    return discounted(rewards + discount * following - values, discount * decay)


def standardised(advantages: Tensor, mask: Tensor) -> Tensor:
    """Mean 0 and deviation 1 over the trajectories and steps of each task that count. [K, M, H], mask alike

    >>> standardised(torch.tensor([[[1.0, 3.0, 9.0]]]), torch.tensor([[[True, True, False]]]))
    tensor([[[-1.,  1.,  0.]]])
    """
    weight = mask.to(advantages.dtype)
    count = weight.sum((-2, -1), keepdim=True)
    mean = (advantages * weight).sum((-2, -1), keepdim=True) / count
    away = (advantages - mean) * weight
    deviation = (away.square().sum((-2, -1), keepdim=True) / count).sqrt()
    return away / (deviation + 1e-8)
