"""Prototypical networks (Snell, Swersky, Zemel 2017, arXiv 1703.05175, Algorithm 1)."""

from __future__ import annotations

from torch import Tensor

from fewstep.baselines.distance import squared_distances
from fewstep.baselines.metric import MetricLearner
from fewstep.labels import members


class ProtoNet(MetricLearner):
    """Each class is the mean of its support features; a query is nearest to its own.

        c_k = mean of f(x) over the support examples of class k,   logits_k = -|f(query) - c_k|^2

    Trained by the query loss, the embedding learns. Errors and the form of `embed`: as for `MetricLearner`.

    >>> import torch
    >>> from fewstep import Task
    >>> x, y = torch.tensor([[[0.0], [2.0], [5.0]]]), torch.tensor([[0, 0, 1]])     # prototypes 1 and 5
    >>> learner = ProtoNet(torch.nn.Identity())
    >>> learner.adapt((x[0], y[0]))(torch.tensor([[2.0]]))
    tensor([[-1., -9.]])
    >>> query = torch.tensor([[[2.0]]]), torch.tensor([[0]])
    >>> round(learner(Task(support=(x, y), query=query)).item(), 6)                 # log(1 + exp(-8))
    0.000335
    """

    def classify(self, support: Tensor, y: Tensor, query: Tensor, ways: int) -> Tensor:
        """One task: support [N*K, F], y [N*K], query [Q, F] -> logits [Q, ways]."""
        member = members(y, ways).to(support.dtype)
        return -squared_distances(query, member @ support / member.sum(1, keepdim=True))
