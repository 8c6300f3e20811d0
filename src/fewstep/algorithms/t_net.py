"""T-net: gradient descent in a learned metric (Lee & Choi 2018, arXiv 1801.05558)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from fewstep.functional import Loss
from fewstep.learner import Learner
from fewstep.models.warp import add_warp, warps_of
from fewstep.updates import SGD


def t_net(model: nn.Module, loss: Loss, *, lr: float, steps: int = 1, adapt: str | Sequence[str] = "*",
          **options: Any) -> Learner:  # fmt: skip
    """MAML with a linear map T after each layer, which is meta-learned and does not adapt.

        y = T (W x + b):  gradient descent on W moves T W by  -alpha * T T^T * grad,  a metric learned for it

    T mixes the outputs of a linear layer or the channels of a convolution, and starts as the identity: the method
    starts as MAML. The head, the last linear layer, has none. (The paper's MT-net also learns a mask of what adapts;
    that is not done here.) Derivatives: second order. Gradient evaluations per task: steps + 1, and `steps` products.
    Memory: the parameters of each step. Meta-learned: the start, all T, and all other shared parameters.

    The model gets its maps by `fewstep.models.add_warp`, IN PLACE: each of its layers gains a wrapper, and the names
    below it a ".base". A model that has them already keeps them as they are.

    adapt : patterns of what adapts, from which the maps T are taken away
    lr, steps, options : as for `maml`

    >>> import torch
    >>> from fewstep import Task
    >>> model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))     # u T w x
    >>> for value in model.parameters():
    ...     _ = nn.init.constant_(value, 1.0)
    >>> learner = t_net(model, nn.functional.mse_loss, lr=0.1)
    >>> x, y = torch.ones(1, 1, 1), torch.zeros(1, 1, 1)
    >>> loss = learner(Task(support=(x, y), query=(x, y)))   # u' = w' = 1 - 0.1 * 2 = 0.8: (0.8 * 0.8)^2
    >>> round(loss.item(), 4)
    0.4096
    """
    if not warps_of(model):
        add_warp(model)
    patterns = [adapt] if isinstance(adapt, str) else [*adapt]
    patterns += [f"~{name}" for name in warps_of(model)]
    return Learner(model, loss, SGD(lr), steps=steps, adapt=patterns, **options)
