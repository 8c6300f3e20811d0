"""CAVIA: fast context adaptation via meta-learning (Zintgraf et al. 2019, arXiv 1810.03642)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from fewstep.errors import InputError
from fewstep.functional import Loss
from fewstep.learner import Learner
from fewstep.models.context import Kind, add_context, context_of
from fewstep.patterns import matching
from fewstep.starts import Zeros
from fewstep.updates import SGD


def cavia(model: nn.Module, loss: Loss, *, lr: float, steps: int = 1, context: int = 5, layer: str | None = None,
          kind: Kind | None = None, adapt: str | Sequence[str] = "*", **options: Any) -> Learner:  # fmt: skip
    """MAML that adapts a small context, a further input of the network, and leaves the network alone.

        phi_i' = phi - alpha * grad_phi L_i(phi, theta; support),  from phi = 0 in every task
        minimise  sum_i L_i(phi_i', theta; query)  over theta

    Derivatives: second order. Gradient evaluations per task: steps + 1, and `steps` products. Memory: the context of
    each step, a few numbers per task, and one gradient of theta. Meta-learned: all of the network; no context.

    The model gets its context by `fewstep.models.add_context`, IN PLACE: its layer gains a wrapper, and the names below
    it a ".base". A model that has a context already keeps it as it is.

    lr : alpha, rather large: the paper has 1.0
    context : how many numbers;  layer, kind : where and how they enter, see `add_context`
    adapt : only the context can adapt: patterns that leave it out are an error
    options : as for `fewstep.Learner`, without `start`

    >>> import torch
    >>> from fewstep import Task, models
    >>> model = models.add_context(nn.Linear(1, 1, bias=False), 1)      # L = (w x + v phi - y)^2
    >>> for value in (model.base.weight, model.columns):
    ...     _ = nn.init.constant_(value, 1.0)
    >>> x, y = torch.ones(1, 1, 1), torch.zeros(1, 1, 1)   # phi' = -2 alpha w v = -0.2
    >>> learner = cavia(model, nn.functional.mse_loss, lr=0.1)
    >>> loss = learner(Task(support=(x, y), query=(x, y)))
    >>> loss.sum().backward()                              # d/dw (w - 0.2 w v^2)^2, d/dv
    >>> [round(value.item(), 4) for value in (loss, model.base.weight.grad, model.columns.grad)]
    [0.64, 1.28, -0.64]
    """
    if context_of(model) is None:
        model = add_context(model, context, layer=layer, kind=kind)
    name = context_of(model)
    assert name is not None
    if name not in matching([name for name, value in model.named_parameters() if value.requires_grad], adapt):
        raise InputError(f"only the context '{name}' adapts in CAVIA, but adapt={adapt!r} leaves it out")
    return Learner(model, loss, SGD(lr), steps=steps, adapt=name, start=Zeros(model, name), **options)
