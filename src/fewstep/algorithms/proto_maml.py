"""ProtoMAML (Triantafillou et al. 2020, "Meta-Dataset", arXiv 1903.03096, section 3 "Proto-MAML")."""

from __future__ import annotations

from typing import Any

from torch import nn

from fewstep.functional import Loss
from fewstep.learner import Learner
from fewstep.starts import Prototypes
from fewstep.updates import SGD


def proto_maml(model: nn.Module, loss: Loss, *, lr: float, steps: int = 1, head: str | None = None,
               **options: Any) -> Learner:  # fmt: skip
    """MAML whose head starts, in each task, as the classifier by nearest class mean.

        c_k = mean of f(x) over the support examples of class k,   w_k = 2 c_k,  b_k = -|c_k|^2
        w_k f(x) + b_k = -|f(x) - c_k|^2 + |f(x)|^2,   so that 0 steps answer as a prototypical network

    From there head and body adapt. The meta-gradient goes through the prototypes. A task may have any number of ways,
    in training and after it; the tasks of a batch share it. The head's own values are used by nothing, and get a
    gradient of 0.

    Derivatives: second order, by Hessian-vector products. Gradient evaluations per task: steps + 1, and `steps`
    products; one forward pass for the prototypes, and its gradient. Memory: the parameters of each step. Meta-learned:
    the body.

    lr, steps : alpha and the inner steps in training
    head : name of the linear layer that starts from prototypes, the last one unless given; it needs a bias
    options : as for `fewstep.Learner`

    `InputError` where the head is not linear, has no bias or does not adapt, and where a task comes without an example
    of each class or its labels are not integers 0..ways-1.

    >>> import torch
    >>> from fewstep import Task
    >>> learner = proto_maml(nn.Sequential(nn.Identity(), nn.Linear(1, 5)), nn.functional.cross_entropy, lr=0.1)
    >>> x, y = torch.tensor([[0.0], [2.0], [5.0]]), torch.tensor([0, 0, 1])      # class means 1 and 5
    >>> learner.adapt((x, y), steps=0)(torch.tensor([[2.0]]))                    # 2 c f - c^2
    tensor([[ 3., -5.]], grad_fn=<AddmmBackward0>)
    """
    return Learner(model, loss, SGD(lr), steps=steps, start=Prototypes(model, head), **options)
