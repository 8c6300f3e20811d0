"""Environments with tasks, one a file: many trajectories of many tasks at once, and as Gymnasium environments."""

from fewstep.rl.environments.ant import Ant
from fewstep.rl.environments.bandits import Bandits
from fewstep.rl.environments.base import Environment
from fewstep.rl.environments.half_cheetah import HalfCheetah
from fewstep.rl.environments.humanoid import Humanoid
from fewstep.rl.environments.navigation import Navigation
from fewstep.rl.environments.runner import Runner
from fewstep.rl.environments.tabular import TabularMDP
from fewstep.rl.environments.told import Told
from fewstep.rl.environments.trials import Trials
from fewstep.rl.environments.walker import Walker

__all__ = [
    "WORLDS",
    "Ant",
    "Bandits",
    "Environment",
    "HalfCheetah",
    "Humanoid",
    "Navigation",
    "Runner",
    "TabularMDP",
    "Told",
    "Trials",
    "Walker",
]

# By the names that `fewstep.rl.environments.single.register` gives them in Gymnasium.
WORLDS: dict[str, type[Environment]] = {
    f"fewstep/{world.__name__}-v0": world
    for world in (Navigation, HalfCheetah, Ant, Walker, Humanoid, Bandits, TabularMDP)
}
