"""How far a policy is from the one that acted, and ProMP's penalty for that (Rothfuss et al. 2019, 1810.06784)."""

from __future__ import annotations

from math import inf
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, vmap

from fewstep.errors import InputError
from fewstep.functional import Place, Tensors
from fewstep.learner import Learner
from fewstep.rl.experience import Experience
from fewstep.task import Task, at_step


class ProximalPenalty:
    """An outer objective that holds the policy near the one that acted, before each inner step (ProMP, eq. 12 and 13).

        minimise  L(theta_S; after)  +  weight * mean_s KL(pi_old,s || pi_theta_s; before step s)

    The divergences [K] are means over what was lived through before step s. They matter where several steps are taken
    on one exploration (`Ascent`): in the first one they are 0, and so is their gradient.

    weight : eta; ProMP's is 0.0005, with a clip of 0.3 (`fewstep.rl.surrogates.Clipped`)
    Not for `compile="step"`.
    """

    def __init__(self, weight: float = 5e-4) -> None:
        if not 0 < weight < inf:
            raise InputError(f"the weight of the penalty must be above 0 and finite, but {weight} came")
        self.weight = weight

    def __call__(self, learner: Learner, tasks: Task) -> Tensor:
        """The objective [K] of each task."""
        away: list[Tensor] = []
        for step, theta in enumerate(learner.inner_loop(tasks.support, learner.steps)):
            if step < learner.steps:
                before = at_step(tasks.support, step, learner.stream, axis=1)
                away.append(divergence(learner, theta, step, before))
        after = learner.query_loss(theta, learner.steps, tasks)
        return after + self.weight * torch.stack(away).mean(0) if away else after


def divergence(learner: Learner, theta: Tensors, step: int, lived: Experience) -> Tensor:
    """KL(pi_old || pi_theta) [K] over the steps lived through by pi_old; theta is that after `step` inner steps."""
    policy: Any = learner.model

    def forward(own: Tensors, seen: Tensor) -> Tensor:
        outputs: Tensor = functional_call(policy, own, (seen,))
        return outputs

    own = parameters_of(learner, theta, step, len(lived.mask))
    outputs = vmap(forward, chunk_size=learner.engine.chunk)(own, lived.observations)
    away = torch.where(lived.mask, policy.kl(lived.outputs, outputs), 0.0)
    return away.sum((1, 2)) / lived.mask.sum((1, 2))


def parameters_of(learner: Learner, theta: Tensors, step: int, tasks: int) -> Tensors:
    """All parameters of the learner's model after so many inner steps, by their names in it, each [tasks, ...]."""
    own = dict(learner.model.named_parameters())
    known = {**learner.objective.shared_at(Place(step, query=True)), **theta}
    now = {**own, **{name.removeprefix("model."): value for name, value in known.items()}}
    return {
        name: now[name] if now[name].dim() > value.dim() else now[name].expand(tasks, *value.shape)
        for name, value in own.items()
    }
