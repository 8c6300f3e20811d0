"""The half-cheetah and the ant against Gymnasium's own, and against MuJoCo stepped by hand."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fewstep import InputError
from fewstep.cli import main
from fewstep.rl.environments import Ant, HalfCheetah
from tests.test_rl import SMALL

gymnasium = pytest.importorskip("gymnasium", reason="the extra rl is not installed")
mujoco = pytest.importorskip("mujoco", reason="the extra rl is not installed")
# Gymnasium's own environments read its files as they are, of which MuJoCo warns.
pytestmark = pytest.mark.filterwarnings("ignore:compiler attribute 'settotalmass'", "ignore::DeprecationWarning")
GOALS = {"velocity": [0.5, 1.5], "direction": [1.0, -1.0]}


def reset(world: HalfCheetah) -> tuple[torch.Tensor, Any, Any]:
    goals = torch.tensor(GOALS[world.task])[:, None]
    seen = world.reset(goals, 2, [torch.Generator().manual_seed(i) for i in range(2)])
    physics = world.physics
    return seen, physics.positions.copy(), physics.velocities.copy()


def script(steps: int) -> Any:
    return np.random.default_rng(0).uniform(-1.5, 1.5, size=(steps, 4, 6))


def wanted(task: str, goal: float, velocity: float) -> float:
    return goal * velocity if task == "direction" else -abs(velocity - goal)


@pytest.mark.parametrize("task", GOALS)
def test_the_gymnasium_flavour_is_gymnasiums_to_the_bit(task: Any) -> None:
    world = HalfCheetah(task, "gymnasium")
    seen, positions, velocities = reset(world)
    lived = [world.step(torch.tensor(actions).reshape(2, 2, 6)) for actions in script(20)]
    own = gymnasium.make("HalfCheetah-v5").unwrapped
    for sim in range(4):
        own.reset(seed=0)
        own.set_state(positions[sim], velocities[sim])
        assert np.array_equal(own._get_obs(), seen.reshape(4, -1)[sim].numpy())
        for (observations, rewards, ended), actions in zip(lived, script(20), strict=True):
            action, before = actions[sim].clip(-1, 1), own.data.qpos[0]
            expected, _, _, _, _ = own.step(action)
            velocity = (own.data.qpos[0] - before) / own.dt
            assert np.array_equal(observations.reshape(4, -1)[sim].numpy(), expected)
            reward = wanted(task, GOALS[task][sim // 2], velocity) - 0.05 * (action**2).sum()
            assert rewards.flatten()[sim].item() == pytest.approx(reward, abs=1e-12)
            assert not ended.any()


@pytest.mark.parametrize("task", GOALS)
def test_the_paper_flavour_by_hand(task: Any) -> None:
    world = HalfCheetah(task)
    seen, positions, velocities = reset(world)
    lived = [(seen, None), *(world.step(torch.tensor(a).reshape(2, 2, 6))[:2] for a in script(20))]
    file = Path(gymnasium.__file__).parent / "envs/mujoco/assets/half_cheetah.xml"
    model = mujoco.MjModel.from_xml_path(str(file))
    assert model.opt.timestep == 0.01
    assert world.physics.dt == 0.01, "no frame is skipped"
    assert sum(model.body_mass) == pytest.approx(14)
    torso = model.body("torso").id
    for sim in range(4):
        data = mujoco.MjData(model)
        data.qpos[:], data.qvel[:] = positions[sim], velocities[sim]
        mujoco.mj_forward(model, data)
        for step, (observations, rewards) in enumerate(lived):
            if rewards is not None:
                action = script(20)[step - 1, sim].clip(-1, 1)
                data.ctrl[:] = action
                mujoco.mj_step(model, data)
                mujoco.mj_step1(model, data)  # position and velocity stages at the new state
                mujoco.mj_subtreeVel(model, data)
                reward = wanted(task, GOALS[task][sim // 2], data.subtree_linvel[torso][0]) - 0.05 * (action**2).sum()
                assert rewards.flatten()[sim].item() == pytest.approx(reward, abs=1e-9)
            expected = np.concatenate([data.qpos[1:], data.qvel, data.subtree_com[torso]])
            np.testing.assert_allclose(observations.reshape(4, -1)[sim].numpy(), expected, atol=1e-9)


def ants(world: Ant) -> tuple[Any, Any, Any]:
    seen = world.reset(torch.tensor(GOALS[world.task])[:, None], 2, [torch.Generator().manual_seed(i) for i in (0, 1)])
    physics = world.physics
    return seen, physics.positions.copy(), physics.velocities.copy()


@pytest.mark.parametrize("task", GOALS)
def test_the_papers_ant_by_hand(task: Any) -> None:
    world = Ant(task)
    _, positions, velocities = ants(world)
    actions = np.random.default_rng(0).uniform(-1.5, 1.5, size=(40, 4, 8))
    lived = [world.step(torch.tensor(a).reshape(2, 2, 8)) for a in actions]
    spec = mujoco.MjSpec.from_file(str(Path(gymnasium.__file__).parent / "envs/mujoco/assets/ant.xml"))
    spec.option.timestep = 0.02
    for geom in spec.geoms:
        geom.solref, geom.solimp = [0.02, 1], [0.8, 0.8, 0.01, 0.5, 2]
    model = spec.compile()
    assert model.opt.integrator == mujoco.mjtIntegrator.mjINT_RK4
    assert positions[:, 2].mean() == pytest.approx(0.55, abs=0.05)
    torso, felt = model.body("torso").id, 0.0
    for sim in range(4):
        data = mujoco.MjData(model)
        data.qpos[:], data.qvel[:] = positions[sim], velocities[sim]
        for step, (observations, rewards, ended) in enumerate(lived):
            data.ctrl[:] = actions[step, sim].clip(-1, 1)
            mujoco.mj_forward(model, data)
            mujoco.mj_rnePostConstraint(model, data)
            forces = data.cfrc_ext.clip(-1, 1).copy()
            felt += abs(forces).sum()
            mujoco.mj_step(model, data)
            mujoco.mj_step1(model, data)
            mujoco.mj_subtreeVel(model, data)
            state = [data.qpos, data.qvel, forces.ravel(), data.xmat[torso], data.subtree_com[torso]]
            np.testing.assert_allclose(observations.reshape(4, -1)[sim].numpy(), np.concatenate(state), atol=1e-9)
            velocity, goal = data.subtree_linvel[torso][0], GOALS[task][sim // 2]
            reward = goal * velocity if task == "direction" else 1 - abs(velocity - goal)
            reward += 0.05 - 0.005 * (data.ctrl**2).sum() - 0.0005 * (forces**2).sum()
            assert rewards.flatten()[sim].item() == pytest.approx(reward, abs=1e-9)
            assert bool(ended.flatten()[sim]) == (not 0.2 <= data.qpos[2] <= 1.0)
    assert felt > 0, "no foot touched the ground"


def test_the_gymnasium_ant_moves_as_gymnasiums() -> None:
    world = Ant("velocity", "gymnasium")
    _, positions, velocities = ants(world)
    actions = np.random.default_rng(0).uniform(-1, 1, size=(15, 4, 8))
    lived = [world.step(torch.tensor(a).reshape(2, 2, 8))[0].reshape(4, -1).numpy() for a in actions]
    own = gymnasium.make("Ant-v5").unwrapped
    for sim in range(4):
        own.reset(seed=0)
        own.set_state(positions[sim], velocities[sim])
        for step in range(15):
            expected, *_ = own.step(actions[step, sim])
            assert np.array_equal(lived[step][sim][:27], expected[:27]), "positions and velocities, to the bit"


def test_starts_and_tasks() -> None:
    for flavour, spread in (("paper", 0.01), ("gymnasium", 0.2 / 12**0.5)):
        world = HalfCheetah("velocity", flavour)  # type: ignore[arg-type]
        world.reset(torch.ones(20, 1), 100, [torch.Generator().manual_seed(i) for i in range(20)])
        physics = world.physics
        assert (physics.positions - physics.rest).std() == pytest.approx(spread, rel=0.05)
        assert physics.velocities.std() == pytest.approx(0.1, rel=0.05)
    drawn = HalfCheetah("velocity").sample_tasks(1000, torch.Generator().manual_seed(0))
    assert 0 <= drawn.min() < 0.1
    assert 1.9 < drawn.max() <= 2
    drawn = HalfCheetah("direction").sample_tasks(1000, torch.Generator().manual_seed(0))
    assert set(drawn.flatten().tolist()) == {-1.0, 1.0}


def test_wrong_tasks_and_a_missing_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(InputError, match="the task must be 'velocity' or 'direction'"):
        HalfCheetah("speed")  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "mujoco", None)
    with pytest.raises(InputError, match=r"pip install 'fewstep\[rl\]'"):
        HalfCheetah()
    with pytest.raises(SystemExit):
        main(["train", "ant-velocity", "--out", str(tmp_path / "run")])
    assert "pip install 'fewstep[rl]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("recipe", ["half-cheetah-direction", "ant-velocity"])
def test_runners_on_the_command_line(recipe: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    main(["train", recipe, *SMALL, "--out", str(run)])
    main(["evaluate", str(run)])
    content = json.loads((run / "evaluation.json").read_text())
    assert content["recipe"] == recipe
    assert len(content["by_step"]) == 4


WORLDS = [("fewstep/Navigation-v0", {}), ("fewstep/HalfCheetah-v0", {}),
          ("fewstep/HalfCheetah-v0", {"task": "direction", "flavour": "gymnasium"}), ("fewstep/Ant-v0", {}),
          ("fewstep/Ant-v0", {"flavour": "gymnasium"}), ("fewstep/Bandits-v0", {}),
          ("fewstep/TabularMDP-v0", {})]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*A Box observation space m")
@pytest.mark.parametrize(("name", "options"), WORLDS, ids=str)
def test_as_gymnasium_environments(name: str, options: dict[str, Any]) -> None:
    from gymnasium.utils.env_checker import check_env

    from fewstep.rl.environments.single import register

    register()
    env = gymnasium.make(name, horizon=4, **options).unwrapped
    check_env(env, skip_render_check=True)
    tasks = env.sample_tasks(3, seed=1)
    assert np.array_equal(tasks, env.sample_tasks(3, seed=1))
    env.set_task(tasks[0])
    _, told = env.reset(seed=0)
    assert np.array_equal(told["task"], tasks[0])
    lived = [env.step(env.action_space.sample()) for _ in range(4)]
    assert [truncated for _, _, _, truncated, _ in lived] == [False, False, False, True]
    with pytest.raises(InputError, match="a task has the shape"):
        env.set_task([1.0, 2.0, 3.0])
