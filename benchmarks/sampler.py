"""Environment steps a second: ours with a policy in the loop, beside bare stepping and Gymnasium's vector environment.

python -m benchmarks.sampler [--tasks N] [--trajectories N] [--horizon N] [--rounds N]
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np
import torch

from benchmarks.workloads import origin
from fewstep.rl import GaussianPolicy
from fewstep.rl.environments import Ant, HalfCheetah
from fewstep.rl.rollout import rollout

WORLDS: dict[str, tuple[Callable[..., Any], str, str | None]] = {
    "half-cheetah, gymnasium": (HalfCheetah, "gymnasium", "HalfCheetah-v5"),
    "ant, gymnasium": (Ant, "gymnasium", "Ant-v5"),
    "half-cheetah, paper": (HalfCheetah, "paper", None),
    "ant, paper": (Ant, "paper", None),
}


@dataclass(frozen=True)
class Options:
    """What to time."""

    tasks: int = 40
    """Tasks, each with a policy of its own."""
    trajectories: int = 20
    """Trajectories of each."""
    horizon: int = 50
    """Steps of each."""
    vector: int = 40
    """Environments in Gymnasium's vector environment."""
    rounds: int = 3
    """Turns of each; medians are told."""


def main(options: Options) -> None:
    """Print a row for each world: steps a second, and ratios within each round."""
    warnings.filterwarnings("ignore", message="compiler attribute")
    print(origin("benchmarks.sampler"))
    print("| world | policy | ours, steps/s | bare, steps/s | of bare | Gymnasium's, steps/s | times as fast |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for name, (build, flavour, theirs) in WORLDS.items():
        hidden = (64, 64) if theirs else (100, 100)
        world = build("velocity", flavour, options.horizon)
        policy = GaussianPolicy(world.observations, world.actions, hidden)
        turns: list[Callable[[], float]] = [_ours(world, policy, options), _bare(world, options)]
        turns += [_theirs(theirs, policy, options)] if theirs else []
        rounds = [[turn() for turn in turns] for _ in range(options.rounds + 1)][1:]  # the first warms up
        ours, bare, *others = (median(column) for column in zip(*rounds, strict=True))
        of_bare = median(each[0] / each[1] for each in rounds)
        beside = f"{others[0]:,.0f} | {median(each[0] / each[2] for each in rounds):.2f}" if others else " | "
        print(f"| {name} | {hidden[0]}x{hidden[1]} | {ours:,.0f} | {bare:,.0f} | {100 * of_bare:.0f} % | {beside} |")


def _ours(world: Any, policy: GaussianPolicy, options: Options) -> Callable[[], float]:
    """A rollout as training makes it; steps of trajectories that have not ended."""
    theta = {n: v.detach().expand(options.tasks, *v.shape).clone() for n, v in policy.named_parameters()}
    goals = world.sample_tasks(options.tasks, torch.Generator().manual_seed(0))

    def turn() -> float:
        generators = [torch.Generator().manual_seed(i) for i in range(options.tasks)]
        start = time.perf_counter()
        lived = rollout(policy, theta, world, goals, options.trajectories, generators)
        return int(lived.mask.sum()) / (time.perf_counter() - start)

    return turn


def _bare(world: Any, options: Options) -> Callable[[], float]:
    """The physics alone, under random controls."""

    def turn() -> float:
        physics = world.physics
        generators = [torch.Generator().manual_seed(i) for i in range(options.tasks)]
        physics.start(*world.start(options.trajectories, generators))
        controls = np.random.default_rng(0).uniform(-1, 1, (options.horizon, physics.count, world.actions))
        going = np.ones(physics.count, bool)
        start = time.perf_counter()
        for each in controls:
            physics.step(each, going)
        rate: float = options.horizon * physics.count / (time.perf_counter() - start)
        return rate

    return turn


def _theirs(name: str, policy: GaussianPolicy, options: Options) -> Callable[[], float]:
    """Gymnasium's own loop over environments, with one policy for all."""
    import gymnasium

    environments: Any = gymnasium.make_vec(name, num_envs=options.vector, vectorization_mode="sync")

    @torch.no_grad()
    def turn() -> float:
        torch.set_num_threads(1)
        seen, _ = environments.reset(seed=0)
        start = time.perf_counter()
        for _ in range(options.horizon):
            outputs = policy(torch.from_numpy(seen).float())
            actions = policy.act(outputs, torch.randn(options.vector, environments.single_action_space.shape[0]))
            seen, *_ = environments.step(actions.clamp(-1, 1).numpy())
        return options.horizon * options.vector / (time.perf_counter() - start)

    return turn


if __name__ == "__main__":
    import tyro

    tyro.cli(main, config=(tyro.conf.OmitArgPrefixes,))
