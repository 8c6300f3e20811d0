"""Matching networks (Vinyals et al. 2016, arXiv 1606.04080), without full context embeddings."""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor, nn
from torch.nn import functional

from fewstep.baselines.metric import MetricLearner
from fewstep.errors import InputError
from fewstep.labels import members


class MatchingNet(MetricLearner):
    """A query attends to the support examples and takes their classes in that proportion.

        a = softmax over the support examples i of  scale * cos(f(query), f(x_i)),   p_k = sum of a_i with y_i = k
        logits_k = log p_k

    The paper's equations 1 and section 2.1.1, with one embedding for both sets. Errors: as for `MetricLearner`.

    embed : as for `MetricLearner`
    scale : fixed, not learned. 1 is the paper's, which bounds p: cosines lie within -1..1; more makes it sharper

    >>> import torch
    >>> x, y = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]]), torch.tensor([0, 1, 1])
    >>> classifier = MatchingNet(torch.nn.Identity()).adapt((x, y))
    >>> classifier(torch.tensor([[3.0, 0.0]])).exp()                 # e / (e + 2) and 2 / (e + 2)
    tensor([[0.5761, 0.4239]])
    """

    def __init__(self, embed: nn.Module, *, scale: float = 1.0) -> None:
        super().__init__(embed)
        if not 0 < scale < inf:
            raise InputError(f"the scale must be above 0 and finite, but {scale} came")
        self.scale = scale

    def classify(self, support: Tensor, y: Tensor, query: Tensor, ways: int) -> Tensor:
        """One task: support [N*K, F], y [N*K], query [Q, F] -> logits [Q, ways], which are log-probabilities."""
        cosine = functional.normalize(query, dim=1) @ functional.normalize(support, dim=1).T
        attention = (self.scale * cosine).log_softmax(1)
        return torch.where(members(y, ways), attention[:, None], -inf).logsumexp(2)
