"""The exact curvature of a policy's divergence after adaptation: what TRPO's steps go by.

At the old policy it is  mean_k J_k^T F_k J_k,  J_k = d theta'_k / d (all that is trained): F_k v needs first
derivatives of the policy only, J v is the forward mode of the inner loop and J^T v its backward mode.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, jvp, vjp, vmap

from fewstep.errors import InputError
from fewstep.functional import Tensors
from fewstep.learner import Learner, last
from fewstep.rl.divergence import parameters_of
from fewstep.rl.experience import Experience
from fewstep.task import Task

Vectors = list[Tensor]


class Curvature:
    """v -> mean_k J_k^T F_k J_k v, the second derivative at theta of the mean KL(pi_old,k || pi_theta'_k).

    It holds where pi_old,k is pi_theta'_k, as right after exploring. v like the learner's parameters.
    theta : theta'_k, after all that was lived through
    stride : F is taken from each `stride`-th step lived through after adaptation;  inner_stride : and J, in the same
        way, from what was lived through before
    """

    def __init__(self, learner: Learner, parameters: Sequence[Tensor], experience: Task, theta: Tensors,
                 stride: int, inner_stride: int) -> None:  # fmt: skip
        self.learner, self.parameters = learner, parameters
        self.support = thinned(experience.support, inner_stride)
        self.query = thinned(experience.query, stride)
        taken = self.query.mask.to(self.query.outputs.dtype)
        self.weights = taken / taken.sum((1, 2), keepdim=True).clamp_min(1)
        self.reached = self._of_model(theta if inner_stride == 1 else adapted(learner, self.support))
        self.theta = {name: value.detach() for name, value in self._of_model(theta).items()}

    def __call__(self, v: Vectors) -> Vectors:
        return self._backward(self._fisher(self._forward(v)))

    def _of_model(self, theta: Tensors) -> Tensors:
        """What the policy goes by in each task [K, ...], what does not adapt included."""
        return parameters_of(self.learner, theta, self.learner.steps, len(self.weights))

    def _forward(self, v: Vectors) -> Tensors:
        """J v."""
        with forward_ad.dual_level(), torch.no_grad():
            dual = {
                id(p): forward_ad.make_dual(torch.zeros_like(p), part)  # type: ignore[no-untyped-call]
                for p, part in zip(self.parameters, v, strict=True)
            }
            with _shifted(self.learner, dual):
                reached = self._of_model(adapted(self.learner, self.support))
                moved = [(name, forward_ad.unpack_dual(value)) for name, value in reached.items()]  # type: ignore[no-untyped-call]
        zero = torch.zeros_like
        return {name: zero(self.theta[name]) if dual.tangent is None else dual.tangent for name, dual in moved}

    def _fisher(self, tangent: Tensors) -> Tensors:
        """F_k v_k of each task, over its experience."""
        policy: Any = self.learner.model

        def one(theta: Tensors, tangent: Tensors, seen: Tensor, outputs: Tensor, weights: Tensor) -> Tensors:
            def forward(own: Tensors) -> Tensor:
                result: Tensor = functional_call(policy, own, (seen,))
                return result

            moved = jvp(forward, (theta,), (tangent,))[1]
            back: Any = vjp(forward, theta)[1]
            product: Tensors = back(policy.fisher(outputs, moved) * weights[..., None])[0]
            return product

        query = self.query
        found: Tensors = vmap(one)(self.theta, tangent, query.observations, query.outputs, self.weights)
        return found

    def _backward(self, u: Tensors) -> Vectors:
        """mean_k J_k^T u_k."""
        names = [name for name, value in self.reached.items() if value.requires_grad]
        grads = torch.autograd.grad(
            [self.reached[name] for name in names], self.parameters, [u[name] / len(self.weights) for name in names],
            retain_graph=True, allow_unused=True, materialize_grads=True,
        )  # fmt: skip
        return list(grads)


def adapted(learner: Learner, support: Experience) -> Tensors:
    """theta' [K, ...], after the inner steps in training."""
    theta = last(learner.inner_loop(support, learner.steps))
    if learner.objective.is_stacked(theta):
        return theta
    return {name: value.expand(len(support.mask), *value.shape) for name, value in theta.items()}


def thinned(experience: Experience, stride: int) -> Experience:
    """Each `stride`-th step lived through, as one trajectory [..., 1, n, ...].

    Steps are counted across the trajectories at each moment, so that every trajectory and every moment keeps its share:
    with whole trajectories left out, the curvature misleads.
    """
    if stride == 1:
        return experience
    axis = experience.mask.dim() - 2  # of the trajectories
    *steps, returns = experience
    rows = [part.transpose(axis, axis + 1).flatten(axis, axis + 1) for part in steps]
    kept = [part[(slice(None),) * axis + (slice(None, None, stride),)].unsqueeze(axis) for part in rows]
    return Experience._make([*kept, returns])


def check_curvature(learner: Learner) -> None:
    """Raise `InputError` where the curvature cannot be known here."""
    if learner.derivative == "finite_difference":
        raise InputError(
            "TRPO's curvature is exact, and the derivative 'finite_difference' is not; take another, or Adam "
            "(`Ascent`; --outer ppo or adam on the command line)"
        )
    if learner.engine.product == "forward":
        raise InputError(
            "TRPO's curvature is in forward mode, which does not nest: leave the engine's product 'reverse'"
        )
    known = {id(value) for value in (*learner.objective.module.parameters(), *learner.objective.per_step.values())}
    known |= {id(value) for *_, value in _of_rule(learner)}
    others = [name for name, value in learner.named_parameters() if value.requires_grad and id(value) not in known]
    if others:
        raise InputError(
            f"TRPO knows the curvature of the policy and of the update rule, but {', '.join(others[:3])} is trained, "
            "too; take Adam (`Ascent`; --outer ppo or adam on the command line)"
        )


def _of_rule(learner: Learner) -> list[tuple[dict[str, Any], str, nn.Parameter]]:
    """The update rule's own parameters, each with the dict that holds it and its name there."""
    parts = learner.update.modules() if isinstance(learner.update, nn.Module) else ()
    holders: list[dict[str, Any]] = [vars(part)["_parameters"] for part in parts]
    return [(holder, name, value) for holder in holders for name, value in holder.items() if value is not None]


@contextmanager
def _shifted(learner: Learner, by: Mapping[int, Tensor]) -> Iterator[None]:
    """Inside, these tensors are added to the learner's parameters of these identities."""
    own = [(holder, name, value) for holder, name, value in _of_rule(learner) if id(value) in by]
    try:
        for holder, name, value in own:
            holder[name] = value + by[id(value)]
        with learner.objective.shifted(by):
            yield
    finally:
        for holder, name, value in own:
            holder[name] = value
