"""Policies that remember: the cell against PyTorch's, step by step against whole trials, and what they learn."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import nn

from fewstep import InputError, Learner
from fewstep.cli import main
from fewstep.evaluate import evaluate
from fewstep.meta_step import MetaStep
from fewstep.recipes import RECIPES
from fewstep.recipes.policies import PolicyRecipe
from fewstep.rl import Ascent, EnvironmentEpisodes, Explorer, InContext, RecurrentPolicy, policy_of
from fewstep.rl.environments import Bandits, Environment, Navigation, Trials
from fewstep.rl.surrogates import Clipped
from fewstep.updates import SGD
from tests.test_rl import SMALL, Broken


def build(world: Environment, episodes: int, size: int = 6) -> tuple[Learner, Trials]:
    torch.manual_seed(0)
    trials = Trials(world, episodes)
    policy = RecurrentPolicy(trials.observations, policy_of(trials, size, hidden=()))
    return Learner(policy, Clipped(), SGD(1.0), steps=0, stream=True), trials


def test_the_cell_is_pytorchs() -> None:
    learner, _ = build(Navigation(), 2)
    policy: Any = learner.model
    own: Any = nn.GRU(policy.observations, 6, batch_first=True)
    with torch.no_grad():
        own.weight_ih_l0.copy_(policy.seen.weight)
        own.bias_ih_l0.copy_(policy.seen.bias)
        own.weight_hh_l0.copy_(policy.past.weight)
        own.bias_hh_l0.copy_(policy.past.bias)
    seen = torch.randn(3, 9, policy.observations)
    torch.testing.assert_close(policy(seen), policy.head(own(seen)[0]))


@pytest.mark.parametrize("world", [Navigation(horizon=4), Bandits(arms=3, horizon=4)], ids=lambda w: type(w).__name__)
def test_step_by_step_is_the_whole_trial(world: Environment) -> None:
    learner, trials = build(world, 3)
    tasks = EnvironmentEpisodes(tasks=2, environment=world)[0]
    (lived,) = Explorer(learner, trials, trajectories=5).walk(tasks, 0)
    assert lived.rewards.shape == (2, 5, 12)
    torch.testing.assert_close(learner.model(lived.observations), lived.outputs)
    *_, begins = lived.observations.unbind(-1)
    assert begins[0, 0].tolist() == [1.0, 0, 0, 0] * 3
    rewards = lived.observations[..., -2]
    torch.testing.assert_close(rewards[..., 1:], lived.rewards[..., :-1])


def test_an_episode_that_ends_early_waits_for_the_next() -> None:
    trials = Trials(Navigation(horizon=3), 2)
    trials.reset(torch.tensor([[0.2, 0.0]]), 1, [torch.Generator()])
    to_goal = torch.tensor([[[1.0, 0.0]]])
    found = [trials.step(to_goal) for _ in range(6)]
    assert not any(ended.any() for _, _, ended in found)
    rewards = [float(reward) for _, reward, _ in found]
    assert rewards == pytest.approx([-0.1, 0, 0] * 2, abs=1e-6), "at the goal it ends; then nothing counts"
    begins = [float(seen[..., -1]) for seen, _, _ in found[:5]]  # what follows the last step, nobody sees
    assert begins == [0, 0, 1, 0, 0]
    assert found[1][0][0, 0, :2].tolist() == [0.0, 0.0]
    assert float(found[3][0][0, 0, 0]) == pytest.approx(0.1), "after the new start, it walks again"


def test_it_learns_to_remember() -> None:
    world = Bandits(arms=2, horizon=5)
    learner, trials = build(world, 3, size=16)
    adam = MetaStep(learner, torch.optim.Adam(learner.parameters()))
    step = Ascent(Explorer(learner, trials, trajectories=10, decay=0.9), adam, epochs=5)
    episodes = EnvironmentEpisodes(tasks=40, environment=world)
    for number in range(30):
        step(episodes[number], 0.01)
    judged = InContext(learner, world, trajectories=10)
    held_out = EnvironmentEpisodes(tasks=50, environment=world, seed=1)
    first, _, last = evaluate(judged, held_out, metric="return", steps=2, count=100).by_step
    assert last.mean > first.mean + 0.1
    assert last.mean > 5 * 0.5 + 0.6, "without a memory every policy gets 2.5"


@pytest.mark.parametrize("raises", [True, False], ids=["raises", "NaN"])
def test_it_is_judged_without_tasks_that_fail(raises: bool) -> None:
    world = Broken(raises)
    learner, _ = build(world, 3)
    episodes = EnvironmentEpisodes(tasks=10, environment=world)
    fine = int((episodes[0].support[0][:, 0] <= 0).sum())
    assert 1 < fine < 10
    judged = InContext(learner, world, trajectories=2, skip_failures=True)
    assert evaluate(judged, episodes, metric="return", steps=2, count=10).episodes == fine
    with pytest.raises(InputError, match=f"{10 - fine} of 10 tasks of the environment failed"):
        evaluate(InContext(learner, world, trajectories=2), episodes, metric="return", steps=2, count=10)
    recipe = dataclasses.replace(cast(PolicyRecipe, RECIPES["navigation"]), skip_failures=True)
    seen = recipe.seen_by(learner)
    assert isinstance(seen, InContext)
    assert seen.skip_failures


def test_as_a_baseline_on_the_command_line(tmp_path: Path) -> None:
    run = ["train", "navigation", *SMALL, "--out", str(tmp_path)]
    main(run)
    main([*run, "--recurrent-iterations", "1"])
    main(["evaluate", str(tmp_path)])
    baselines = json.loads((tmp_path / "evaluation.json").read_text())["baselines"]
    found = baselines["RL^2, by its memory of as many episodes"]
    assert [point["step"] for point in found["by_step"]] == [0, 1, 2, 3]
    assert found["training"]["episodes"] == 4
