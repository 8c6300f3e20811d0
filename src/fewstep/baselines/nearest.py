"""Nearest neighbour, on pixels or on the features of any network (baseline of Vinyals et al. 2016, section 4.1)."""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor

from fewstep.baselines.distance import squared_distances
from fewstep.baselines.metric import MetricLearner
from fewstep.labels import members


class NearestNeighbour(MetricLearner):
    """A query takes the class of the support example that is nearest to it.

        logits_k = -min |f(query) - f(x_i)|^2 over the support examples i of class k

    Its accuracy says something; its loss depends on the scale of the features. Errors: as for `MetricLearner`.

    embed : as for `MetricLearner`; `nn.Flatten()` for pixels, `features_of(model)` for the features of a trained
        network. It may have no parameters; then there is nothing to train.

    >>> import torch
    >>> x, y = torch.tensor([[0.0], [2.0], [5.0]]), torch.tensor([0, 0, 1])
    >>> NearestNeighbour(torch.nn.Flatten()).adapt((x, y))(torch.tensor([[3.0]]))
    tensor([[-1., -4.]])
    """

    def classify(self, support: Tensor, y: Tensor, query: Tensor, ways: int) -> Tensor:
        """One task: support [N*K, F], y [N*K], query [Q, F] -> logits [Q, ways]."""
        return torch.where(members(y, ways), -squared_distances(query, support)[:, None], -inf).amax(2)
