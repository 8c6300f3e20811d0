"""Reinforcement learning: returns, baselines and policies against plain loops; surrogates by brute force; TRPO."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, Normal, kl_divergence
from torch.func import functional_call

import fewstep
from fewstep import DivergenceError, Engine, FallbackWarning, InputError, Learner, Task
from fewstep.cli import main
from fewstep.data.episodes import Episodes
from fewstep.distributed import average_gradients, is_first, joined, ranks, share
from fewstep.evaluate import evaluate
from fewstep.learner import last_step
from fewstep.meta_step import MetaStep
from fewstep.recipes import RECIPES
from fewstep.recipes.policies import PolicyRecipe
from fewstep.recipes.policy_baselines import RATES
from fewstep.recipes.published import PUBLISHED
from fewstep.report import _by_step, _training
from fewstep.rl import (
    TRPO,
    Ascent,
    CategoricalPolicy,
    EnvironmentEpisodes,
    Explorer,
    GaussianPolicy,
    Policy,
    RecurrentPolicy,
    SamplingCorrection,
    TrustRegion,
    policy_of,
)
from fewstep.rl.baseline import linear_baseline
from fewstep.rl.curvature import Curvature, adapted, check_curvature, thinned
from fewstep.rl.environments import Bandits, Navigation, Told, Trials
from fewstep.rl.experience import Experience
from fewstep.rl.returns import discounted, generalised_advantages, standardised
from fewstep.rl.surrogates import INNER, Clipped, dice, likelihood_ratio, reinforce
from fewstep.rl.trpo import loss_and_divergence
from fewstep.rl.watchdog import no_longer_than
from fewstep.updates import SGD
from tests.reference import relative_error
from tests.test_distributed import on_ranks

LR = 0.3
hessian: Any = torch.autograd.functional.hessian


def build(inner: Any = reinforce, steps: int = 1, hidden: int = 5, **options: Any) -> Learner:
    torch.manual_seed(0)
    policy = GaussianPolicy(2, 2, (hidden,)).double()
    return Learner(policy, likelihood_ratio, SGD(LR), steps=steps, inner_loss=inner, stream=True, **options)


def explorer_of(learner: Learner, horizon: int = 6, **options: Any) -> Explorer:
    return Explorer(learner, Navigation(horizon), trajectories=4, **options)


def tasks_of(count: int = 3, horizon: int = 6) -> Task:
    tasks = EnvironmentEpisodes(tasks=count, environment=Navigation(horizon))[0]
    goals, seeds = tasks.support
    return Task((goals.double(), seeds), (goals.double(), seeds))


def run_of(task: Task, number: int) -> tuple[Experience, Experience]:
    """The experience of one task: before each step, and after the last."""
    support, query = (Experience(*[part[number] for part in batch]) for batch in task)
    return support, query


# Returns, baseline, policies.


def test_returns_and_advantages_are_those_of_plain_loops() -> None:
    torch.manual_seed(0)
    rewards, values = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    for discount, decay in ((0.9, 1.0), (0.99, 0.8)):
        for k, m in itertools.product(range(3), range(5)):
            r, v = rewards[k, m].tolist(), [*values[k, m].tolist(), 0.0]
            ahead = [sum(discount ** (s - t) * r[s] for s in range(t, 7)) for t in range(7)]
            deltas = [r[t] + discount * v[t + 1] - v[t] for t in range(7)]
            advantages = [sum((discount * decay) ** (s - t) * deltas[s] for s in range(t, 7)) for t in range(7)]
            torch.testing.assert_close(discounted(rewards, discount)[k, m].tolist(), ahead)
            found = generalised_advantages(rewards, values, discount, decay)[k, m].tolist()
            torch.testing.assert_close(found, advantages)


def test_advantages_are_standardised_over_what_counts() -> None:
    torch.manual_seed(0)
    advantages, mask = torch.randn(2, 4, 6, dtype=torch.float64), torch.rand(2, 4, 6) < 0.7
    found = standardised(advantages, mask)
    for own, which in zip(found, mask, strict=True):
        assert own[which].mean().abs() < 1e-12
        assert abs(own[which].std(correction=0) - 1) < 1e-6
        assert not own[~which].any()


def test_the_baseline_is_a_ridge_regression_of_each_task() -> None:
    rng = np.random.default_rng(0)
    seen, returns = rng.normal(size=(2, 12, 4, 2)) * 20, rng.normal(size=(2, 12, 4))
    mask = rng.random((2, 12, 4)) < 0.8
    found = linear_baseline(torch.tensor(seen), torch.tensor(returns), torch.tensor(mask)).numpy()
    for k in range(2):
        o, t = np.clip(seen[k], -10, 10), np.broadcast_to(np.arange(4)[:, None] / 100, (12, 4, 1))
        x = np.concatenate([o, o**2, t, t**2, t**3, np.ones_like(t)], -1)
        rows, y = x[mask[k]], returns[k][mask[k]]
        weights = np.linalg.solve(rows.T @ rows + 1e-5 * np.eye(8), rows.T @ y)
        np.testing.assert_allclose(found[k], x @ weights, rtol=1e-6, atol=1e-9)


class InPlace(Navigation):
    """Writes its next state to where the last one was."""

    def reset(self, tasks: Tensor, trajectories: int, generators: Sequence[torch.Generator]) -> Tensor:
        self.places = super().reset(tasks, trajectories, generators)
        return self.places

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        seen, rewards, ended = super().step(actions)
        return self.places.copy_(seen), rewards, ended


def test_an_environment_may_write_to_what_it_gave() -> None:
    torch.manual_seed(0)
    policy = GaussianPolicy(2, 2, hidden=(8,))
    learner = Learner(policy, likelihood_ratio, SGD(0.1), steps=1, inner_loss=reinforce, stream=True)
    plain, other = (
        Explorer(learner, world, trajectories=4).explore(EnvironmentEpisodes(tasks=2, environment=world)[0])
        for world in (Navigation(horizon=5), InPlace(horizon=5))
    )
    assert not plain.support.observations[..., 0, :].any(), "all start at the origin"
    for one, same in ((plain.support, other.support), (plain.query, other.query)):
        assert torch.equal(one.observations, same.observations)
        assert torch.equal(one.log_probs, same.log_probs)


def test_few_steps_are_not_explained_by_many_features() -> None:
    torch.manual_seed(0)
    seen, returns = torch.randn(1, 10, 5, 30), torch.randn(1, 10, 5)  # chance alone, 50 steps, 64 features
    found = linear_baseline(seen, returns, torch.ones(1, 10, 5, dtype=torch.bool))
    assert torch.equal(found, linear_baseline(0 * seen, returns, torch.ones(1, 10, 5, dtype=torch.bool)))
    assert (returns - found).std() > 0.8, "the deviation of returns is 1: no advantage is explained away"


def distribution(policy: Policy, outputs: Tensor) -> Any:
    if isinstance(policy, CategoricalPolicy):
        return Categorical(logits=outputs)
    mean, log_std = outputs.chunk(2, -1)
    return Independent(Normal(mean, log_std.exp()), 1)


@pytest.mark.parametrize("kind", [GaussianPolicy, CategoricalPolicy])
def test_policies_are_the_distributions_of_torch(kind: type[Any]) -> None:
    torch.manual_seed(0)
    policy = kind(3, 4).double()
    old, new = policy(torch.randn(2, 6, 3, dtype=torch.float64)) + torch.randn(2, 1, 1, dtype=torch.float64) / 3
    old = (old + 0.2 * torch.randn_like(old)).detach()
    actions = distribution(policy, old).sample()
    torch.testing.assert_close(policy.log_prob(old, actions), distribution(policy, old).log_prob(actions))
    torch.testing.assert_close(policy.kl(old, new), kl_divergence(*(distribution(policy, o) for o in (old, new))))
    tangent = torch.randn_like(old)
    hvp: Any = torch.autograd.functional.hvp
    _, product = hvp(lambda moved: policy.kl(old, moved).sum(), old, tangent)
    torch.testing.assert_close(policy.fisher(old, tangent), product)
    noise = policy.noise((20_000,), torch.Generator().manual_seed(0)).double()
    drawn = policy.act(old[:1].expand(20_000, -1), noise)
    expected = distribution(policy, old[:1]).mean if kind is GaussianPolicy else None
    if expected is None:
        assert (drawn.bincount(minlength=4) / 20_000 - old[0].softmax(-1)).abs().max() < 0.02
    else:
        assert (drawn.mean(0) - expected[0]).abs().max() < 0.05


# Environments and sampling.


def test_navigation_by_its_formulas() -> None:
    world = Navigation(horizon=5)
    goals = torch.tensor([[0.2, -0.1], [0.0, 0.5]], dtype=torch.float64)
    seen = world.reset(goals, 1, [])
    place = np.zeros((2, 2))
    for script in ([[1.0, -0.5], [0.3, 9.0]], [[1.0, -0.5], [-3.0, 1.0]], [[0.05, 0.0], [0.0, 0.0]]):
        place = place + 0.1 * np.clip(np.array(script), -1, 1)
        seen, rewards, ended = world.step(torch.tensor(script, dtype=torch.float64)[:, None])
        away = place - goals.numpy()
        np.testing.assert_allclose(seen[:, 0].numpy(), place)
        np.testing.assert_allclose(rewards[:, 0].numpy(), -np.sqrt((away**2).sum(-1)))
        assert ended[:, 0].tolist() == (np.abs(away) < 0.01).all(-1).tolist()
    assert ended.flatten().tolist() == [True, False]
    drawn = world.sample_tasks(2000, torch.Generator().manual_seed(0))
    assert drawn.abs().max() <= 0.5
    assert drawn.std(0).sub(12**-0.5).abs().max() < 0.01


def test_trajectories_do_not_depend_on_how_tasks_are_cut() -> None:
    learner, tasks = build(), tasks_of(4)
    whole = list(explorer_of(learner).walk(tasks, 2))
    parts = [list(explorer_of(learner).walk(tasks.select(torch.tensor(rows)), 2)) for rows in ([0, 1], [2, 3])]
    for step in range(3):
        for part, first, second in zip(whole[step], parts[0][step], parts[1][step], strict=True):
            torch.testing.assert_close(part, torch.cat([first, second]), rtol=1e-10, atol=1e-10)


def test_what_comes_after_the_end_does_not_count() -> None:
    learner = build()
    goals, seeds = tasks_of(2, 30).support
    goals = torch.zeros_like(goals) + 0.005  # near the start: some get there
    lived = next(iter(Explorer(learner, Navigation(30), trajectories=20).walk(Task((goals, seeds), (goals, seeds)))))
    lengths = lived.mask.sum(-1)
    assert lengths.min() < 30
    assert not lived.rewards[~lived.mask].any()
    ends = (lived.mask[..., :-1] & ~lived.mask[..., 1:]).sum(-1)
    assert (ends <= 1).all(), "once over, it stays over"


def test_the_actions_are_those_of_the_adapted_policy() -> None:
    learner, tasks = build(), tasks_of()
    experience = explorer_of(learner).explore(tasks)
    policy: Any = learner.model
    for number in range(3):
        support, query = run_of(experience, number)
        first = Experience(*[part[0] for part in support])
        theta = dict(policy.named_parameters())
        grads = torch.autograd.grad(reinforce(policy, first), list(theta.values()))
        moved = {name: value - LR * grad for (name, value), grad in zip(theta.items(), grads, strict=True)}
        for batch, own in ((first, theta), (query, moved)):
            outputs = functional_call(policy, own, (batch.observations,))
            torch.testing.assert_close(torch.where(batch.mask[..., None], outputs - batch.outputs, 0.0).abs().max(),
                                       torch.tensor(0.0).double(), atol=1e-10, rtol=0)  # fmt: skip
            told = policy.log_prob(batch.outputs, batch.actions)
            torch.testing.assert_close(torch.where(batch.mask, told - batch.log_probs, 0.0).abs().max(),
                                       torch.tensor(0.0).double(), atol=1e-10, rtol=0)  # fmt: skip


class Slower(GaussianPolicy):
    def forward(self, observations: Tensor) -> Tensor:
        return super().forward(observations) - 1


def doubled(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, given, result: 2 * result)


def lessened(module: Any) -> None:
    before = module.forward
    module.forward = lambda rows: before(rows) - 1


def fixed_deviations(policy: Any) -> None:
    del policy.log_std
    policy.register_buffer("log_std", torch.zeros(3))


# The mean's network: Flatten, Linear(2, 5), ReLU, Linear(5, 4), ReLU, Linear(4, 4), ReLU, Linear(4, 3).
KNOWN: dict[str, Callable[[Any], object]] = {
    "as it is": lambda policy: None,
    "a ReLU twice": lambda policy: policy.mean.__setitem__(4, policy.mean[2]),
}
UNKNOWN: dict[str, Callable[[Any], object]] = {
    "a layer twice": lambda policy: policy.mean.__setitem__(6, policy.mean[5]),
    "another layer": lambda policy: policy.mean.__setitem__(2, nn.Tanh()),
    "no offset": lambda policy: policy.mean.__setitem__(3, nn.Linear(5, 4, bias=False)),
    "a hook": doubled,
    "a layer's hook": lambda policy: doubled(policy.mean[1]),
    "a forward": lessened,
    "a network's forward": lambda policy: lessened(policy.mean),
    "a class": lambda policy: setattr(policy, "__class__", Slower),
    "one deviation": lambda policy: setattr(policy, "log_std", nn.Parameter(torch.tensor(0.5))),
    "fixed deviations": fixed_deviations,
}


@pytest.mark.parametrize("change", [*KNOWN, *UNKNOWN])
def test_all_tasks_act_at_once_as_each_alone(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    policy = GaussianPolicy(2, 3, (5, 4, 4))
    {**KNOWN, **UNKNOWN}[change](policy)
    policy.double()
    theta = {name: value + torch.randn(4, *value.shape).double() for name, value in policy.named_parameters()}
    seen = torch.randn(4, 4, 2).double()
    if change in KNOWN:  # by products of all tasks, not by vmap
        monkeypatch.setattr(fewstep.rl.policies, "vmap", None)
    outputs, state = policy.acting(theta)(seen, None)
    for task in range(4):
        own = {name: value[task] for name, value in theta.items()}
        torch.testing.assert_close(outputs[task], functional_call(policy, own, (seen[task],)), rtol=1e-12, atol=1e-12)
    assert state is None


def test_an_evaluation_gives_returns_after_each_step() -> None:
    explorer = explorer_of(build())
    episodes = EnvironmentEpisodes(tasks=2, environment=Navigation(6))
    result = evaluate(explorer, episodes, metric="return", steps=2, count=4)
    assert result.higher_is_better
    lived = [list(explorer.walk(episodes[i], 2)) for i in (0, 1)]
    for step, point in enumerate(result.by_step):
        returns = torch.cat([walk[step].rewards.sum(-1).mean(-1) for walk in lived])
        assert point.mean == pytest.approx(returns.double().mean().item())


def test_an_oracle_is_told_the_task() -> None:
    goals = torch.tensor([[0.3, 0.1], [0.2, 0.4]])
    world = Told(Navigation(3), 2)
    assert world.observations == 4
    seen = world.reset(goals, 5, [])
    assert torch.equal(seen[..., 2:], goals[:, None].expand(2, 5, 2))
    assert torch.equal(world.step(torch.ones(2, 5, 2))[0][..., 2:], goals[:, None].expand(2, 5, 2))


# Derivatives against plain autograd.


def naive_objective(learner: Learner, experience: Task, inner: Any, outer: Any) -> Tensor:
    """mean_k outer(theta'_k) by plain autograd, one task after another."""
    policy: Any = learner.model
    total: list[Tensor] = []
    for number in range(len(experience.query.mask)):
        support, query = run_of(experience, number)
        theta = dict(policy.named_parameters())
        for step in range(learner.steps):
            batch = Experience(*[part[step] for part in support])
            loss = inner(_With(policy, theta), batch)
            grads = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
            theta = {name: value - LR * grad for (name, value), grad in zip(theta.items(), grads, strict=True)}
        total.append(outer(_With(policy, theta), query))
    return torch.stack(total).mean()


class _With:
    """A policy with other parameters."""

    def __init__(self, policy: Any, theta: dict[str, Tensor]) -> None:
        self.policy, self.theta = policy, theta

    def __call__(self, seen: Tensor) -> Any:
        return functional_call(self.policy, self.theta, (seen,))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)


def flat(parts: Any) -> Tensor:
    return torch.cat([part.flatten() for part in parts])


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("inner", INNER)
def test_meta_gradients_equal_plain_autograd(inner: str, steps: int) -> None:
    learner = build(INNER[inner], steps)
    experience = explorer_of(learner).explore(tasks_of())
    own = list(learner.parameters())
    ours = torch.autograd.grad(learner(experience).mean(), own)
    naive = torch.autograd.grad(naive_objective(learner, experience, INNER[inner], likelihood_ratio), own)
    assert relative_error(flat(ours), flat(naive)) < 1e-8


@pytest.mark.parametrize(
    "engine", [Engine(chunk=1, compile="pieces", keep=True), Engine(chunk=1, compile="step")], ids=str
)
def test_compiled_engines_give_the_meta_gradient_of_the_plain_loop(engine: Engine) -> None:
    """Inductor of PyTorch 2.13 gets it wrong by some percent (pytorch/pytorch#185702), unless it is mended."""
    found = []
    for each in (Engine(method="loop"), engine):
        learner = build(likelihood_ratio, engine=each)
        explorer = Explorer(learner, Navigation(20), trajectories=20)
        step = MetaStep(learner, torch.optim.SGD(learner.parameters()))
        with warnings.catch_warnings():
            warnings.simplefilter("error", FallbackWarning)
            step.backward(explorer.explore(tasks_of(2, horizon=20)))
        found.append(flat([parameter.grad for parameter in learner.parameters()]))
    assert relative_error(found[1], found[0]) < 1e-9


def curvature_of(learner: Learner, experience: Task, stride: int = 1, inner_stride: int = 1) -> Curvature:
    theta = adapted(learner, experience.support)
    return Curvature(learner, list(learner.parameters()), experience, theta, stride, inner_stride)


@pytest.mark.parametrize("steps", [0, 1, 2])
@pytest.mark.parametrize("inner", INNER)
def test_the_curvature_is_that_of_the_divergence(inner: str, steps: int) -> None:
    learner = build(INNER[inner], steps)
    experience = explorer_of(learner).explore(tasks_of())
    own = list(learner.parameters())

    def divergence(policy: Any, query: Experience) -> Tensor:
        away = policy.kl(query.outputs, policy(query.observations))
        return torch.where(query.mask, away, 0.0).sum() / query.mask.sum()

    torch.manual_seed(1)
    v = [torch.randn_like(value) for value in own]
    whole = naive_objective(learner, experience, INNER[inner], divergence)
    first = torch.autograd.grad(whole, own, create_graph=True, materialize_grads=True)
    slope = torch.stack([(a * b).sum() for a, b in zip(first, v, strict=True)]).sum()
    naive = torch.autograd.grad(slope, own)
    assert flat(first).norm() < 1e-10, "at the old policy the divergence is least"
    ours = curvature_of(learner, experience)(v)
    assert relative_error(flat(ours), flat(naive)) < 1e-8


# What is trained beside what adapts, too: rates, a head, a context, warp layers.
METHODS: dict[str, dict[str, Any]] = {
    "maml": {"adapt": "*.bias"}, "meta_sgd": {}, "anil": {}, "boil": {}, "cavia": {}, "alfa": {}, "l2f": {},
    "maml_pp": {}, "t_net": {}, "warp_grad": {}, "meta_curvature": {}, "sharp_maml": {}, "imaml": {},
}  # fmt: skip


def by_method(method: str, **options: Any) -> Learner:
    torch.manual_seed(0)
    policy = GaussianPolicy(2, 2, (5,)).double()
    with torch.no_grad():
        for value in policy.parameters():  # off the kink of ReLU at the start, where all is 0
            value.add_(torch.randn_like(value), alpha=0.1)
    learner: Learner = getattr(fewstep, method)(policy, reinforce, lr=LR, stream=True, **options)
    learner.iteration = 0
    return learner


@pytest.mark.parametrize("method", METHODS)
def test_the_curvature_of_each_method_is_that_of_the_divergence(method: str) -> None:
    learner = by_method(method, steps=2, **METHODS[method])
    experience = explorer_of(learner).explore(tasks_of())
    own = list(learner.parameters())
    v = [torch.randn_like(value) for value in own]

    def slope() -> Tensor:
        _, away = loss_and_divergence(learner, experience)
        return flat(torch.autograd.grad(away, own, materialize_grads=True))

    def move(by: float) -> None:
        torch._foreach_add_([value.data for value in own], v, alpha=by)

    check_curvature(learner)
    move(1e-5)
    ahead = slope()
    move(-2e-5)
    numeric = (ahead - slope()) / 2e-5
    move(1e-5)
    assert relative_error(flat(curvature_of(learner, experience)(v)), numeric) < 1e-7


@pytest.mark.parametrize("inner", INNER)
def test_the_line_search_judges_what_was_differentiated(inner: str) -> None:
    learner = build(INNER[inner], 2)
    own, size = list(learner.parameters()), 1e-5
    with torch.no_grad():
        for value in own:  # off the kink of ReLU at the start, where all is 0
            value.add_(torch.randn_like(value), alpha=0.1)
    experience = explorer_of(learner).explore(tasks_of())
    v = [torch.randn_like(value) for value in own]
    gradient = torch.autograd.grad(learner(experience).mean(), own)
    before = [value.detach().clone() for value in own]

    def moved(by: float) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            for value, start, part in zip(own, before, v, strict=True):
                value.copy_(start + by * part)
            return loss_and_divergence(learner, experience)

    (up, away), (down, towards) = moved(size), moved(-size)
    slope = flat(gradient) @ flat(v)
    assert abs((up - down) / (2 * size) - slope) < 1e-6 * slope.abs()
    moved(0)
    squared = flat(curvature_of(learner, experience)(v)) @ flat(v)
    assert abs((away + towards) / size**2 - squared) < 1e-4 * squared


def test_a_thinned_curvature_is_near_the_whole_one() -> None:
    learner = build(hidden=8)
    explorer = Explorer(learner, Navigation(40), trajectories=30)
    experience = explorer.explore(tasks_of(2, 40))
    v = [torch.ones_like(value) for value in learner.parameters()]
    whole = flat(curvature_of(learner, experience)(v))
    for strides in ({"stride": 7}, {"inner_stride": 7}, {"stride": 7, "inner_stride": 7}):
        curvature = curvature_of(learner, experience, **strides)
        assert 0 < relative_error(flat(curvature(v)), whole) < 0.3
        assert (curvature.query is experience.query) == ("stride" not in strides)
        assert (curvature.support is experience.support) == ("inner_stride" not in strides)
    rows = thinned(experience.query, 7)
    assert rows.mask.shape == (2, 1, -(-40 * 30 // 7))
    seen = experience.query.observations  # [tasks, trajectories, steps, 2]; entry 7 is trajectory 7 at the first step
    assert torch.equal(rows.observations[:, 0, 1], seen[:, 7, 0])


# Second derivatives by brute force: all trajectories of two steps, with their probabilities.


class Table(CategoricalPolicy):
    """Two actions in each of three states, given as one-hot observations; the logits are the parameters."""

    def __init__(self) -> None:
        super().__init__(3, 2)
        self.logits = nn.Linear(3, 2, bias=False)  # type: ignore[assignment]


def hessians(inner: Any, steps: int) -> tuple[Tensor, Tensor]:
    """The expected second derivative of the surrogate, and that of minus the expected return.

    State 0 first; then state 1 or 2, as the action says. Rewards are fixed numbers of state and action.
    """
    torch.manual_seed(0)
    policy = Table().double()
    weight: Tensor = policy.get_parameter("logits.weight")
    rewards = torch.tensor([[1.0, -0.5], [2.0, 0.3], [-1.0, 0.7]], dtype=torch.float64)
    eye = torch.eye(3, dtype=torch.float64)
    expected = torch.zeros(6, 6, dtype=torch.float64)

    def probabilities(own: Tensor) -> Tensor:
        return own.t().softmax(-1)  # [state, action]

    def value(own: Any) -> Any:
        p, total = probabilities(own), torch.zeros((), dtype=torch.float64)
        for actions in itertools.product((0, 1), repeat=steps):
            states = [0, 1 + actions[0]][:steps]
            chance = torch.stack([p[s, a] for s, a in zip(states, actions, strict=True)]).prod()
            total = total + chance * sum(rewards[s, a] for s, a in zip(states, actions, strict=True))
        return -total

    for actions in itertools.product((0, 1), repeat=steps):
        states = [0, 1 + actions[0]][:steps]
        gained = torch.stack([rewards[s, a] for s, a in zip(states, actions, strict=True)])[None]
        seen, taken = eye[states][None], torch.tensor([actions])
        acted = policy.log_prob(policy(seen), taken).detach()
        lived = Experience(seen, taken, discounted(gained, 1.0), acted, gained,
                           torch.ones(1, steps, dtype=torch.bool), gained.sum(-1))  # fmt: skip

        def loss(own: Any, lived: Experience = lived) -> Tensor:
            total: Tensor = steps * inner(_With(policy, {"logits.weight": own}), lived)  # the sum, not the mean
            return total

        p = probabilities(weight)
        chance = torch.stack([p[s, a] for s, a in zip(states, actions, strict=True)]).prod().detach()
        second = hessian(loss, weight.detach())
        expected += chance * second.reshape(6, 6)
    truth = hessian(value, weight.detach())
    whole: Tensor = truth.reshape(6, 6)
    return expected, whole


@pytest.mark.parametrize(
    ("inner", "steps", "unbiased"),
    [
        (reinforce, 1, False),
        (likelihood_ratio, 1, True),
        (dice, 1, True),
        (reinforce, 2, False),
        (likelihood_ratio, 2, False),
        (dice, 2, True),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_which_surrogates_have_the_hessian_of_the_return(inner: Any, steps: int, unbiased: bool) -> None:
    expected, truth = hessians(inner, steps)
    error = relative_error(expected, truth)
    assert error < 1e-10 if unbiased else error > 0.05


def test_lvc_is_less_biased_than_reinforce() -> None:
    errors = [relative_error(*hessians(inner, 2)) for inner in (likelihood_ratio, reinforce)]
    assert errors[0] < errors[1]


def test_all_surrogates_have_the_policy_gradient() -> None:
    learner = build()
    _, query = run_of(explorer_of(learner).explore(tasks_of(), 0), 0)
    policy: Any = learner.model
    own = list(policy.parameters())
    losses: list[Any] = [*INNER.values(), Clipped()]
    found = [flat(torch.autograd.grad(loss(policy, query), own)) for loss in losses]
    for gradient in found[1:]:
        torch.testing.assert_close(gradient, found[0], rtol=1e-8, atol=1e-10)


def meta_gradients(inner: Any, weight: float, trajectories: int) -> tuple[Tensor, Tensor]:
    """The expected meta-gradient of trajectories of two steps before and one after an inner step, and the true one."""
    torch.manual_seed(0)
    policy = Table().double()
    outer = SamplingCorrection(weight, standardise=False) if weight else last_step
    learner = Learner(policy, likelihood_ratio, SGD(LR), steps=1, inner_loss=inner, stream=True, outer=outer)
    own = list(learner.parameters())
    rewards = torch.tensor([[1.0, -0.5], [2.0, 0.3], [-1.0, 0.7]], dtype=torch.float64)
    ways = [([0, 1 + first], [first, second]) for first, second in itertools.product((0, 1), repeat=2)]

    def chances(logits: Tensor) -> list[Tensor]:
        p = logits.t().softmax(-1)  # [state, action]
        return [p[states, actions].prod() for states, actions in ways]

    def lived(chosen: Sequence[int], logits: Tensor) -> Experience:
        states, actions = (torch.tensor([ways[way][part] for way in chosen])[None] for part in (0, 1))
        gained, seen = rewards[states, actions], torch.eye(3, dtype=torch.float64)[states]
        outputs, taken = logits.t()[states], actions
        old = policy.log_prob(outputs, taken)
        return Experience(seen, taken, discounted(gained, 1.0), old, outputs, old.isfinite(), gained.sum(-1))

    start = own[0].detach()
    truth, expected = torch.zeros((), dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
    for chosen in itertools.product(range(4), repeat=trajectories):
        chance = torch.stack([chances(own[0])[way] for way in chosen]).prod()
        before = lived(chosen, start)
        support = Experience(*[part[:, None] for part in before])
        (theta,) = adapted(learner, support).values()
        after = [rewards[states, actions].sum() for states, actions in ways]
        worth = torch.stack([c * r for c, r in zip(chances(theta[0]), after, strict=True)]).sum()
        truth = truth - chance * worth
        for way, later in enumerate(chances(theta[0].detach())):
            loss = 2 * learner(Task(support, lived([way], theta[0].detach()))).mean()  # a sum of two steps
            expected += chance.detach() * later * flat(torch.autograd.grad(loss, own))
    return expected, flat(torch.autograd.grad(truth, own))


@pytest.mark.parametrize(
    ("inner", "weight", "trajectories", "unbiased"),
    [(reinforce, 1.0, 1, True), (reinforce, 2.0, 2, True), (reinforce, 1.0, 2, False), (reinforce, 0.0, 1, False),
     (likelihood_ratio, 0.0, 1, False), (dice, 0.0, 1, False)],
)  # fmt: skip
def test_the_sampling_correction_makes_the_meta_gradient_unbiased(
    inner: Any, weight: float, trajectories: int, unbiased: bool
) -> None:
    error = relative_error(*meta_gradients(inner, weight, trajectories))
    assert error < 1e-10 if unbiased else error > 0.01


def test_the_credit_is_standardised_over_the_tasks() -> None:
    learner = build(outer=SamplingCorrection(0.7))
    experience = explorer_of(learner).explore(tasks_of(4))
    worth = experience.query.returns.mean(-1)
    credit = (worth - worth.mean()) / worth.std(correction=0)
    corrected = learner(experience)
    learner.outer = last_step
    plain, policy = learner(experience), cast(Policy, learner.model)
    torch.testing.assert_close(corrected, plain - 0.7 * credit)  # all ratios are 1
    by_hand = plain.mean()
    for task in range(4):
        first = Experience(*[part[0] for part in run_of(experience, task)[0]])
        chosen = policy.log_prob(policy(first.observations), first.actions)[first.mask]
        by_hand = by_hand - 0.7 * credit[task] * chosen.mean() / 4
    own = list(learner.parameters())
    ours, theirs = (flat(torch.autograd.grad(loss, own)) for loss in (corrected.mean(), by_hand))
    assert relative_error(ours, theirs) < 1e-7  # the deviation has 1e-8 more


def test_clipping_stops_at_the_border() -> None:
    policy = GaussianPolicy(1, 1)
    outputs = torch.zeros(1, 1, 2)
    actions = torch.zeros(1, 1, 1)
    there = policy.log_prob(outputs, actions)
    with torch.no_grad():
        for layer in policy.mean.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.zero_()
                layer.bias.zero_()
    mask = torch.ones(1, 1, dtype=torch.bool)
    for advantage, old, value in ((1.0, -1.0, -1.2), (1.0, 1.0, -0.3679), (-1.0, -1.0, 2.7183), (-1.0, 1.0, 0.8)):
        lived = Experience(
            torch.zeros(1, 1, 1), actions, torch.full((1, 1), advantage), there + old, outputs, mask, mask.sum(-1)
        )
        assert Clipped(0.2)(policy, lived).item() == pytest.approx(value, abs=1e-4)


# TRPO.


def test_a_step_lowers_the_loss_within_the_trust_region() -> None:
    learner = build()
    step = TRPO(explorer_of(learner), TrustRegion(delta=0.02))
    before = [value.detach().clone() for value in learner.parameters()]
    for _ in range(3):
        step(tasks_of())
        assert step.accepted
        assert 0 < step.divergence <= 0.02
    assert all(not torch.equal(*pair) for pair in zip(before, learner.parameters(), strict=True))
    after = explorer_of(learner).explore(tasks_of())
    loss, divergence = loss_and_divergence(learner, after)
    assert divergence.abs() < 1e-12, "on its own experience nothing has changed yet"
    assert loss.abs() < 1e-10


@pytest.mark.parametrize("inner", [reinforce, likelihood_ratio])
def test_compiled_pieces_give_the_same_step(inner: Any) -> None:
    found = []
    for engine in (Engine(), Engine(chunk=2, compile="pieces")):
        learner = build(inner, engine=engine)
        before = flat(learner.parameters()).detach()
        with warnings.catch_warnings():
            warnings.simplefilter("error", FallbackWarning)
            TRPO(explorer_of(learner), TrustRegion(delta=0.02, damping=0.1, stride=3, inner_stride=3))(tasks_of(4))
        assert bool(learner.runner._compiled) == (engine.compile == "pieces")
        found.append(flat(learner.parameters()).detach() - before)
    assert found[0].norm() > 0
    assert relative_error(found[1], found[0]) < 1e-9


def test_a_step_that_does_not_help_moves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = build()
    step = TRPO(explorer_of(learner))
    before = [value.detach().clone() for value in learner.parameters()]
    tried: list[float] = []

    def worse(learner: Learner, experience: Task) -> tuple[Tensor, Tensor]:
        tried.append(0.0)
        return torch.tensor(1.0), torch.tensor(0.0)

    monkeypatch.setattr("fewstep.rl.trpo.loss_and_divergence", worse)
    step(tasks_of())
    assert not step.accepted
    assert len(tried) == 15
    assert all(torch.equal(*pair) for pair in zip(before, learner.parameters(), strict=True))


KINDS = ("trpo", "corrected trpo", "ppo")


def steps_together(folder: str) -> None:
    """Two steps of each outer rule on this rank's share; the first rank writes down where they led."""
    with joined():
        found = [go_on_together(kind) for kind in KINDS]
        if is_first():
            torch.save(found, Path(folder) / "found.pt")


def go_on_together(kind: str) -> tuple[Tensor, Tensor]:
    """The losses of two steps, and the weights after them."""
    learner = build(outer=SamplingCorrection() if kind == "corrected trpo" else last_step)
    explorer, average = explorer_of(learner), partial(shared_average, learner)
    adam = MetaStep(learner, torch.optim.Adam(learner.parameters()), average=average if ranks() > 1 else None)
    step: Any = (
        TRPO(explorer, TrustRegion(delta=0.05, damping=0.1)) if "trpo" in kind else Ascent(explorer, adam, epochs=2)
    )
    losses = torch.stack([step(share(tasks_of(5)), 0.01) for _ in range(2)])
    assert kind == "ppo" or step.accepted
    return losses, flat(learner.parameters()).detach()


def shared_average(learner: Learner, loss: Tensor, count: int) -> Tensor:
    return average_gradients(learner.parameters(), count, loss)[0]


def test_several_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    assert on_ranks(2, steps_together, tmp_path) == 0
    for kind, found in zip(KINDS, torch.load(tmp_path / "found.pt"), strict=True):
        for theirs, ours in zip(found, go_on_together(kind), strict=True):
            torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-9)


def test_epochs_of_adam_on_one_exploration() -> None:
    learner, other = build(), build()
    tasks = tasks_of()
    adam = MetaStep(learner, torch.optim.Adam(learner.parameters()))
    step = Ascent(explorer_of(learner), adam, epochs=3)
    loss = step(tasks, 0.01)
    walk = list(explorer_of(other).walk(tasks))
    experience = explorer_of(other).task_of(walk)
    optimizer = torch.optim.Adam(other.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        other(experience).mean().backward()
        optimizer.step()
    assert loss.item() == pytest.approx(-walk[-1].returns.mean().item())
    assert learner.iteration == 1
    for own, its in zip(learner.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(own, its, rtol=1e-12, atol=1e-12)
    with pytest.raises(InputError, match="at least 1 epoch, but 0 came"):
        Ascent(explorer_of(learner), adam, epochs=0)


@pytest.mark.parametrize("method", ["cavia", "meta_sgd", "anil", "maml_pp"])
def test_trpo_moves_all_that_is_trained(method: str) -> None:
    learner = by_method(method)
    before = {name: value.detach().clone() for name, value in learner.named_parameters()}
    step = TRPO(explorer_of(learner))
    step(tasks_of())
    assert step.accepted
    assert 0 < step.divergence <= 0.01
    still = [name for name, value in learner.named_parameters() if torch.equal(value, before[name])]
    assert still == (["model.mean.1.context"] if method == "cavia" else []), "a context starts from 0 in each task"


class Broken(Navigation):
    """Some tasks raise, or are paid NaN: those whose goal is to the right, or to the left where `left`."""

    def __init__(self, raises: bool, left: bool = False) -> None:
        super().__init__(6)
        self.raises, self.left = raises, left

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        seen, rewards, ended = super().step(actions)
        wrong = (self._goals[..., 0] > 0) | self.left
        if self.raises and wrong.any():
            raise OSError("the simulator is gone")
        return seen, torch.where(wrong, float("nan"), rewards), ended


@pytest.mark.parametrize("raises", [True, False], ids=["raises", "NaN"])
def test_an_environment_that_fails_is_named_with_its_task_and_seed(raises: bool) -> None:
    learner, tasks = build(), tasks_of(5)
    goals, seeds = tasks.support
    failing = [place for place in range(5) if goals[place, 0] > 0]
    assert 0 < len(failing) < 5
    before = [value.detach().clone() for value in learner.parameters()]
    with pytest.raises(InputError) as error:
        TRPO(Explorer(learner, Broken(raises), trajectories=4))(tasks)
    reason = "OSError: the simulator is gone" if raises else "its rewards hold NaN or infinity"
    named = f"task {goals[failing[0]].tolist()} with seed {seeds[failing[0]]}"
    start = f"{len(failing)} of 5 tasks of the environment failed after 0 inner steps ({reason}): {named}"
    assert str(error.value).startswith(start)
    assert all(torch.equal(*pair) for pair in zip(before, learner.parameters(), strict=True))


@pytest.mark.parametrize("raises", [True, False], ids=["raises", "NaN"])
def test_training_goes_on_without_tasks_that_fail(raises: bool, capsys: Any) -> None:
    tasks, weights = tasks_of(8), []
    fine = tasks.select(tasks.support[0][:, 0] <= 0)
    for world, given in ((Broken(raises), tasks), (Navigation(6), fine)):
        learner = build()
        TRPO(Explorer(learner, world, trajectories=4, skip_failures=True))(given)
        weights.append(flat(learner.parameters()))
    assert torch.equal(*weights), "the others, alone, give the same step"
    assert "left out: " in capsys.readouterr().err
    explorer = Explorer(build(), Broken(raises), trajectories=4, skip_failures=True)
    result = evaluate(explorer, OfTasks(tasks=8, batch=tasks), metric="return", steps=1, count=8)
    assert result.episodes == fine.size, "judging goes on, too, and says how many tasks count"
    assert explorer.about["tasks_left_out"] == 8 - fine.size
    with pytest.raises(InputError, match="8 of 8 tasks of the environment failed"):
        TRPO(Explorer(build(), Broken(raises, left=True), trajectories=4, skip_failures=True))(tasks)


@dataclass(frozen=True, kw_only=True)
class OfTasks(Episodes):
    """The same batch again and again."""

    batch: Task

    def draw(self, generator: torch.Generator) -> Task:
        return self.batch


class Endless(Navigation):
    """Never comes back where the goal is to the right."""

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        while (self._goals[..., 0] > 0).any():
            pass
        return super().step(actions)


def test_what_never_ends_is_named_and_left_out() -> None:
    tasks = tasks_of(3)
    failing = tasks.support[0][:, 0] > 0
    assert 0 < failing.sum() < 3
    with pytest.raises(InputError, match=r"1 or more of 3 .* \(TimeoutError: it took more than 0.2 s\): task "):
        TRPO(Explorer(build(), Endless(6), trajectories=4, limit=0.2))(tasks)
    step = TRPO(Explorer(build(), Endless(6), trajectories=4, limit=0.2, skip_failures=True))
    step(tasks)
    assert step.about["tasks_left_out"] == failing.sum()


def test_alarms_of_others_are_left_alone() -> None:
    rung: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda number, frame: rung.append(number))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with no_longer_than(60):  # theirs comes sooner
            time.sleep(0.3)
        assert rung == [signal.SIGALRM]
        signal.setitimer(signal.ITIMER_REAL, 60)
        with pytest.raises(TimeoutError), no_longer_than(0.05):
            time.sleep(1)
        assert 50 < signal.getitimer(signal.ITIMER_REAL)[0] < 60
        with pytest.raises(TimeoutError), no_longer_than(0.3), no_longer_than(0.6):
            time.sleep(1)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


STOPPED = """
import os, signal
from fewstep.rl.watchdog import no_longer_than
with no_longer_than(3):
    print("ready", flush=True)
    os.kill(os.getpid(), signal.SIGSTOP)
print("done")
"""


def test_time_in_which_the_process_is_stopped_is_no_fault_of_the_environment() -> None:
    with subprocess.Popen([sys.executable, "-c", STOPPED], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(3.5)  # longer than the limit
        process.send_signal(signal.SIGCONT)
        assert process.stdout.read() == "done\n"


def test_what_fails_once_is_tried_again(capsys: Any) -> None:
    class Once(Navigation):
        failed = False

        def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            if not self.failed:
                self.failed = True
                raise OSError("a short break")
            return super().step(actions)

    weights = []
    for world in (Once(6), Navigation(6)):
        learner = build()
        TRPO(Explorer(learner, world, trajectories=4, skip_failures=True))(tasks_of())
        weights.append(flat(learner.parameters()))
    assert torch.equal(*weights)
    assert "once more, for the environment failed" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"with none alone \(OSError: a short break\)"):
        TRPO(Explorer(build(), Once(6), trajectories=4))(tasks_of())


def test_an_observation_of_nan_is_called_that() -> None:
    class Lost(Navigation):
        def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            assert actions.isfinite().all(), "nothing is done with what is seen of it"
            seen, rewards, ended = super().step(actions)
            return torch.where(self._goals[..., :1] > 0, float("nan"), seen), rewards, ended

    with pytest.raises(InputError, match="its observations hold NaN or infinity"):
        TRPO(Explorer(build(), Lost(6), trajectories=4))(tasks_of())


def test_steps_that_were_not_taken_have_no_gradient() -> None:
    policy = GaussianPolicy(1, 1, (2,)).double()
    seen, mask = torch.zeros(1, 2, 1, dtype=torch.float64), torch.tensor([[True, False]])
    actions, ones = torch.zeros(1, 2, 1, dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64)
    outputs = policy(seen).detach()
    old = policy.log_prob(outputs, actions) - torch.tensor([[0.0, 1e3]])  # e^1000 where no step was taken
    lived = Experience(seen, actions, ones, old, outputs, mask, ones[:, 0])
    for surrogate in (likelihood_ratio, Clipped()):
        loss = surrogate(policy, lived)
        gradients = torch.autograd.grad(loss, list(policy.parameters()))
        assert all(part.isfinite().all() for part in (loss, *gradients))


def test_what_fails_only_together_blames_no_task() -> None:
    class Full(Navigation):
        def reset(self, tasks: Tensor, *about: Any) -> Tensor:
            if len(tasks) > 1:
                raise MemoryError("no room")
            return super().reset(tasks, *about)

    with pytest.raises(InputError, match=r"with all 3 tasks together and with none alone \(MemoryError: no room\)"):
        TRPO(Explorer(build(), Full(6), trajectories=4, skip_failures=True))(tasks_of())


def _answers(change: Callable[[Tensor, Tensor, Tensor], Any]) -> type[Navigation]:
    class Other(Navigation):
        def step(self, actions: Tensor) -> Any:
            return change(*super().step(actions))

    return Other


@pytest.mark.parametrize(
    ("change", "message"),
    {
        "rewards of tasks": (
            lambda s, r, e: (s, r.mean(1), e),
            r"step gives rewards .*a tensor \[4, 4\] .* \[4\] came",
        ),
        "rewards in a row": (lambda s, r, e: (s, r[..., None], e), r"rewards .*but .*\[4, 4, 1\] came"),
        "one reward": (lambda s, r, e: (s, r.mean(), e), r"rewards .*but .* \[\] came"),
        "one observation": (lambda s, r, e: (s[:1, :1], r, e), r"observations .*\[4, 4, 2\] is expected.*\[1, 1, 2\]"),
        "numbers for ends": (lambda s, r, e: (s, r, e.int()), r"what has ended .*torch.bool \[4, 4\].*torch.int32"),
        "one end": (lambda s, r, e: (s, r, e[0]), r"what has ended .*but torch.bool \[4\] came"),
        "arrays": (lambda s, r, e: (s.numpy(), r, e), r"observations .*but a ndarray came"),
        "four values": (lambda s, r, e: (s, r, e, {}), r"\(observations, rewards, ended\), but 4 values came"),
    }.values(),
)
def test_what_an_environment_gives_has_the_shape_that_is_asked_for(change: Any, message: str) -> None:
    """What can be broadcast would be so without a word: each task paid for the others."""
    with pytest.raises(InputError, match=message):
        TRPO(Explorer(build(), _answers(change)(6), trajectories=4))(tasks_of(4))


def test_starts_and_tasks_of_another_shape() -> None:
    class Wide(Navigation):
        def reset(self, *about: Any) -> Tensor:
            return super().reset(*about)[:1]

    class More(Navigation):
        def sample_tasks(self, count: int, generator: torch.Generator) -> Tensor:
            return super().sample_tasks(count + 1, generator)

    with pytest.raises(InputError, match=r"reset gives observations .*\[4, 4, 2\] is expected, but .*\[1, 4, 2\] came"):
        TRPO(Explorer(build(), Wide(6), trajectories=4))(tasks_of(4))
    with pytest.raises(InputError, match=r"sample_tasks\(4, generator\) must give a tensor \[4, ...\]"):
        EnvironmentEpisodes(tasks=4, environment=More(6))[0]


def test_a_divergence_names_its_iteration(tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["train", "navigation", *SMALL, "--inner-lr", "1e38", "--out", str(tmp_path / "run")])
    told = " ".join(capsys.readouterr().err.split())
    assert "iteration 0: " in told
    assert told.endswith("; the last checkpoint is intact")


def test_the_authors_returns_are_those_of_their_files() -> None:
    file = Path(os.environ.get("FEWSTEP_DATA", "")) / "reference" / "maml_rl_returns.json"
    if not file.is_file():
        pytest.skip(f"FEWSTEP_DATA names the folder of the authors' results, and {file} is not there")
    found = json.loads(file.read_text())["data"]
    worlds = {"2D navigation": "point", "half-cheetah velocity, paper physics": "cheetah",
              "half-cheetah direction, paper physics": "cheetahdirec", "ant velocity, paper physics": "ant",
              "ant direction, paper physics": "antdirec"}  # fmt: skip
    names = {"MAML": "maml", "pre-trained": "pretrain", "random": "random", "oracle": "oracle"}
    for (world, _), curves in PUBLISHED.items():
        for name, (means, halves) in curves.items():
            kind = "sens0" if (world, name) == ("2D navigation", "pre-trained") else names[name]
            theirs = found[f"icml_{worlds[world]}_results_{kind}"]
            assert list(means) == theirs["mean_by_grad_step"][: len(means)]
            assert list(halves) == theirs["ci95"][: len(halves)]
    assert {world for world, _ in PUBLISHED} == set(worlds)


def test_a_step_that_explodes_is_not_the_environments_fault() -> None:
    learner = build()
    learner.update = SGD(float("1e308"))
    with pytest.raises(DivergenceError, match="outputs are not finite after 1 inner steps; lower"):
        TRPO(explorer_of(learner, skip_failures=True))(tasks_of())


def test_nan_after_the_end_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone(Navigation):
        """Ends at once, and is not to be looked at afterwards."""

        def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            seen, rewards, _ = super().step(actions)
            self._places = seen * float("nan")
            return self._places, rewards.nan_to_num(), torch.ones_like(rewards, dtype=torch.bool)

    monkeypatch.setattr("fewstep.rl.explorer.time.perf_counter", itertools.count().__next__)
    explorer = Explorer(build(), Gone(6), trajectories=4)
    lived = next(iter(explorer.walk(tasks_of())))
    assert set(lived.mask.sum(-1).flatten().tolist()) == {1}
    assert lived.observations.isfinite().all()
    assert explorer.rate == 12, "one step of 3 times 4 trajectories in the one second that the clock gave"


def test_what_the_command_line_says_of_the_trust_region_holds() -> None:
    chosen: Any = {"delta": 0.3, "damping": 0.4, "stride": 3, "inner_stride": 9}
    recipe: Any = RECIPES["navigation"]
    recipe = dataclasses.replace(recipe, conjugate_steps=2, **chosen)
    assert isinstance(recipe, PolicyRecipe)
    assert recipe.region == TrustRegion(iterations=2, **chosen)


def test_a_stride_leaves_no_trajectory_out() -> None:
    with pytest.raises(InputError, match="with 4 trajectories a stride of 6 would leave some out altogether"):
        TRPO(explorer_of(build()), TrustRegion(stride=6))
    with pytest.raises(InputError, match="with 4 trajectories a stride of 2 would leave some out altogether"):
        TRPO(explorer_of(build()), TrustRegion(inner_stride=2))


@pytest.mark.parametrize("method", ["cavia", "fomaml", "anil", "meta_sgd", "maml_pp", "reptile"])
def test_other_methods_learn_by_adam(method: str, tmp_path: Path) -> None:
    run = ["train", "navigation", *SMALL, "--outer", "adam", "--algorithm", method, "--out", str(tmp_path)]
    own = {"reptile": "pool=False", "maml_pp": "anneal=2,step_norms=False"}
    main([*run, "--algorithm-options", own[method]] if method in own else run)
    values = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [event["step"] for event in values] == [1, 1, 2, 2]


def test_a_run_that_is_taken_up_again_is_the_same(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    main(["train", "navigation", *SMALL, "--iterations", "3", "--out", str(whole)])
    for iterations in ("1", "3"):
        main(["train", "navigation", *SMALL, "--iterations", iterations, "--out", str(parts)])
    one, other = (load_file(path / "model.safetensors") for path in (whole, parts))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_only_runs_in_the_same_world_are_compared(tmp_path: Path, capsys: Any) -> None:
    for name, horizon in (("short", "4"), ("long", "5")):
        main(["train", "navigation", *SMALL, "--horizon", horizon, "--out", str(tmp_path / name)])
    with pytest.raises(SystemExit):
        main(["compare", str(tmp_path / "short"), str(tmp_path / "long")])
    assert "only runs on the same test tasks can be compared" in " ".join(capsys.readouterr().err.split())


def test_runs_in_which_tasks_failed_are_not_compared(
    tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("one", "other"):
        main(["train", "navigation", *SMALL, "--skip-failures", "--out", str(tmp_path / name)])
    monkeypatch.setattr("fewstep.recipes.worlds.Navigation", lambda horizon: Broken(raises=False))
    drawn = RECIPES["navigation"].episodes("test")
    failing = int((torch.cat([drawn[0].support[0], drawn[1].support[0]])[:30, 0] > 0).sum())
    assert 0 < failing < 29
    with pytest.raises(SystemExit):
        main(["compare", str(tmp_path / "one"), str(tmp_path / "other"), "--episodes", "30"])
    assert f"{failing} of 30 test tasks failed in {tmp_path / 'one'}" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"delta": 0.0}, "delta must be above 0"), ({"iterations": 0}, "at least 1"), ({"stride": 0}, "at least 1")],
)
def test_wrong_trust_regions(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TrustRegion(**options)


def test_wrong_learners() -> None:
    plain = Learner(nn.Linear(2, 2), likelihood_ratio, SGD(0.1), steps=1, stream=True)
    with pytest.raises(InputError, match="must be a policy, but a Linear came"):
        Explorer(plain, Navigation())
    still = Learner(GaussianPolicy(2, 2), likelihood_ratio, SGD(0.1), steps=1)
    with pytest.raises(InputError, match="stream=True"):
        Explorer(still, Navigation())
    with pytest.raises(InputError, match="std must be at least"):
        GaussianPolicy(2, 2, std=0.0)
    for clip in (0.0, -1.0, float("nan")):
        with pytest.raises(InputError, match="clip must be above 0 and finite"):
            Clipped(clip)


class Silent(GaussianPolicy):
    """Does not say how many actions it has."""

    def __init__(self, *about: Any) -> None:
        super().__init__(*about)
        self.count, self.actions = self.actions, cast(int, None)

    def noise(self, shape: Sequence[int], generator: torch.Generator) -> Tensor:
        return torch.randn(*shape, self.count, generator=generator)

    def forward(self, observations: Tensor) -> Tensor:
        rows = observations.reshape(-1, observations.shape[-1])
        mean: Tensor = self.mean(rows).reshape(*observations.shape[:-1], self.count)
        return torch.cat([mean, self.log_std.expand_as(mean)], -1)


@pytest.mark.parametrize(
    ("policy", "world", "message"),
    [
        (GaussianPolicy(2, 1), Navigation(), r"actions are numbers of shape \[1\], but the world takes 2 numbers"),
        (Silent(2, 1), Navigation(), r"actions are numbers of shape \[1\], but the world takes 2 numbers"),
        (GaussianPolicy(3, 2), Navigation(), "takes observations of 3 numbers, but the world gives 2; build it for"),
        (CategoricalPolicy(2, 2), Navigation(), "the policy's actions are one of 2, but the world takes 2 numbers"),
        (GaussianPolicy(1, 5), Bandits(), r"actions are numbers of shape \[5\], but the world takes one of 5"),
        (CategoricalPolicy(1, 3), Bandits(), "the policy's actions are one of 3, but the world takes one of 5"),
        (GaussianPolicy(2, 2), Told(Navigation(), 2), "takes observations of 2 numbers, but the world gives 4"),
        (RecurrentPolicy(6, CategoricalPolicy(8, 2)), Trials(Navigation(), 2), "are one of 2, but the world takes 2 n"),
    ],
)  # fmt: skip
def test_a_policy_that_does_not_fit_the_world(policy: Policy, world: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Explorer(Learner(policy, likelihood_ratio, SGD(0.1), steps=1, stream=True), world)


def test_policies_that_fit() -> None:
    told = Told(Navigation(), 2)
    memory = RecurrentPolicy(6, GaussianPolicy(8, 2))
    for policy, world in ((Silent(2, 2), Navigation()), (policy_of(told), told), (memory, Trials(Navigation(), 2))):
        explorer = Explorer(Learner(policy, likelihood_ratio, SGD(0.1), steps=0, stream=True), world, trajectories=3)
        _, (lived,) = explorer.lived(EnvironmentEpisodes(tasks=2, environment=world)[0])
        assert lived.actions.shape == (2, 3, world.horizon, 2)
        assert lived.rewards.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trajectories": 0}, "at least 1 trajectory of each task, but 0 came"),
        ({"discount": 5.0}, "the discount must be from 0 to 1, but 5.0 came"),
        ({"decay": -0.1}, "the decay must be from 0 to 1, but -0.1 came"),
    ],
)
def test_wrong_options_of_an_explorer(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Explorer(build(), Navigation(), **options)


SMALL = ["--iterations", "2", "--meta-batch", "2", "--trajectories", "2", "--test-trajectories", "2", "--horizon", "5",
         "--stride", "3", "--inner-stride", "3", "--check-every", "1", "--validation-episodes", "2",
         "--test-episodes", "2", "--pretrain-iterations", "1"]  # fmt: skip


@pytest.mark.parametrize("outer", ["trpo", "ppo --ratio-clip 0.3 --kl-penalty 0.0005", "adam", "trpo --correction 1"])
def test_navigation_on_the_command_line(outer: str, tmp_path: Path) -> None:
    run = ["train", "navigation", *SMALL, "--outer", *outer.split(), "--out", str(tmp_path)]
    main(run)
    main([*run, "--iterations", "3"])
    main(["evaluate", str(tmp_path)])
    content = json.loads((tmp_path / "evaluation.json").read_text())
    assert content["metric"] == "return"
    assert [point["step"] for point in content["by_step"]] == [0, 1, 2, 3]
    ours, tuned, told = (entry["protocol"] for entry in (content, *list(content["baselines"].values())[1::2]))
    assert (ours["inner_lr"], ours["later_rate"], ours["steps_at_full_rate"]) == (0.1, 0.5, 1)
    assert (tuned["inner_lr"] in RATES, tuned["later_rate"]) == (True, 0.5)
    assert (told["inner_lr"], told["later_rate"]) == (None, None)
    inner = "likelihood_ratio" if "ppo" in outer else "reinforce"
    assert (ours["surrogate"], ours["discount"], ours["decay"]) == (inner, 0.99, 1.0)
    assert content["protocol"]["world"] == "2D navigation"
    assert {"pre-trained on all tasks, fine-tuned", "oracle, told the task"} < set(content["baselines"])
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 1, 2, 2, 3, 3]


@pytest.mark.parametrize("options", [["--surrogate", "dice"], ["--trajectories", "3"]], ids=" ".join)
def test_baselines_are_trained_where_trust_regions_have_no_part(options: list[str], tmp_path: Path) -> None:
    main(["train", "navigation", *SMALL, "--outer", "adam", *options, "--out", str(tmp_path)])
    main(["evaluate", str(tmp_path)])
    assert "oracle, told the task" in json.loads((tmp_path / "evaluation.json").read_text())["baselines"]


def test_what_a_recipe_brings_along_has_a_way_out() -> None:
    fast = cast(PolicyRecipe, RECIPES["half-cheetah-direction-fast"])
    with pytest.raises(InputError, match=r"--surrogate lvc has no part in --outer ppo; .*, or give --surrogate reinf"):
        dataclasses.replace(fast, outer="ppo")
    assert dataclasses.replace(fast, outer="ppo", surrogate="reinforce").outer == "ppo"


def test_later_steps_of_baselines_are_shorter_too() -> None:
    recipe = dataclasses.replace(cast(PolicyRecipe, RECIPES["navigation"]), inner_steps=2, later_rate=0.25)
    for steps in (2, 5):  # of the learner itself, and of a net that is fine-tuned
        learner = Learner(recipe.initial_model(), recipe.loss, SGD(1.0), steps=steps, **recipe.learner_options)
        judged = recipe.seen_by(learner)
        assert isinstance(judged, Explorer)
        theta = {"w": torch.zeros(1, 1)}
        moved = [judged.learner.update(theta, {"w": torch.ones(1, 1)}, None, step)[0]["w"].item() for step in range(4)]
        assert moved == [-1.0, -1.0, -0.25, -0.25]


def test_a_report_has_the_authors_curves_where_the_protocol_is_theirs() -> None:
    points = [{"step": step, "mean": -40.0 + step, "ci95": 1.0} for step in range(4)]
    about = {"recipe": "navigation", "name": "return", "metric": "return", "episodes": 40, "iterations": 100, "seed": 0}
    for horizon, expected in ((100, -11.68), (50, None)):
        protocol = {"world": "2D navigation", "horizon": horizon}
        figure = _by_step({**about, "by_step": points, "baselines": {}, "protocol": protocol})
        drawn = {line.get_label(): line.get_ydata() for line in figure.axes[0].get_lines()}
        theirs = drawn.get("authors' MAML")
        assert (None if theirs is None else np.asarray(theirs)[1]) == expected
        heights = [np.asarray(each.get_paths()[0].vertices)[:, 1] for each in figure.axes[0].collections]
        theirs_at_start = [height for height in heights if height.max() == pytest.approx(-3.23 + 0.578)]
        assert bool(theirs_at_start) == (expected is not None), "with its interval"
    assert list(drawn) == ["meta-learned"]


def test_a_report_marks_the_highest_return(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marked: list[Any] = []
    monkeypatch.setattr("fewstep.plots.training_figure", lambda *about: marked.append(about[-1]))
    losses = [{"step": step, "loss": 1.0, "seconds": 1.0} for step in (1, 2)]
    checks = [{"step": step, "validation_return": [-9.0, value]} for step, value in ((1, -3.0), (2, -2.0))]
    _training({"recipe": "navigation", "seed": 0, "inner_steps": 1}, [*losses, *checks], None)
    assert marked == [2]


def test_a_recipes_own_number_of_tasks_at_a_time_is_of_vmap_only() -> None:
    recipe = dataclasses.replace(RECIPES["navigation"], method="loop")
    assert (RECIPES["navigation"].engine.chunk, recipe.engine.chunk) == (5, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--plan"], "engines are not planned for policies yet"),
        (["--surrogate", "dice"], "the surrogate dice needs whole trajectories: inner_stride=1 (--inner-stride 1)"),
        (["--correction", "1", "--meta-batch", "1"], "--correction compares tasks with each other: --meta-batch must"),
        (["--recurrent-iterations", "-1"], "--recurrent-iterations must be at least 0, but -1 came"),
        (["--first-order-iterations", "-1"], "--first-order-iterations must be at least 0, but -1 came"),
        (["--first-order-iterations", "9", "--derivative", "none"], "but the run itself is first-order MAML"),
        (["--compile", "step"], "--compile step has no part in --outer trpo; give --compile pieces"),
        (["--method", "loop", "--chunk", "4"], "the method 'loop' takes one task at a time, but chunk=4 came"),
        (["--horizon", "0"], "--horizon must be at least 1, but 0 came"),
        (["--discount", "1.5"], "--discount must be from 0 to 1, but 1.5 came"),
        (["--decay", "-0.1"], "--decay must be from 0 to 1, but -0.1 came"),
        (["--delta", "0"], "delta must be above 0"),
        (["--epochs", "0"], "--epochs must be at least 1, but 0 came"),
        (["--later-rate", "0"], "--later-rate must be above 0 and at most 1, but 0.0 came"),
        (["--meta-lr", "0.1"], "--meta-lr 0.1 has no part in --outer trpo; leave it out, or give --meta-lr 0.001"),
        (["--outer", "ppo", "--surrogate", "lvc"], "--surrogate lvc has no part in --outer ppo; leave it out"),
        (["--trajectories", "14"], "--stride 7 and --trajectories 14 have a common divisor"),
        (["--inner-stride", "5"], "--inner-stride 5 and --trajectories 20 have a common divisor"),
        (["--correction", "-1"], "the weight of the correction must be above 0 and finite, but -1.0 came"),
        (["--outer", "adam", "--algorithm", "bmg", "--correction", "1"], "bmg has its own outer objective; leave out"),
        (["--delta", "nan"], "delta must be above 0"),
        (["--derivative", "finite_difference"], "TRPO's curvature is exact, and the derivative 'finite_difference' is"),
        (["--pretrain-iterations", "-1"], "--pretrain-iterations must be at least 0, but -1 came"),
        (["--damping", "inf"], "both finite"),
        (["--stride", "0"], "the counts at least 1"),
        (["--step-limit", "0"], "the limit of a step must be at least 0.01 seconds and finite, but 0.0 came"),
        (["--step-limit", "inf"], "be at least 0.01 seconds and finite, but inf came"),
        (["--algorithm", "proto_maml"], "proto_maml starts the head by classes, which policies lack; take another"),
    ],
)
def test_wrong_options_of_navigation(options: list[str], message: str, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        main(["train", "navigation", *options, "--out", str(tmp_path / "run")])
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()
