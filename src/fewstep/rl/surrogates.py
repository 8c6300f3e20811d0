"""Losses whose gradients are policy gradients: `loss(policy, experience)` of one task, for the learner.

All have the same first derivative on the policy's own actions, that of the expected return. The inner ones differ in
the derivative of that.
"""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from fewstep.errors import InputError
from fewstep.rl.experience import Experience
from fewstep.rl.policies import Policy


def reinforce(policy: Policy, experience: Experience) -> Tensor:
    """-mean log pi(a|s) A, as in the paper (Williams 1992; Finn et al. 2017, eq. 4).

    Its second derivative lacks what the policy's influence on the trajectory itself adds: biased, with little variance.
    """
    return -_mean(_log_probs(policy, experience) * experience.advantages, experience.mask)


def dice(policy: Policy, experience: Experience) -> Tensor:
    """-mean (r_0 ... r_t - r_0 ... r_t-1) A_t,  r = pi / pi_old: loaded DiCE (Farquhar et al. 2019).

    Its box is 1 on the policy's own actions, as here. All derivatives are unbiased, if the advantages are of a baseline
    that was not fitted to the same actions; the variance is large.
    """
    ratio = _log_ratio(policy, experience)
    through = ratio.cumsum(-1)
    return -_mean((through.exp() - (through - ratio).exp()) * experience.advantages, experience.mask)


def likelihood_ratio(policy: Policy, experience: Experience) -> Tensor:
    """-mean pi / pi_old A, with pi_old the policy that acted: the outer surrogate of TRPO (Schulman et al. 2015).

    Inside it is "lvc", the low-variance curvature estimator (Rothfuss et al. 2019, eq. 12), which has the same
    derivatives on the policy's own actions. The second has each step's own part of the influence that `reinforce`
    lacks, and leaves out one step's influence on others.
    """
    return -_mean(_log_ratio(policy, experience).exp() * experience.advantages, experience.mask)


class Clipped:
    """-mean min(r A, clip(r, 1 - c, 1 + c) A), r = pi / pi_old (Schulman et al. 2017, eq. 7)."""

    def __init__(self, clip: float = 0.2) -> None:
        if not 0 < clip < inf:
            raise InputError(f"the ratio's clip must be above 0 and finite, but {clip} came")
        self.clip = clip

    def __call__(self, policy: Policy, experience: Experience) -> Tensor:
        ratio = _log_ratio(policy, experience).exp()
        clipped = ratio.clamp(1 - self.clip, 1 + self.clip)
        lower = torch.minimum(ratio * experience.advantages, clipped * experience.advantages)
        return -_mean(lower, experience.mask)


INNER = {"reinforce": reinforce, "lvc": likelihood_ratio, "dice": dice}


def _log_probs(policy: Policy, experience: Experience) -> Tensor:
    return policy.log_prob(policy(experience.observations), experience.actions)


def _log_ratio(policy: Policy, experience: Experience) -> Tensor:
    """log pi / pi_old, and 0 where no step was taken, for there it could overflow."""
    return torch.where(experience.mask, _log_probs(policy, experience) - experience.log_probs, 0.0)


def _mean(values: Tensor, mask: Tensor) -> Tensor:
    """Over the steps that were taken."""
    return torch.where(mask, values, 0.0).sum() / mask.sum()
