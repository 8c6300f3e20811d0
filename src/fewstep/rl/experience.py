"""What a policy lived through in a task: trajectories, and what is learned from them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Trajectories(NamedTuple):
    """M trajectories of at most H steps in each of K tasks.

    observations [K, M, H, o];  actions [K, M, H, ...];  rewards [K, M, H], 0 after the end
    log_probs [K, M, H] : of the actions, under the policy that took them
    outputs [K, M, H, p] : of that policy, the parameters of its distributions
    mask [K, M, H] : whether a step was taken; after its end a trajectory counts no more
    """

    observations: Tensor
    actions: Tensor
    rewards: Tensor
    log_probs: Tensor
    outputs: Tensor
    mask: Tensor

    @property
    def returns(self) -> Tensor:
        """The mean undiscounted return [K] of each task."""
        return self.rewards.sum(-1).mean(-1)


class Experience(NamedTuple):
    """What a surrogate loss is computed from; a batch, like any other, of `fewstep.Learner`.

    observations, actions, log_probs, outputs, mask : as in `Trajectories`
    advantages : [K, M, H], how much better than expected an action turned out, standardised in each task
    returns : [K, M], the undiscounted return of each trajectory
    """

    observations: Tensor
    actions: Tensor
    advantages: Tensor
    log_probs: Tensor
    outputs: Tensor
    mask: Tensor
    returns: Tensor
