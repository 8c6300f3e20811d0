"""Meta-World: its own package where it is installed, and a stand-in with its interface where it is not."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest

from fewstep import InputError
from fewstep.cli import main
from fewstep.recipes import worlds
from tests.test_rl import SMALL

gymnasium = pytest.importorskip("gymnasium", reason="the extra rl is not installed")


class Arm:
    """It is paid the goal of its task, less how large its action is."""

    observation_space: ClassVar[Any] = gymnasium.spaces.Box(-1.0, 1.0, (3,), np.float64)
    action_space: ClassVar[Any] = gymnasium.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def set_task(self, task: Any) -> None:
        self.goal = task.data

    def reset(self, seed: int | None = None) -> Any:
        return np.zeros(3), {}

    def step(self, action: Any) -> Any:
        return np.zeros(3), self.goal - float((action**2).sum()), False, False, {}

    def close(self) -> None:
        pass


def benchmark(train: dict[str, Any], test: dict[str, Any]) -> Any:
    def tasks(classes: dict[str, Any], start: int) -> list[Any]:
        return [SimpleNamespace(env_name=name, data=start + i) for i, name in enumerate([*classes] * 2)]

    return SimpleNamespace(train_classes=train, test_classes=test, train_tasks=tasks(train, 0),
                           test_tasks=tasks(test, 100))  # fmt: skip


def caches() -> list[Any]:
    from fewstep.rl.environments import meta_world

    return [worlds._meta_world, meta_world._made]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def one(name: str, seed: int) -> Any:
        if name != "reach-v3":
            raise ValueError(f"{name} is not a V3 environment")
        return benchmark({name: Arm}, {name: Arm})

    package: Any = SimpleNamespace(
        ML1=one, ML10=lambda seed: benchmark({"a": Arm, "b": Arm}, {"c": type("Other", (Arm,), {})})
    )
    monkeypatch.setitem(sys.modules, "metaworld", package)
    for cached in caches():
        cached.cache_clear()
    yield
    for cached in caches():
        cached.cache_clear()


def test_tasks_are_numbers_over_all_classes(stand_in: None) -> None:
    from fewstep.rl.environments.meta_world import MetaWorld

    train, test = (MetaWorld("ML10", split=split) for split in ("train", "test"))
    drawn = train.sample_tasks(200, seed=0)
    assert drawn.shape == (200, 1)
    assert set(drawn.flatten()) == {0, 1, 2, 3}
    assert np.array_equal(drawn, train.sample_tasks(200, seed=0))
    assert set(test.sample_tasks(50, seed=0).flatten()) == {4, 5}
    train.set_task([5.0])  # a task of the other split may be set
    observation, _ = train.reset(seed=0)
    assert observation.shape == (3,)
    assert train.step(np.zeros(2))[1] == 101
    assert type(train._arm).__name__ == "Other"
    train.close()


def test_on_the_command_line(stand_in: None, tmp_path: Path, capsys: Any) -> None:
    small = [*SMALL[:-2], "--pretrain-iterations", "0"]
    main(["train", "meta-world", "--benchmark", "ML10", *small, "--out", str(tmp_path / "run")])
    main(["evaluate", str(tmp_path / "run")])
    content = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert content["protocol"]["world"] == "Meta-World ML10"
    assert content["by_step"][0]["mean"] > 5 * 90, "test tasks are paid by 100 and more"
    with pytest.raises(SystemExit):
        main(["train", "meta-world", "--name", "reach-v9", "--out", str(tmp_path / "other")])
    assert "Meta-World has no ML1 of reach-v9" in capsys.readouterr().err


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    from fewstep.rl.environments.meta_world import MetaWorld

    monkeypatch.setitem(sys.modules, "metaworld", None)
    with pytest.raises(InputError, match=r"pip install 'fewstep\[metaworld\]'"):
        MetaWorld()


def test_the_real_package() -> None:
    pytest.importorskip("metaworld", reason="the extra metaworld is not installed")
    from fewstep.rl.environments.meta_world import MetaWorld

    env = MetaWorld("ML1", "reach-v3")
    assert (env.observation_space.shape, env.action_space.shape) == ((39,), (4,))
    env.set_task(env.sample_tasks(1, seed=0)[0])
    observation, _ = env.reset(seed=0)
    assert np.array_equal(observation[-3:], np.zeros(3)), "the goal is not told"
    _, reward, *_ = env.step(np.zeros(4))
    assert 0 < reward < 10
