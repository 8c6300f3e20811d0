"""The model of one task after adaptation, as a plain module."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from fewstep.errors import DivergenceError
from fewstep.functional import Objective, Tensors
from fewstep.normalisation import Settled, Statistics, observed
from fewstep.task import Batch


def model_with(objective: Objective, values: Tensors, support: Batch) -> nn.Module:
    """A copy of the objective's model that has `values` in place of its own tensors "model.NAME".

    What is not among them is shared with the model. Where a policy says how norm layers normalise, the copy keeps to
    it: it goes by the statistics of `support`, or by averages, as they are now.
    Raises `DivergenceError` at a value that is not finite.
    """
    for name, value in values.items():
        if not torch.isfinite(value).all():
            raise DivergenceError(
                f"'{name.removeprefix('model.')}' is not finite after adaptation; lower the inner learning rate"
            )
    own = {f"model.{name}": value for name, value in objective.model.named_parameters()}
    kept: dict[int, Tensor] = {id(value): value for name, value in own.items() if name not in values}
    # What a forward pass has left in a module may be part of a graph, which cannot be copied.
    left = [value for module in objective.model.modules() for value in vars(module).values()]
    kept |= {id(value): value for value in left if isinstance(value, Tensor)}
    adapted = copy.deepcopy(objective.model, memo=kept)  # a frozen base is not copied
    for name, parameter in adapted.named_parameters():
        if f"model.{name}" in values:
            parameter.data = values[f"model.{name}"].detach().clone()
    for module in adapted.modules():
        if isinstance(module, nn.Linear):  # a head may have another number of outputs now
            module.out_features = len(module.weight)
    if (policy := objective.normalisation) is None:
        return adapted
    statistics = Statistics()
    if policy == "support":
        with torch.no_grad(), observed() as found:
            objective(values, support, query=False)
        statistics.set(found)
        policy = "running"
    elif known := [values[f"statistics.{name}"] for name in objective.module.statistics.names(policy)]:
        statistics.set([*zip(known[::2], known[1::2], strict=True)])
    return Settled(adapted, policy, statistics)
