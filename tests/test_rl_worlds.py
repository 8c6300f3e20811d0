"""Bandits and tabular worlds against their tables, and any Gymnasium environment through a vector environment."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep import InputError, Learner
from fewstep.cli import main
from fewstep.rl import CategoricalPolicy, EnvironmentEpisodes, Explorer
from fewstep.rl.environments import Bandits, Environment, Navigation, TabularMDP
from fewstep.rl.surrogates import likelihood_ratio, reinforce
from fewstep.updates import SGD
from tests.test_rl import SMALL


def generators(count: int, first: int = 0) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(first + i) for i in range(count)]


def lived(world: Environment, tasks: Tensor, actions: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
    """Observations [H + 1, K, M, o] and rewards [H, K, M] by actions [H, K, M]."""
    seen = [world.reset(tasks, actions.shape[2], generators(len(tasks), first))]
    rewards: list[Tensor] = []
    for chosen in actions:
        following, reward, ended = world.step(chosen)
        assert not ended.any()
        seen, rewards = [*seen, following], [*rewards, reward]
    return torch.stack(seen), torch.stack(rewards)


def test_arms_pay_as_often_as_they_should() -> None:
    world, odds = Bandits(arms=3, horizon=20), torch.tensor([[0.1, 0.5, 0.9], [1.0, 0.0, 0.3]])
    actions = torch.randint(3, (20, 2, 2000), generator=torch.Generator().manual_seed(0))
    seen, rewards = lived(world, odds, actions)
    assert (seen == 1).all()
    for task in range(2):
        for arm in range(3):
            paid = rewards[:, task][actions[:, task] == arm].mean()
            assert paid.item() == pytest.approx(odds[task, arm].item(), abs=0.015)
    drawn = world.sample_tasks(4000, torch.Generator().manual_seed(0))
    assert drawn.mean().item() == pytest.approx(0.5, abs=0.02)
    assert drawn.var().item() == pytest.approx(1 / 12, abs=0.005)


def test_tabular_worlds_follow_their_tables() -> None:
    world = TabularMDP(states=3, actions=2, horizon=10)
    tasks = world.sample_tasks(2, torch.Generator().manual_seed(3))
    actions = torch.randint(2, (10, 2, 4000), generator=torch.Generator().manual_seed(0))
    seen, rewards = lived(world, tasks, actions)
    assert (seen[0].argmax(-1) == 0).all()
    states = seen.argmax(-1)
    for task in range(2):
        for state in range(3):
            for action in range(2):
                here = (states[:-1, task] == state) & (actions[:, task] == action)
                odds = torch.bincount(states[1:, task][here], minlength=3) / here.sum()
                torch.testing.assert_close(odds, tasks[task, state, action, :3], atol=0.02, rtol=0)
                of_rewards = rewards[:, task][here]
                assert of_rewards.mean().item() == pytest.approx(tasks[task, state, action, 3].item(), abs=0.06)
                assert of_rewards.std().item() == pytest.approx(1, abs=0.05)


def test_tables_are_drawn_from_flat_dirichlet_and_normal_distributions() -> None:
    drawn = TabularMDP(states=4, actions=2).sample_tasks(2000, torch.Generator().manual_seed(0))
    odds, means = drawn[..., :4], drawn[..., 4]
    torch.testing.assert_close(odds.sum(-1), torch.ones(2000, 4, 2))
    assert odds.var().item() == pytest.approx(3 / 80, rel=0.03), "variance of Dirichlet(1, 1, 1, 1): 3 / (16 * 5)"
    assert means.mean().item() == pytest.approx(1, abs=0.02)
    assert means.std().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("world", [Bandits(horizon=6), TabularMDP(horizon=6)], ids=["bandits", "tabular"])
def test_chance_belongs_to_a_task_however_tasks_are_cut(world: Environment) -> None:
    tasks = world.sample_tasks(3, torch.Generator().manual_seed(0))
    actions = torch.randint(2, (6, 3, 4), generator=torch.Generator().manual_seed(0))
    whole = lived(world, tasks, actions)
    for task in range(3):
        alone = lived(world, tasks[task : task + 1], actions[:, task : task + 1], first=task)
        for part, own in zip(whole, alone, strict=True):
            assert torch.equal(part[:, task : task + 1], own)


def test_a_policy_learns_a_bandit_by_its_gradient() -> None:
    torch.manual_seed(0)
    world = Bandits(arms=3, horizon=10)
    learner = Learner(CategoricalPolicy(1, 3, (16,)), likelihood_ratio, SGD(1.0), steps=3, inner_loss=reinforce,
                      stream=True)  # fmt: skip
    explorer = Explorer(learner, world, trajectories=40)
    tasks = EnvironmentEpisodes(tasks=40, environment=world)[0]
    by_step = [-point.loss.mean().item() for point in explorer.path(tasks, 3)]
    best = 10 * tasks.support[0].max(1).values.mean().item()
    assert by_step[0] == pytest.approx(10 * tasks.support[0].mean().item(), abs=0.5)
    assert by_step[0] + 1 < by_step[3] < best + 0.2


@pytest.mark.parametrize("recipe", ["bandits", "tabular-mdp"])
def test_discrete_worlds_on_the_command_line(recipe: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    main(["train", recipe, *SMALL, "--out", str(run)])
    main(["evaluate", str(run)])
    content = json.loads((run / "evaluation.json").read_text())
    assert content["recipe"] == recipe
    assert len(content["by_step"]) == 4


def test_worlds_that_cannot_be() -> None:
    with pytest.raises(InputError, match="at least 2 arms, but 1 came"):
        Bandits(arms=1)
    with pytest.raises(InputError, match="states and actions must be at least 1, but 0 and 5 came"):
        TabularMDP(states=0)


# Any Gymnasium environment.


def test_a_vector_environment_is_the_same_world() -> None:
    pytest.importorskip("gymnasium", reason="the extra rl is not installed")
    from fewstep.rl.environments.single import Single
    from fewstep.rl.environments.vectorised import Vectorised

    own, wrapped = Navigation(horizon=5), Vectorised(lambda: Single(Navigation(horizon=5)), horizon=5)
    assert (wrapped.observations, wrapped.actions, wrapped.discrete) == (2, 2, False)
    tasks = wrapped.sample_tasks(3, torch.Generator().manual_seed(0))
    assert tasks.shape == (3, 2)
    assert torch.equal(tasks, wrapped.sample_tasks(3, torch.Generator().manual_seed(0)))
    assert torch.equal(wrapped.reset(tasks, 2, generators(3)), own.reset(tasks.double(), 2, generators(3)))
    for step in range(5):
        actions = torch.randn(3, 2, 2, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        (seen, rewards, _), (wanted, paid, _) = wrapped.step(actions), own.step(actions)
        torch.testing.assert_close(seen, wanted, atol=1e-12, rtol=0)
        torch.testing.assert_close(rewards, paid, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["single", "vectorised", "meta_world"])
def test_without_gymnasium_it_is_told_what_to_install(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gymnasium", None)
    for module in (name, "gym"):
        monkeypatch.delitem(sys.modules, f"fewstep.rl.environments.{module}", raising=False)
    with pytest.raises(InputError, match=r"needs Gymnasium: pip install 'fewstep\[rl\]', or"):
        importlib.import_module(f"fewstep.rl.environments.{name}")


def test_boxes_are_stretched_and_choices_are_passed_on() -> None:
    gymnasium = pytest.importorskip("gymnasium", reason="the extra rl is not installed")
    from fewstep.rl.environments.vectorised import Vectorised

    class Echo(gymnasium.Env):  # type: ignore[misc, name-defined]
        """Pays the sum of what it is told to do, and its task; ends after two steps."""

        observation_space = gymnasium.spaces.Discrete(3)

        def __init__(self, space: Any) -> None:
            self.action_space, self.steps = space, 0

        def sample_tasks(self, count: int, seed: int) -> Any:
            return np.random.default_rng(seed).uniform(size=(count, 1))

        def set_task(self, task: Any) -> None:
            self.own = float(task[0])

        def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
            self.steps = 0
            return 0, {}

        def step(self, action: Any) -> Any:
            self.steps += 1
            return self.steps % 3, float(np.sum(action)) + self.own, self.steps == 2, False, {}

    tasks = torch.tensor([[0.25], [0.5]])
    box = gymnasium.spaces.Box(np.array([0.0, -np.inf], np.float32), np.array([10.0, np.inf], np.float32))
    half = gymnasium.spaces.Box(np.zeros(2, np.float32), np.full(2, np.inf, np.float32))
    huge = gymnasium.spaces.Box(*(np.full(1, sign * np.finfo(np.float32).max) for sign in (-1, 1)))
    for space, actions, paid in (
        (box, torch.tensor([[[-3.0, 7.0]], [[0.0, 7.0]]]), [7.25, 12.5]),
        (half, torch.tensor([[[-3.0, 7.0]], [[2.0, -7.0]]]), [7.25, 2.5]),
        (huge, torch.tensor([[[-3.0]], [[2.0]]]), [-2.75, 2.5]),
        (gymnasium.spaces.Discrete(5), torch.tensor([[4], [1]]), [4.25, 1.5]),
        (gymnasium.spaces.Discrete(5, start=-2), torch.tensor([[4], [1]]), [2.25, -0.5]),
    ):
        world = Vectorised(lambda space=space: Echo(space), horizon=5)  # type: ignore[misc]
        assert torch.equal(world.reset(tasks, 1, generators(2)), torch.tensor([[[1, 0, 0]], [[1, 0, 0]]]))
        _, rewards, ended = world.step(actions)
        assert rewards.flatten().tolist() == paid
        assert not ended.any()
        assert world.step(actions)[2].all()
        world.close()

    class Deaf(Echo):
        set_task: Any = property()

    with pytest.raises(InputError, match="Deaf has no set_task"):
        Vectorised(lambda: Deaf(box), horizon=5)
    for space in (gymnasium.spaces.MultiBinary(3), gymnasium.spaces.Box(0, 3, (2,), np.int64)):
        with pytest.raises(InputError, match="a Discrete or a Box of one dimension of real numbers"):
            Vectorised(lambda space=space: Echo(space), horizon=5)  # type: ignore[misc]
    blurred = Echo(box)
    blurred.observation_space = gymnasium.spaces.Sequence(gymnasium.spaces.Discrete(3))
    with pytest.raises(InputError, match="pad them to a Box"):
        Vectorised(lambda: blurred, horizon=5)
    for draw in (lambda count: np.zeros(count), lambda count, seed: [{"own": 0.5}] * count):
        told = Echo(box)
        told.sample_tasks = draw  # type: ignore[method-assign, assignment]
        with pytest.raises(InputError, match=r"must give an array of numbers \[count, ...\].*but: "):
            Vectorised(lambda told=told: told, horizon=5).sample_tasks(2, torch.Generator())  # type: ignore[misc]
