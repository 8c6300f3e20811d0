"""UNICORN-MAML (Ye & Chao 2022, "How to train your MAML to excel in few-shot classification", arXiv 2106.16245)."""

from __future__ import annotations

from typing import Any

from torch import nn

from fewstep.functional import Loss
from fewstep.learner import Learner
from fewstep.starts import SharedVector
from fewstep.updates import SGD


def unicorn_maml(model: nn.Module, loss: Loss, *, lr: float, steps: int = 1, head: str | None = None,
                 **options: Any) -> Learner:  # fmt: skip
    """MAML whose head starts with one vector for all classes: which class is called 0 makes no difference.

        w_k = w,  b_k = b  for every class k;   w and b are the means of the rows of the model's head

    The labels of a task are drawn at random, and a plain head has a row for each: permuting them changes the accuracy
    of MAML by many points (section 4 of the paper). Here a permutation of the labels permutes the predictions. A task
    may have any number of ways; the tasks of a batch share it. With 0 steps all classes are answered alike.

    Derivatives: second order, by Hessian-vector products. Gradient evaluations per task: steps + 1, and `steps`
    products. Memory: the parameters of each step. Meta-learned: the body, and w and b by way of their N rows, each of
    which gets 1/N of the gradient. Under the cross-entropy the softmax cancels what all rows have in common, so that w
    and b have neither effect nor gradient, and a head of zeros is the same. The paper starts from a pre-trained body,
    and takes 5 to 20 inner steps. The first step moves nothing but the head, since all its rows are alike; with a
    single one, `adapt` the head alone is the same for less than half of the work.

    lr, steps : alpha and the inner steps in training
    head : name of the linear layer with the common vector, the last one unless given
    options : as for `fewstep.Learner`

    `InputError` where the head is not linear or does not adapt, and where a task comes without an example of each class
    or its labels are not integers 0..ways-1.

    >>> import torch
    >>> learner = unicorn_maml(nn.Sequential(nn.Linear(2, 3)), nn.functional.cross_entropy, lr=0.1)
    >>> x, y = torch.eye(2), torch.tensor([0, 1])
    >>> one, other = learner.adapt((x, y), steps=3)(x), learner.adapt((x, 1 - y), steps=3)(x)
    >>> one.shape, bool(torch.allclose(one, other.flip(1)))
    (torch.Size([2, 2]), True)
    """
    return Learner(model, loss, SGD(lr), steps=steps, start=SharedVector(model, head), **options)
