"""MAML++: how to train your MAML (Antoniou, Edwards, Storkey 2019, arXiv 1810.09502)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.errors import InputError
from fewstep.functional import Loss
from fewstep.learner import Learner, last_step
from fewstep.models.layers import OffsetNorm
from fewstep.patterns import adapted_parameters
from fewstep.task import Task
from fewstep.updates import SGD, LearnedRates, Update


class MultiStep:
    """The query losses [B] after each inner step, weighted; all weight goes to the last within `anneal` iterations.

    >>> MultiStep(anneal=100).weights(4, 0), MultiStep(anneal=100).weights(4, 50), MultiStep(anneal=100).weights(4, 100)
    ([0.25, 0.25, 0.25, 0.25], [0.125, 0.125, 0.125, 0.625], [0.0, 0.0, 0.0, 1.0])
    """

    def __init__(self, anneal: int) -> None:
        if not isinstance(anneal, int) or anneal < 0:
            raise InputError(f"the weights need an integer of at least 0 iterations to anneal, but {anneal!r} came")
        self.anneal = anneal

    def weights(self, steps: int, iteration: int) -> list[float]:
        """The weight of each step's loss at an iteration; those of early steps end at 3 % of what they were, then 0."""
        if iteration >= self.anneal:
            return [0.0] * (steps - 1) + [1.0]
        early = max(1 - iteration / self.anneal, 0.03) / steps
        return [early] * (steps - 1) + [1 - (steps - 1) * early]

    def __call__(self, learner: Learner, tasks: Task) -> Tensor:
        if not self.anneal or learner.steps == 0 or learner.counted >= self.anneal:
            return last_step(learner, tasks)
        path = learner.inner_loop(tasks.support, learner.steps)
        next(path)
        losses = [learner.query_loss(theta, step, tasks) for step, theta in enumerate(path, start=1)]
        weights = losses[0].new_tensor(self.weights(learner.steps, learner.counted))
        return weights @ torch.stack(losses)


def maml_pp(model: nn.Module, loss: Loss, *, lr: float, steps: int = 1, multi_step: bool = True, anneal: int = 5000,
            learned_rates: bool = True, step_statistics: bool = True, step_norms: bool = True,
            first_order_until: int = 0, adapt: str | Sequence[str] = "*", per_step: str | Sequence[str] = (),
            **options: Any) -> Learner:  # fmt: skip
    """MAML with six changes that make its training stable. Each can be switched off.

        minimise  sum_i sum_k w_k L_i(theta_k; query)  over theta and all rates alpha_{l,k} of tensor l in step k

    multi_step : w_k goes from 1/steps for each step to the last step only, as in the authors' code: linearly within
        `anneal` training iterations, the early weights held above 0.03/steps until then. Off: the last step only
    learned_rates : a rate for each tensor and step, all `lr` at first (`fewstep.updates.LearnedRates`). Off: SGD
    step_statistics : batch norm has running statistics for each step. Training goes by the batch at hand, so here this
        is normalisation="batch" unless another one is given; to evaluate with them, measure them by
        `fewstep.calibrate` and set `learner.normalisation = "per_step"`. (The authors' code goes by the batch at hand
        in evaluation too.) Off: as the model's layers do by themselves
    step_norms : weights and biases of batch norm layers (PyTorch's and `OffsetNorm`) have a value for each step and do
        not adapt. Off, or without such layers: all adapts
    first_order_until : before this iteration the derivative is first order, `exact_from` of the learner
    The sixth, cosine annealing of the outer rate, is an option of training: `Training(schedule="cosine")`.

    Derivatives: second order. Gradient evaluations per task: 2 steps, and `steps` products; steps + 1 once annealed.
    Memory: the parameters of each step, and while annealing two gradients of each. Meta-learned: the start, the rates,
    the norms of each step, and all other shared parameters. More steps than in training go by the last step's rates
    and norms.

    anneal : the authors have 10 epochs for Omniglot and 15 for Mini-ImageNet, of 500 iterations each
    adapt, per_step : as for `fewstep.Learner`; what `step_norms` says comes on top
    lr, steps, options : as for `maml`

    >>> from fewstep import Task
    >>> model = nn.Linear(1, 1, bias=False)                # L = w^2: 0.8 w after one step, 0.64 w after two
    >>> _ = nn.init.constant_(model.weight, 1.0)
    >>> x, y = torch.ones(1, 1, 1), torch.zeros(1, 1, 1)
    >>> learner = maml_pp(model, nn.functional.mse_loss, lr=0.1, steps=2)
    >>> learner.iteration = 0                              # as `train` and `MetaStep` count
    >>> round(learner(Task(support=(x, y), query=(x, y))).item(), 4)    # (0.64 + 0.4096) / 2
    0.5248
    >>> learner.iteration = 5000
    >>> round(learner(Task(support=(x, y), query=(x, y))).item(), 4)
    0.4096
    """
    outer = MultiStep(anneal) if multi_step else last_step
    patterns = [adapt] if isinstance(adapt, str) else [*adapt]
    own = [per_step] if isinstance(per_step, str) else [*per_step]
    norms = _norms_of(model) if step_norms else []
    patterns += [f"~{name}" for name in norms]
    rule: Update = (
        LearnedRates(adapted_parameters(model, patterns), lr, steps=max(steps, 1)) if learned_rates else SGD(lr)
    )
    if step_statistics:
        options.setdefault("normalisation", "batch")
    return Learner(model, loss, rule, steps=steps, adapt=patterns, per_step=[*own, *norms], outer=outer,
                   exact_from=first_order_until, **options)  # fmt: skip


def _norms_of(model: nn.Module) -> list[str]:
    """The names of the trainable weights and biases of the model's batch norm layers."""
    kinds = (nn.modules.batchnorm._BatchNorm, OffsetNorm)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    own = [(name, *pair) for name, module in layers.items() for pair in module.named_parameters()]
    return [f"{layer}.{name}".removeprefix(".") for layer, name, value in own if value.requires_grad]
