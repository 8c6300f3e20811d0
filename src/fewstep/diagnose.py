"""Where a computation first stopped being finite: the inner step and the layer."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fewstep.checks import check_values
from fewstep.functional import Place, Tensors
from fewstep.learner import Learner
from fewstep.task import Batch, Task, at_step, map_tensors, task_count


def where_not_finite(learner: Learner, tasks: Task) -> str:
    """In words, the first thing that is not finite when `learner` adapts to `tasks` and is judged.

    Looks at the meta-parameters, the tasks, then along the inner steps at the parameters and at each layer's output,
    at last at the meta-gradient. Nothing is compiled for it.
    """
    engine, learner.engine = learner.engine, replace(learner.engine, compile="no")
    try:
        return _first_not_finite(learner, tasks)
    finally:
        learner.engine = engine


def _first_not_finite(learner: Learner, tasks: Task) -> str:
    for name, value in learner.named_parameters():
        if not torch.isfinite(value).all():
            return f"the meta-parameter '{name}' is not finite"
    check_values(tasks)
    if isinstance(learner, Learner):  # others, such as metric learners, have no inner loop to look along
        found = _along_the_inner_loop(learner, tasks)
        if found is not None:
            return found
    trained = {name: value for name, value in learner.named_parameters() if value.requires_grad}
    if isinstance(learner, Learner) and learner.iteration is None:
        learner.iteration = 0  # it happened in a first step
    losses = learner(tasks)
    if not torch.isfinite(losses).all():
        return f"the loss of task {int((~torch.isfinite(losses)).nonzero()[0])} is not finite"
    gradients = torch.autograd.grad(losses.mean(), list(trained.values()), allow_unused=True)
    for name, gradient in zip(trained, gradients, strict=True):
        if gradient is not None and not torch.isfinite(gradient).all():
            return f"the meta-gradient of '{name}' is not finite"
    return "the loss is not finite"


def _along_the_inner_loop(learner: Learner, tasks: Task) -> str | None:
    with torch.no_grad():
        for step, theta in enumerate(learner.inner_loop(tasks.support, learner.steps)):
            for name, own in theta.items():
                if not torch.isfinite(own).all():
                    return f"after inner step {step} the adapted '{name.removeprefix('model.')}' is not finite"
            for part, batch in tasks._asdict().items():
                place = Place(step, query=part == "query")
                own = at_step(batch, step, learner.stream and not place.query, axis=1)
                layer = _layer_not_finite(learner, theta, own, place)
                if layer is not None:
                    return f"after inner step {step} {layer} is not finite on the {part} set"
    return None


def _layer_not_finite(learner: Learner, theta: Tensors, batch: Batch, place: Place) -> str | None:
    """The first layer whose output is not finite on any task's batch."""
    found: list[str] = []
    shared = learner.objective.shared_at(place)

    def look(name: str, module: nn.Module, args: Any, output: Any) -> None:
        if not found and any(not torch.isfinite(t).all() for t in tree_leaves(output) if isinstance(t, Tensor)):
            found.append(f"the output of layer '{name}' ({type(module).__name__})")

    leaves = [(name, module) for name, module in learner.model.named_modules() if not list(module.children())]
    hooks = [module.register_forward_hook(partial(look, name)) for name, module in leaves]
    try:
        for task in range(task_count(batch)):
            own = {**shared, **learner.of_task(theta, task)}
            loss = learner.objective(own, map_tensors(itemgetter(task), batch), query=place.query)
            if not found and not torch.isfinite(loss):
                found.append("the loss")
            if found:
                return f"{found[0]} for task {task}"
    finally:
        for hook in hooks:
            hook.remove()
    return None
