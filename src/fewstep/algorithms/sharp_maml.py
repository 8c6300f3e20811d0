"""Sharp-MAML (Abbas, Xiao, Chen, Chen, Chen 2022, arXiv 2206.03996, Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fewstep.errors import InputError
from fewstep.functional import Loss
from fewstep.learner import Learner, last_step
from fewstep.task import Task
from fewstep.updates import SGD, Sharp
from fewstep.updates.common import positive

Where = Literal["both", "inner", "outer"]


def sharp_maml(model: nn.Module, loss: Loss, *, lr: float, steps: int = 1, where: Where = "both",
               inner_radius: float = 0.05, outer_radius: float = 0.05, ascent: Literal["exact", "none"] = "exact",
               **options: Any) -> Learner:  # fmt: skip
    """MAML that looks for flat minima: gradients are taken at the worst point nearby, in either loop or in both.

        inner: theta_i' = theta - alpha * grad L_i(theta + rho_in g_i / |g_i|; support),   g_i = grad L_i(theta)
        outer: the meta-gradient at  theta + rho_out g / |g|,   g = the mean meta-gradient of these tasks at theta

    where="both" is the paper's Sharp-MAML_both, "inner" its _low, "outer" its _up. The inner derivative is exact,
    through g_i / |g_i| as well; the outer shift counts as a constant, as in SAM (Foret et al. 2021, arXiv 2010.01412).
    It is made of all parameters of model and loss, shared ones too, and not of those of the update rule. It is that of
    the tasks of one call: several calls whose gradients add up, or several processes, each have their own.

    The value of `learner(tasks)` is the loss at the shifted point. `path` and `adapt` know no outer shift.

    Derivatives: second order, by Hessian-vector products. Per task, "inner" takes 2 steps + 1 gradients and 2 steps
    products; "outer" is MAML twice, and "both" is "inner" twice. With ascent="none" the first of the two is first
    order: no products. Memory: the parameters of each step, and one more set for the shift.

    lr, steps : alpha and the inner steps in training
    where : which loop looks around
    inner_radius, outer_radius : rho, above 0; SAM's 0.05 unless given. The paper searches them
    ascent : the derivative that goes into g
    options : as for `fewstep.Learner`

    >>> from fewstep import Task
    >>> model = nn.Linear(1, 1, bias=False)                # L = w^2
    >>> _ = nn.init.constant_(model.weight, 1.0)
    >>> x, y = torch.ones(1, 1, 1), torch.zeros(1, 1, 1)
    >>> tasks = Task(support=(x, y), query=(x, y))
    >>> for where in ("inner", "outer"):                   # (1 - 0.2 * 1.5)^2, and (0.8 * 1.5)^2
    ...     learner = sharp_maml(model, nn.functional.mse_loss, lr=0.1, where=where, inner_radius=0.5, outer_radius=0.5)
    ...     print(round(learner(tasks).item(), 4))
    0.49
    1.44
    """
    if where not in get_args(Where):
        raise InputError(f"where must be one of {get_args(Where)}, but {where!r} came")
    rule = SGD(lr) if where == "outer" else Sharp(SGD(lr), inner_radius)
    outer = last_step if where == "inner" else Sharpness(outer_radius, ascent)
    return Learner(model, loss, rule, steps=steps, outer=outer, **options)


@dataclass(frozen=True)
class Sharpness:
    """The outer objective L(theta + rho g / |g|) [B], with g = grad of the mean of L(theta) over these tasks.

    radius : rho, above 0
    ascent : "exact", or "none" where g is to be first order
    """

    radius: float
    ascent: Literal["exact", "none"] = "exact"

    def __post_init__(self) -> None:
        positive(self.radius, "the outer radius")
        if self.ascent not in ("exact", "none"):
            raise InputError(f"ascent must be 'exact' or 'none', but {self.ascent!r} came")

    def __call__(self, learner: Learner, tasks: Task) -> Tensor:
        objective = learner.objective
        own = objective.parameters([*objective.adapted, *objective.shared])
        with objective.shifted(self._shifts(learner, tasks, [value for value in own if value.requires_grad])):
            return last_step(learner, tasks)

    def _shifts(self, learner: Learner, tasks: Task, parameters: list[Tensor]) -> dict[int, Tensor]:
        """rho g / |g| by the identity of the parameter; 0 where g is."""
        derivative = learner.derivative
        learner.derivative = "none" if self.ascent == "none" else derivative
        try:
            with torch.enable_grad():
                loss = last_step(learner, tasks).mean()
            gradient = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
        finally:
            learner.derivative = derivative
        norm = torch.stack([value.norm() for value in gradient]).norm()
        scale = torch.where(norm > 0, self.radius / norm, 0.0)
        return {id(value): scale * part for value, part in zip(parameters, gradient, strict=True)}
