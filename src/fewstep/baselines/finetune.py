"""A trained network fine-tuned on each task: a new head, its own head, or all of it."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from fewstep.errors import InputError
from fewstep.functional import Loss
from fewstep.learner import Learner
from fewstep.patterns import linear_head
from fewstep.updates import SGD


def linear_probe(model: nn.Module, loss: Loss, *, ways: int, lr: float, steps: int = 100,
                 head: str | None = None, **options: Any) -> Learner:  # fmt: skip
    """A new linear head W f + b with `ways` outputs on the frozen features f of `model`, fitted to each task.

        W_0 = 0,   b_0 = 0,   (W, b) <- (W, b) - lr * grad L(W f + b; support),  `steps` times

    Works on a copy of `model`, whose own head, the last `nn.Linear` or that named `head`, is replaced. (Alain and
    Bengio 2016, arXiv 1610.01644.) The features are computed anew in each step. `options` : as for `Learner`.

    >>> import torch
    >>> model = nn.Sequential(nn.Identity(), nn.Linear(1, 3))
    >>> probe = linear_probe(model, nn.functional.cross_entropy, ways=2, lr=1.0, steps=1)
    >>> x, y = torch.tensor([[1.0], [-1.0]]), torch.tensor([0, 1])  # W = mean of (onehot(y) - 1/2) x
    >>> probe.adapt((x, y))(torch.tensor([[1.0]]))
    tensor([[ 0.5000, -0.5000]], grad_fn=<AddmmBackward0>)
    """
    name, old = linear_head(model, head)
    if ways < 1:
        raise InputError(f"the number of ways must be at least 1, but {ways} came")
    new = nn.Linear(old.in_features, ways, device=old.weight.device, dtype=old.weight.dtype)
    for value in new.parameters():
        nn.init.zeros_(value)
    model = copy.deepcopy(model).requires_grad_(False)
    if name:
        model.set_submodule(name, new)
    else:
        model = new
    return fine_tune_head(model, loss, lr=lr, steps=steps, head=name, **options)


def fine_tune_head(model: nn.Module, loss: Loss, *, lr: float, steps: int = 10, head: str | None = None,
                   **options: Any) -> Learner:  # fmt: skip
    """Gradient steps on the head of `model` only, from where it stands; the rest is as in `model`.

        head <- head - lr * grad_head L(model; support),  `steps` times

    head : name of an `nn.Linear`, the last unless given;  options : as for `Learner`
    Raises `InputError` where there is no such layer.

    >>> learner = fine_tune_head(nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 5)), nn.functional.cross_entropy, lr=0.1)
    >>> learner.objective.adapted
    ['model.1.weight', 'model.1.bias']
    """
    name, _ = linear_head(model, head)
    return Learner(model, loss, SGD(lr), steps=steps, adapt=f"{name}.*" if name else "*", derivative="none", **options)


def fine_tune_all(model: nn.Module, loss: Loss, *, lr: float, steps: int = 10, **options: Any) -> Learner:
    """Gradient steps on all parameters of `model`, from where they stand.

        theta <- theta - lr * grad L(theta; support),  `steps` times

    options : as for `Learner`

    >>> import torch
    >>> model = nn.Linear(1, 1, bias=False)                # L = (w x - y)^2, so each step takes w to 0.8 w
    >>> _ = nn.init.constant_(model.weight, 1.0)
    >>> learner = fine_tune_all(model, nn.functional.mse_loss, lr=0.1, steps=2)
    >>> learner.adapt((torch.ones(1, 1), torch.zeros(1, 1))).weight.data
    tensor([[0.6400]])
    """
    return Learner(model, loss, SGD(lr), steps=steps, derivative="none", **options)
