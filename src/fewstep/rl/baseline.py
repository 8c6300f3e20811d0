"""The linear feature baseline (Duan et al. 2016), fit to the very trajectories whose returns it is to explain."""

from __future__ import annotations

import torch
from torch import Tensor

RIDGE = 1e-5
CLIP = 10.0  # of observations
TRIES = 5  # with ten times the ridge each
STEPS = 3  # for each feature at least


def linear_baseline(observations: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """V [K, M, H], for each task the ridge regression of the returns on [o, o^2, t, t^2, t^3, 1], with t in hundreds.

    Where a task has fewer steps than three for each of these, they would explain chance as well, and leave noise for
    advantages: it is [t, t^2, t^3, 1] alone there.

    observations [K, M, H, o], clipped to -10..10;  returns, mask [K, M, H]

    >>> observations, mask = torch.zeros(1, 2, 3, 1), torch.ones(1, 2, 3, dtype=torch.bool)
    >>> returns = torch.tensor([[[3.0, 2.0, 1.0], [5.0, 4.0, 3.0]]])  # 4 - t, and what differs
    >>> linear_baseline(observations, returns, mask)[0, 0].round(decimals=1)
    tensor([4., 3., 2.])
    """
    return torch.stack([_fit(*task) for task in zip(observations, returns, mask, strict=True)])


def _fit(observations: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """V [M, H] of one task: what the features of all at once would take is gigabytes."""
    x = features(observations)
    if mask.sum() < STEPS * x.shape[-1]:
        x = x[..., -4:]
    rows, y = x[mask], returns[mask].double()
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    for attempt in range(TRIES):
        coefficients = torch.linalg.solve_ex(rows.T @ rows + RIDGE * 10**attempt * eye, rows.T @ y)[0]
        if coefficients.isfinite().all():
            break
    values: Tensor = (x @ coefficients).to(returns.dtype)
    return values


def features(observations: Tensor) -> Tensor:
    """[o, o^2, t, t^2, t^3, 1] in float64: [..., H, 2 o + 4]."""
    o = observations.double().clamp(-CLIP, CLIP)
    t = torch.arange(o.shape[-2], dtype=o.dtype, device=o.device)[:, None] / 100
    time = torch.cat([t, t**2, t**3, torch.ones_like(t)], -1).expand(*o.shape[:-1], 4)
    return torch.cat([o, o**2, time], -1)
