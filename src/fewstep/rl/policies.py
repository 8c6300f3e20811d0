"""Policies: modules from observations to the parameters of a distribution of actions, and what follows from these."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from fewstep.errors import InputError
from fewstep.functional import Tensors
from fewstep.models import mlp
from fewstep.rl.environments.base import Environment
from fewstep.rl.stacked import runs_as_written, stacked

# `outputs [K, M, p], state = act(observations [K, M, o], state)`; there is no state before the first step.
Acting = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


class Policy(nn.Module):
    """`outputs [..., p] = policy(observations [..., o])` are the parameters of a distribution for each observation."""

    observations: int
    actions: int | None = None
    """Numbers in an action, or of how many it is one; None where the policy does not say."""
    remembers: ClassVar[bool] = False
    """Whether its outputs depend on what was observed before, in order."""

    def acting(self, theta: Tensors) -> Acting:
        """The policy step by step, with parameters of their own for each task [K, ...], by name."""
        batched = vmap(lambda own, seen: functional_call(self, own, (seen,)))
        return lambda seen, state: (batched(theta, seen), None)

    @abstractmethod
    def noise(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        """What chance decides about actions [*shape], drawn in advance."""

    @abstractmethod
    def act(self, outputs: Tensor, noise: Tensor) -> Tensor:
        """The actions that the noise makes of the outputs."""

    @abstractmethod
    def log_prob(self, outputs: Tensor, actions: Tensor) -> Tensor:
        """log pi(action | observation) [...]."""

    @abstractmethod
    def kl(self, old: Tensor, new: Tensor) -> Tensor:
        """KL(old || new) [...] of the distributions with these outputs."""

    @abstractmethod
    def fisher(self, outputs: Tensor, tangent: Tensor) -> Tensor:
        """The second derivative of `kl` by `new`, where both are `outputs`, times a tangent: [..., p]."""


class GaussianPolicy(Policy):
    """Independent normal distributions: the mean is a network's, log standard deviations are parameters.

    The paper's is 100-100 ReLU with Xavier's initialisation and deviations of 1, and all of it adapts.
    outputs : mean and log standard deviation [..., 2 actions]
    std : at the start;  least : no deviation is below

    >>> policy = GaussianPolicy(observations=2, actions=1)
    >>> outputs = torch.tensor([[0.0, 0.0]])                                   # mean 0, deviation 1
    >>> policy.log_prob(outputs, torch.tensor([[1.0]])).exp()                  # exp(-1/2) / sqrt(2 pi)
    tensor([0.2420])
    >>> policy.kl(outputs, torch.tensor([[1.0, 0.0]]))                         # half the squared distance
    tensor([0.5000])
    """

    actions: int

    def __init__(self, observations: int, actions: int, hidden: Sequence[int] = (100, 100), *, std: float = 1.0,
                 least: float = 1e-6) -> None:  # fmt: skip
        super().__init__()
        if not 0 < least <= std:
            raise InputError(f"std must be at least `least`, and that above 0, but {std} and {least} came")
        self.observations, self.actions, self.least = observations, actions, math.log(least)
        self.mean = mlp(observations, actions, hidden, init="xavier")
        self.log_std = nn.Parameter(torch.full((actions,), math.log(std)))

    def forward(self, observations: Tensor) -> Tensor:
        rows = observations.reshape(-1, observations.shape[-1])
        mean = self.mean(rows).reshape(*observations.shape[:-1], self.actions)
        return torch.cat([mean, self.log_std.clamp_min(self.least).expand_as(mean)], -1)

    def acting(self, theta: Tensors) -> Acting:
        std = theta.get("log_std")
        fits = std is not None and std.shape[1:] == (self.actions,)
        known = fits and type(self) is GaussianPolicy and runs_as_written(self)
        own = {name.removeprefix("mean."): value for name, value in theta.items()}
        mean = stacked(self.mean, own) if known else None
        if mean is None or std is None:
            return super().acting(theta)
        log_std = std.clamp_min(self.least).unsqueeze(1)

        def act(seen: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor | None]:
            rows = mean(seen)
            return torch.cat([rows, log_std.expand_as(rows)], -1), state

        return act

    def noise(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        return torch.randn(*shape, self.actions, generator=generator, device=generator.device)

    def act(self, outputs: Tensor, noise: Tensor) -> Tensor:
        mean, log_std = outputs.chunk(2, -1)
        return mean + log_std.exp() * noise

    def log_prob(self, outputs: Tensor, actions: Tensor) -> Tensor:
        mean, log_std = outputs.chunk(2, -1)
        away = (actions - mean) * (-log_std).exp()
        return -(0.5 * away.square() + log_std + 0.5 * math.log(2 * math.pi)).sum(-1)

    def kl(self, old: Tensor, new: Tensor) -> Tensor:
        (mean, log_std), (new_mean, new_log_std) = old.chunk(2, -1), new.chunk(2, -1)
        spread = ((2 * log_std).exp() + (mean - new_mean).square()) * (-2 * new_log_std).exp()
        return (new_log_std - log_std + 0.5 * (spread - 1)).sum(-1)

    def fisher(self, outputs: Tensor, tangent: Tensor) -> Tensor:
        (_, log_std), (mean, of_log_std) = outputs.chunk(2, -1), tangent.chunk(2, -1)
        return torch.cat([mean * (-2 * log_std).exp(), 2 * of_log_std], -1)


class CategoricalPolicy(Policy):
    """One of some actions, by a softmax of a network's outputs. outputs : logits [..., actions]

    >>> policy = CategoricalPolicy(observations=1, actions=2)
    >>> policy.log_prob(torch.tensor([[0.0, 0.0]]), torch.tensor([1])).exp()
    tensor([0.5000])
    """

    actions: int

    def __init__(self, observations: int, actions: int, hidden: Sequence[int] = (100, 100)) -> None:
        super().__init__()
        self.observations, self.actions = observations, actions
        self.logits = mlp(observations, actions, hidden, init="xavier")

    def forward(self, observations: Tensor) -> Tensor:
        rows = observations.reshape(-1, observations.shape[-1])
        logits: Tensor = self.logits(rows).reshape(*observations.shape[:-1], self.actions)
        return logits

    def noise(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        uniform = torch.rand(*shape, self.actions, generator=generator, device=generator.device)
        return -(-uniform.clamp_min(1e-20).log()).log()  # Gumbel's distribution

    def act(self, outputs: Tensor, noise: Tensor) -> Tensor:
        return (outputs + noise).argmax(-1)

    def log_prob(self, outputs: Tensor, actions: Tensor) -> Tensor:
        return outputs.log_softmax(-1).gather(-1, actions.unsqueeze(-1)).squeeze(-1)

    def kl(self, old: Tensor, new: Tensor) -> Tensor:
        before = old.log_softmax(-1)
        return (before.exp() * (before - new.log_softmax(-1))).sum(-1)

    def fisher(self, outputs: Tensor, tangent: Tensor) -> Tensor:
        p = outputs.softmax(-1)
        return p * (tangent - (p * tangent).sum(-1, keepdim=True))


def policy_of(world: Environment, inputs: int | None = None, hidden: Sequence[int] = (100, 100)) -> Policy:
    """A policy for observations and actions like the world's, by default with the paper's network.

    inputs : numbers that it sees, where these are not the world's observations
    """
    kind = CategoricalPolicy if world.discrete else GaussianPolicy
    return kind(world.observations if inputs is None else inputs, world.actions, hidden)
