"""L2F: each task first forgets a part of the common start."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fewstep.functional import Tensors
from fewstep.updates.common import Rule, along, check_names, check_parameters, evaluations, means, two_layers
from fewstep.updates.wrapper import Wrapper


class Forget(Wrapper):
    """theta_0 = gamma * theta, then the steps of `rule`; gamma = sigmoid(MLP(mean gradient of each tensor))

    L2F, "Learning to Forget for Meta-Learning" (Baik et al. 2020, arXiv 1906.05859): gamma is one number in (0, 1) for
    each task and each of L named tensors. The network has two layers of L units, and is meta-learned. It starts as
    gamma = sigmoid(4) = 0.982 for any gradient, so that at first little is forgotten and sigmoid still has a slope.

    Step 0 takes one more gradient than the rule inside. The state is that of the rule, in a tuple.

    rule : any update rule
    parameters : those that adapt, named as in theta: "model.NAME". Only their names, dtype and device matter

    `InputError` where theta has other names.

    >>> import torch
    >>> from fewstep.updates import SGD
    >>> one = {"model.w": torch.ones(1, 1)}
    >>> rule = Forget(SGD(0.1), one)
    >>> theta, state = rule(one, one, None, 0)                 # sigmoid(4)
    >>> round(theta["model.w"].item(), 4), round(rule(theta, one, state, 0)[0]["model.w"].item(), 4)
    (0.982, 0.882)
    """

    def __init__(self, rule: Rule, parameters: Mapping[str, Tensor]) -> None:
        super().__init__(rule)
        check_parameters(parameters)
        self.names = tuple(parameters)
        count = len(self.names)
        self.network = two_layers(count, count, 4.0, next(iter(parameters.values())))

    def evaluations(self, step: int) -> int:
        """How many gradients this step takes: one to forget by, before the first step of the rule inside."""
        return evaluations(self.rule, step) + (step == 0)

    def forward(self, theta: Tensors, gradient: Tensors, state: Any, step: int) -> tuple[Tensors, Any]:
        """Forget, or the step of the rule inside."""
        if state is not None:
            theta, inner = self.rule(theta, gradient, state[0], step)
            return theta, (inner,)
        check_names(self.names, theta, every=True)
        gamma = self.network(means(gradient, self.names)).sigmoid()
        kept = dict(zip(self.names, gamma.unbind(1), strict=True))
        return {name: value * along(kept[name], gradient[name]) for name, value in theta.items()}, (None,)
