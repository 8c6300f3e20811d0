"""What a policy does before adaptation decides what there is to learn from: E-MAML's correction for that."""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from fewstep.distributed import averaged
from fewstep.errors import InputError
from fewstep.functional import Place
from fewstep.gradient import task_loss
from fewstep.learner import Learner
from fewstep.rl.experience import Experience
from fewstep.task import Task, at_step


class SamplingCorrection:
    """An outer objective in which actions before adaptation are credited with the return after it (Stadie et al. 2018).

        minimise  L(theta_S; after)  -  weight * sum_s c * mean pi_theta_s(a|s) / pi_old(a|s)   (a, s before step s)

    Without the second term the gradient lacks how theta decides what is sampled (arXiv 1803.01118, eq. 7). With it, an
    inner loss by REINFORCE, plain advantages, c the plain return, and as many trajectories as its weight, it is
    unbiased for adaptation from samples (Vuorio et al. 2022). What people use is c less its mean over the tasks, in
    units of its deviation over them, beside standardised advantages: a heuristic of less variance.

    weight : 1 is E-MAML's;  standardise : False takes the plain return as c
    Gradient evaluations per task: 2 S + 1, and S products. Not for `compile="step"`.
    """

    def __init__(self, weight: float = 1.0, standardise: bool = True) -> None:
        if not 0 < weight < inf:
            raise InputError(f"the weight of the correction must be above 0 and finite, but {weight} came")
        self.weight, self.standardise = weight, standardise

    def __call__(self, learner: Learner, tasks: Task) -> Tensor:
        """The objective [K] of each task."""
        credit = self._credit(tasks.query.returns.mean(-1))
        way: list[Tensor] = []
        for step, theta in enumerate(learner.inner_loop(tasks.support, learner.steps)):
            if step < learner.steps:
                before: Experience = at_step(tasks.support, step, learner.stream, axis=1)
                credited = before._replace(advantages=credit[:, None, None].expand_as(before.advantages))
                way.append(task_loss(*learner.problem(theta, credited, Place(step, query=True))))
        after = learner.query_loss(theta, learner.steps, tasks)
        return after + self.weight * torch.stack(way).sum(0) if way else after

    def _credit(self, returns: Tensor) -> Tensor:
        """c of each task [K]; the mean and the deviation are of the tasks of all processes."""
        if not self.standardise:
            return returns
        (mean,) = averaged([returns.mean()], len(returns))
        away = returns - mean
        (variance,) = averaged([away.square().mean()], len(returns))
        return away / (variance.sqrt() + 1e-8)
