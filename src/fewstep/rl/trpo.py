"""Trust region policy optimisation of the meta-parameters (Schulman et al. 2015; Finn et al. 2017, Algorithm 3).

minimise  mean_k L_k(theta'_k(theta))  where  mean_k KL(pi_old,k || pi_theta'_k) <= delta,  theta'_k after adaptation

theta is all that is trained: the policy's parameters, and the update rule's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd, inf

import torch
from torch import Tensor

from fewstep.distributed import averaged
from fewstep.engine import dot
from fewstep.errors import DivergenceError, InputError
from fewstep.functional import Tensors
from fewstep.learner import Learner, last_step
from fewstep.rl.curvature import Curvature, Vectors, adapted, check_curvature
from fewstep.rl.divergence import divergence
from fewstep.rl.explorer import Explorer
from fewstep.rl.surrogates import dice
from fewstep.task import Task

SHRINK, TRIES = 0.8, 15  # of the line search


@dataclass(frozen=True, kw_only=True)
class TrustRegion:
    """How far a step goes, and how its direction is found.

    delta : the most that the mean KL divergence may be
    iterations : of conjugate gradient;  damping : added to the curvature's diagonal
    stride : the divergence's curvature F is taken from each `stride`-th step lived through after adaptation, of every
        trajectory; 1 takes all
    inner_stride : the inner steps' Jacobian J, in the same way, from what was lived through before; 1 is exact, and
        what the inner loss `dice` needs
    """

    delta: float = 0.01
    iterations: int = 10
    damping: float = 1e-5
    stride: int = 1
    inner_stride: int = 1

    def __post_init__(self) -> None:
        counts = (self.iterations, self.stride, self.inner_stride)
        if not (0 < self.delta < inf and 0 <= self.damping < inf) or min(counts) < 1:
            raise InputError(
                f"delta must be above 0, damping at least 0, both finite, the counts at least 1, but {self} came"
            )


class TRPO:
    """`loss = step(tasks)`: explore, then move the learner's parameters.

    The loss [] is minus the mean return after adaptation, as it was before the step. The learning rate that training
    hands on is of no use: the trust region says how far to go. A step that finds no lower loss within it, in 15 tries
    of 0.8 times the length each, moves nothing.
    accepted : whether the last step moved;  divergence : its KL divergence, 0 where it did not;  tries : it took
    """

    def __init__(self, explorer: Explorer, region: TrustRegion | None = None) -> None:
        self.explorer, self.region = explorer, region or TrustRegion()
        check_curvature(explorer.learner)
        strides = (self.region.stride, self.region.inner_stride)
        if explorer.policy.remembers and max(strides) > 1:
            raise InputError("a policy that remembers would remember another past: stride=1 and inner_stride=1")
        if explorer.learner.inner_loss is dice and self.region.inner_stride > 1:
            raise InputError("the surrogate dice needs whole trajectories: inner_stride=1 (--inner-stride 1)")
        for stride in strides:
            if gcd(stride, explorer.trajectories) > 1:
                raise InputError(
                    f"with {explorer.trajectories} trajectories a stride of {stride} would leave some out altogether; "
                    "choose numbers without a common divisor"
                )
        self.parameters = [value for value in explorer.learner.parameters() if value.requires_grad]
        self.accepted, self.divergence, self.tries = False, 0.0, 0

    @property
    def about(self) -> dict[str, float]:
        """What training writes down of each iteration, beside the loss."""
        return {"divergence": self.divergence, "tries": self.tries, **self.explorer.about}

    def __call__(self, tasks: Task, lr: float = 0.0) -> Tensor:
        learner, region = self.explorer.learner, self.region
        tasks, walk = self.explorer.lived(tasks)
        experience = self.explorer.task_of(walk)
        with learner.checked(experience):
            theta = adapted(learner, experience.support)
            loss = _loss_at(theta, learner, experience)
        own = torch.autograd.grad(loss, self.parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        loss, *gradient = averaged([loss.detach(), *own], tasks.size)
        curvature = Curvature(learner, self.parameters, experience, theta, region.stride, region.inner_stride)

        def damped(v: Vectors) -> Vectors:
            product = averaged(curvature(v), tasks.size)
            return [a + region.damping * b for a, b in zip(product, v, strict=True)]

        direction, left = conjugate_gradient(damped, gradient, region.iterations)
        squared = dot(direction, gradient) - dot(direction, left)  # d' (C + damping) d
        size = (2 * region.delta / squared.clamp_min(1e-30)).sqrt()
        if not torch.stack([loss, size]).isfinite().all():
            raise DivergenceError(
                "the loss, its gradient or the curvature is not finite; lower the inner rate or delta"
            )
        self._search([size * part for part in direction], loss, experience)
        return averaged([-walk[-1].returns.mean()], tasks.size)[0]

    @torch.no_grad()
    def _search(self, step: Vectors, loss: Tensor, experience: Task) -> None:
        """Go along the step as far as the loss falls and the divergence allows."""
        start = [value.clone() for value in self.parameters]
        for attempt in range(TRIES):
            for value, before, part in zip(self.parameters, start, step, strict=True):
                value.copy_(before - SHRINK**attempt * part)
            now, divergence = averaged(loss_and_divergence(self.explorer.learner, experience), experience.size)
            self.tries = attempt + 1
            self.accepted = bool(now < loss) and bool(divergence <= self.region.delta)
            if self.accepted:
                self.divergence = float(divergence)
                return
        self.divergence = 0.0
        for value, before in zip(self.parameters, start, strict=True):
            value.copy_(before)


def loss_and_divergence(learner: Learner, experience: Task) -> tuple[Tensor, Tensor]:
    """The mean over the tasks of the outer loss, and of KL(pi_old || pi_theta') on what was lived through after."""
    theta = adapted(learner, experience.support)
    away = divergence(learner, theta, learner.steps, experience.query)
    return _loss_at(theta, learner, experience), away.mean()


def _loss_at(theta: Tensors, learner: Learner, experience: Task) -> Tensor:
    """The mean outer loss, where the inner loop ended at theta."""
    once = learner.outer is last_step  # others look at the steps between
    return (learner.query_loss(theta, learner.steps, experience) if once else learner(experience)).mean()


def conjugate_gradient(product: Callable[[Vectors], Vectors], g: Vectors, iterations: int) -> tuple[Vectors, Vectors]:
    """v with product(v) = g, about, for a symmetric positive product; and what is left, g - product(v).

    >>> conjugate_gradient(lambda v: [2 * v[0]], [torch.tensor([4.0, 6.0])], iterations=1)
    ([tensor([2., 3.])], [tensor([0., 0.])])
    """
    v, r, p = [torch.zeros_like(part) for part in g], list(g), list(g)
    squared = dot(r, r)
    for _ in range(iterations):
        if squared <= 1e-20:
            break
        moved = product(p)
        step = squared / dot(p, moved)
        v = [a + step * b for a, b in zip(v, p, strict=True)]
        r = [a - step * b for a, b in zip(r, moved, strict=True)]
        before, squared = squared, dot(r, r)
        p = [a + squared / before * b for a, b in zip(r, p, strict=True)]
    return v, r
