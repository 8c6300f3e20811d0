"""Meta-World's manipulation tasks (Yu et al. 2019, arXiv 1910.10897), by its own package."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any, Literal

import numpy as np

from fewstep.errors import InputError
from fewstep.rl.environments.gym import gymnasium

INSTALL = (
    "Meta-World is a package of its own, whose MuJoCo is not that of fewstep[rl]: in an environment of its own, "
    "pip install 'fewstep[metaworld]'"
)
Benchmark = Literal["ML1", "ML10", "ML45"]


class MetaWorld(gymnasium.Env[Any, Any]):
    """One arm, one of many tasks, whose goal is not told.

    benchmark : "ML1", goals of one class `name`; "ML10" and "ML45", other classes at test than in training
    split : whose tasks `sample_tasks` draws, those of training or of test
    A task [1] is its number among all of the benchmark, those of training first. 39 observations, 4 actions in -1..1.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012  (Gymnasium's own form)

    def __init__(self, benchmark: Benchmark = "ML1", name: str = "reach-v3",
                 split: Literal["train", "test"] = "train") -> None:  # fmt: skip
        made = _made(benchmark, name)
        self._classes = {**made.train_classes, **made.test_classes}
        self._tasks = [*made.train_tasks, *made.test_tasks]
        trained = len(made.train_tasks)
        self._numbers = range(trained) if split == "train" else range(trained, len(self._tasks))
        self._arms: dict[str, Any] = {}
        self.set_task([self._numbers[0]])
        self.observation_space, self.action_space = self._arm.observation_space, self._arm.action_space

    def sample_tasks(self, count: int, seed: int | None = None) -> Any:
        """Numbers of tasks [count, 1]; the same for the same seed."""
        return np.random.default_rng(seed).choice(self._numbers, (count, 1)).astype(float)

    def set_task(self, task: Any) -> None:
        """What to do from the next `reset` on."""
        chosen = self._tasks[int(task[0])]
        if chosen.env_name not in self._arms:
            self._arms[chosen.env_name] = self._classes[chosen.env_name]()
        self._arm = self._arms[chosen.env_name]
        self._arm.set_task(chosen)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        return self._arm.reset(seed=seed)

    def step(self, action: Any) -> Any:
        return self._arm.step(action)

    def close(self) -> None:
        for arm in self._arms.values():
            arm.close()


@cache  # to draw the tasks takes seconds, and all environments share them
def _made(benchmark: Benchmark, name: str) -> Any:
    try:
        package = import_module("metaworld")
    except ImportError as error:
        raise InputError(INSTALL) from error
    if benchmark != "ML1":
        return getattr(package, benchmark)(seed=0)
    try:
        return package.ML1(name, seed=0)
    except (KeyError, ValueError) as error:
        raise InputError(f"Meta-World has no ML1 of {name}: {error}") from error
