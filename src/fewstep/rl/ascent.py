"""Adam along the meta-gradient of what was explored: a vanilla policy gradient, or proximal policy optimisation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fewstep.distributed import averaged
from fewstep.errors import InputError
from fewstep.rl.explorer import Explorer
from fewstep.task import Task


@dataclass(frozen=True)
class Ascent:
    """`loss = step(tasks, lr)`: explore, then take `epochs` steps of `adam` on what was lived through.

    adam : `adam(experience, lr)` takes one step, a `fewstep.MetaStep`
    epochs : 1 with `likelihood_ratio` is the policy gradient; several with `Clipped` outside and `likelihood_ratio`
        inside are ProMP's (Rothfuss et al. 2019, Algorithm 1), whose penalty is the outer objective `ProximalPenalty`
    The loss [] is minus the mean return after adaptation, as it was before the steps.
    """

    explorer: Explorer
    adam: Callable[[Task, float], Tensor]
    epochs: int = 1

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise InputError(f"there must be at least 1 epoch, but {self.epochs} came")

    @property
    def about(self) -> dict[str, float]:
        """What training writes down of each iteration, beside the loss."""
        return self.explorer.about

    def __call__(self, tasks: Task, lr: float) -> Tensor:
        tasks, walk = self.explorer.lived(tasks)
        experience = self.explorer.task_of(walk)
        learner = self.explorer.learner
        number = learner.iteration
        for _ in range(self.epochs):
            learner.iteration = number  # all of them together are one
            self.adam(experience, lr)
        return averaged([-walk[-1].returns.mean()], tasks.size)[0]
