"""Outer objectives for streams: support sets that are a sequence of batches, one for each inner step."""

from __future__ import annotations

from math import inf, isfinite

import torch
from torch import Tensor

from fewstep.errors import InputError
from fewstep.functional import Place
from fewstep.gradient import task_loss
from fewstep.learner import Learner
from fewstep.task import Task, at_step


class AlongTheWay:
    """Each batch of a stream is answered before it is learned from, and that counts too.

        theta_k+1 = theta_k - alpha * grad L_in(theta_k; batch k),   k = 0 .. S - 1
        minimise  L(theta_S; query)  +  weight / S * sum_k L(theta_k; batch k)

    Every loss along the way is one of data that theta_k has not seen. With `inner_loss` a self-supervised loss, what is
    trained is test-time training on a stream (Sun et al. 2020, arXiv 1909.13231, whose online version answers a batch
    after learning from it); without, it is online meta-learning of the start.

    Derivatives: the learner's. Gradient evaluations per task: 2 S + 1, and S products. Memory: the parameters of each
    step, and a gradient of the losses along the way. Meta-learned: what the learner has. Not for `compile="step"`.

    weight : of the mean loss along the way; 0 leaves the query loss alone
    Takes batches of one form: L is the learner's `loss`, on the batches and on the query set. `InputError` unless the
    weight is finite and at least 0. Goes with any learner; without `stream=True`, batch k is the whole support set.

    >>> import fewstep
    >>> model = torch.nn.Linear(1, 1, bias=False)               # L = (w x - y)^2, so each step takes w to 0.8 w
    >>> _ = torch.nn.init.constant_(model.weight, 1.0)
    >>> learner = fewstep.maml(model, torch.nn.functional.mse_loss, lr=0.1, steps=2, stream=True, outer=AlongTheWay())
    >>> x, y = torch.ones(1, 2, 1, 1), torch.zeros(1, 2, 1, 1)  # one task, two batches of one example
    >>> loss = learner(Task(support=(x, y), query=(x[:, 0], y[:, 0])))
    >>> round(loss.item(), 4)                                   # 0.64^2 + (1 + 0.8^2) / 2
    1.2296
    """

    def __init__(self, weight: float = 1.0) -> None:
        if not isfinite(weight) or not 0 <= weight < inf:
            raise InputError(f"the weight of the losses along the way must be finite and at least 0, but {weight} came")
        self.weight = weight

    def __call__(self, learner: Learner, tasks: Task) -> Tensor:
        """The objective [B] of each task."""
        way: list[Tensor] = []
        for step, theta in enumerate(learner.inner_loop(tasks.support, learner.steps)):
            if step < learner.steps and self.weight:
                batch = at_step(tasks.support, step, learner.stream, axis=1)
                way.append(task_loss(*learner.problem(theta, batch, Place(step, query=True))))
        query = learner.query_loss(theta, learner.steps, tasks)
        return query + self.weight * torch.stack(way).mean(0) if way else query
