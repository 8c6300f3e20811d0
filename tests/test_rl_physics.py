"""The half-cheetah and the ant against Gymnasium's own, and against MuJoCo stepped by hand."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fewstep import InputError, Learner, Task
from fewstep.cli import main
from fewstep.rl import Explorer, policy_of
from fewstep.rl.environments import Ant, HalfCheetah, Humanoid, Walker
from fewstep.rl.surrogates import likelihood_ratio, reinforce
from fewstep.updates import SGD
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
    seen, positions, velocities = ants(world)
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
        np.testing.assert_allclose(seen.reshape(4, -1)[sim, 29:113].numpy(), felt_at(model, data).ravel(), atol=1e-9)
        for step, (observations, rewards, ended) in enumerate(lived):
            data.ctrl[:] = actions[step, sim].clip(-1, 1)
            mujoco.mj_step(model, data)
            forces = felt_at(model, data)  # rllab, too, computes all anew at the new state
            felt += abs(forces).sum()
            mujoco.mj_subtreeVel(model, data)
            state = [data.qpos, data.qvel, forces.ravel(), data.xmat[torso], data.subtree_com[torso]]
            np.testing.assert_allclose(observations.reshape(4, -1)[sim].numpy(), np.concatenate(state), atol=1e-9)
            velocity, goal = data.subtree_linvel[torso][0], GOALS[task][sim // 2]
            reward = goal * velocity if task == "direction" else 1 - abs(velocity - goal)
            reward += 0.05 - 0.005 * (data.ctrl**2).sum() - 0.0005 * (forces**2).sum()
            assert rewards.flatten()[sim].item() == pytest.approx(reward, abs=1e-9)
            assert bool(ended.flatten()[sim]) == (not 0.2 <= data.qpos[2] <= 1.0)
    assert felt > 0, "no foot touched the ground"


def test_the_models_have_the_facts_of_the_papers() -> None:
    cheetah, ant = HalfCheetah("velocity"), Ant("velocity")
    reset(cheetah)
    ants(ant)
    model = cheetah.physics.model
    assert (model.actuator_gear[:, 0] * model.actuator_ctrlrange[:, 1]).tolist() == [120, 90, 60, 120, 60, 30]
    assert model.opt.timestep == 0.01
    model = ant.physics.model
    assert (model.actuator_gear[:, 0] * model.actuator_ctrlrange[:, 1]).tolist() == [150] * 8
    assert model.opt.timestep == 0.02
    assert model.opt.integrator == mujoco.mjtIntegrator.mjINT_RK4
    assert model.dof_armature[6:].tolist() == model.dof_damping[6:].tolist() == [1] * 8
    assert np.unique(model.geom_solref, axis=0).tolist() == [[0.02, 1]]
    assert np.unique(model.geom_solimp[:, :3], axis=0).tolist() == [[0.8, 0.8, 0.01]]
    torso = model.geom(model.body("torso").geomadr[0])
    volume = 4 / 3 * math.pi * torso.size[0] ** 3
    assert model.body("torso").mass[0] >= 5 * volume, "a density of 5: the ball, and the beginnings of the legs"
    assert model.body("torso").mass[0] < 2 * 5 * volume


def felt_at(model: Any, data: Any) -> Any:
    """Contact forces at the state of now, each cut to [-1, 1]."""
    mujoco.mj_forward(model, data)
    mujoco.mj_rnePostConstraint(model, data)
    return data.cfrc_ext.clip(-1, 1).copy()


@pytest.mark.parametrize("task", GOALS)
def test_the_gymnasium_ant_moves_as_gymnasiums_and_its_reward_by_hand(task: Any) -> None:
    world = Ant(task, "gymnasium")
    _, positions, velocities = ants(world)
    actions = np.random.default_rng(0).uniform(-1.2, 1.2, size=(15, 4, 8))
    lived = [world.step(torch.tensor(a).reshape(2, 2, 8)) for a in actions]
    own, touched = gymnasium.make("Ant-v5").unwrapped, 0.0
    for sim in range(4):
        own.reset(seed=0)
        own.set_state(positions[sim], velocities[sim])
        for (observations, rewards, ended), action in zip(lived, actions[:, sim].clip(-1, 1), strict=True):
            forces, before = last_forces(own, action).clip(-1, 1), own.data.qpos[0]
            expected, _, over, _, _ = own.step(action)
            seen = observations.reshape(4, -1)[sim].numpy()
            assert np.array_equal(seen[:27], expected[:27]), "positions and velocities, to the bit"
            np.testing.assert_allclose(seen[27:], forces[1:].ravel(), atol=1e-6)
            reward = wanted(task, GOALS[task][sim // 2], (own.data.qpos[0] - before) / own.dt)
            reward += (1.05 if task == "velocity" else 0.05) - 0.005 * (action**2).sum() - 0.0005 * (forces**2).sum()
            assert rewards.flatten()[sim].item() == pytest.approx(reward, abs=1e-6)
            assert bool(ended.flatten()[sim]) == over
            touched += (forces**2).sum()
    assert touched > 0


@pytest.mark.parametrize("flavour", Ant.sizes)
def test_an_ant_ends_where_its_torso_is_too_low_or_too_high(flavour: Any) -> None:
    world = Ant("velocity", flavour)
    ants(world)
    world.physics.positions[:, 2] = [-3.0, 0.7, 0.97, 1.2]  # the ground pushes by much
    world.physics.velocities[:] = 0
    _, _, ended = world.step(torch.zeros(2, 2, 8))
    heights = world.physics.positions[:, 2]
    assert ended.flatten().tolist() == [not 0.2 <= height <= 1.0 for height in heights] == [True, False, False, True]


def test_what_has_ended_stands_still_and_the_others_go_on() -> None:
    worlds = Ant("velocity"), Ant("velocity")
    for world, height in zip(worlds, (1.2, 0.6), strict=True):
        ants(world)
        world.physics.positions[1, 2] = height
    lived = [[world.step(torch.full((2, 2, 8), 0.1 * step)) for step in range(5)] for world in worlds]
    assert [ended.flatten().tolist() for *_, ended in lived[0]] == [[False, True, False, False]] * 5
    fallen, others = lived[0][0][0].reshape(4, -1), [0, 2, 3]
    for (seen, *_), (expected, *_) in zip(*lived, strict=True):
        assert torch.equal(seen.reshape(4, -1)[1], fallen[1])
        assert torch.equal(seen.reshape(4, -1)[others], expected.reshape(4, -1)[others])


def two_tasks(world: Any, goals: Any, actions: Any) -> tuple[Any, Any, Any]:
    """Positions and velocities at the start [4, ...], and what 2 x 2 trajectories live through."""
    world.reset(torch.as_tensor(goals), 2, [torch.Generator().manual_seed(i) for i in (0, 1)])
    state = world.physics.positions.copy(), world.physics.velocities.copy()
    return *state, [world.step(torch.tensor(a).reshape(2, 2, -1)) for a in actions]


@pytest.mark.parametrize("task", GOALS)
def test_the_walker_is_gymnasiums_to_the_bit(task: Any) -> None:
    goals, actions = GOALS[task], np.random.default_rng(0).uniform(-1.2, 1.2, size=(80, 4, 6))
    positions, velocities, lived = two_tasks(Walker(task), np.array(goals)[:, None], actions)
    own, ends = gymnasium.make("Walker2d-v5").unwrapped, 0
    for sim in range(4):
        own.reset(seed=0)
        own.set_state(positions[sim], velocities[sim])
        for (observations, rewards, ended), action in zip(lived, actions[:, sim].clip(-1, 1), strict=True):
            expected, _, over, _, told = own.step(action)
            assert np.array_equal(observations.reshape(4, -1)[sim].numpy(), expected)
            reward = wanted(task, goals[sim // 2], told["x_velocity"]) + told["reward_survive"] + told["reward_ctrl"]
            assert rewards.flatten()[sim].item() == pytest.approx(reward, abs=1e-12)
            assert bool(ended.flatten()[sim]) == over
            ends += over
            if over:
                break
    assert 0 < ends < 4 * 80, "some stand, some fall"


def test_the_humanoid_moves_as_gymnasiums_and_its_reward_by_hand() -> None:
    goals, actions = np.array([[0.6, 0.8], [-1.0, 0.0]]), np.random.default_rng(0).uniform(-1.2, 1.2, size=(60, 4, 17))
    world = Humanoid("direction")
    positions, velocities, lived = two_tasks(world, goals, actions)
    own, ends, touched = gymnasium.make("Humanoid-v5").unwrapped, 0, 0.0
    for sim in range(4):
        own.reset(seed=0)
        own.set_state(positions[sim], velocities[sim])
        centre = centre_of(own)
        for (observations, rewards, ended), action in zip(lived, actions[:, sim].clip(-1, 1), strict=True):
            contact = contact_cost(own, 0.4 * action)
            *_, over, _, told = own.step(0.4 * action)
            before, centre = centre, centre_of(own)
            expected = np.concatenate([own.data.qpos[2:], own.data.qvel])
            assert np.array_equal(observations.reshape(4, -1)[sim].numpy(), expected)
            running = 1.25 * goals[sim // 2] @ (centre - before) / own.dt
            reward = running + told["reward_survive"] + told["reward_ctrl"] - contact
            assert rewards.flatten()[sim].item() == pytest.approx(reward, abs=1e-3)
            assert bool(ended.flatten()[sim]) == over
            ends, touched = ends + over, touched + contact
            if over:
                break
    assert 0 < ends < 4 * 60, "some stand, some fall"
    assert touched > 0
    drawn = world.sample_tasks(1000, torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn.norm(dim=1), torch.ones(1000))
    assert abs(drawn.mean()) < 0.1


def contact_cost(own: Any, controls: Any) -> float:
    return min(5e-7 * float((last_forces(own, controls) ** 2).sum()), 10.0)


def last_forces(own: Any, controls: Any) -> Any:
    """The contact forces as the last of the next five physics steps begins; Gymnasium's are of within it (RK4)."""
    data = mujoco.MjData(own.model)
    data.qpos[:], data.qvel[:], data.qacc_warmstart[:] = own.data.qpos, own.data.qvel, own.data.qacc_warmstart
    data.ctrl[:] = controls
    mujoco.mj_step(own.model, data, 4)
    mujoco.mj_forward(own.model, data)
    mujoco.mj_rnePostConstraint(own.model, data)
    return data.cfrc_ext.copy()


def centre_of(own: Any) -> Any:
    """x and y of the centre of mass, of where the bodies are now: Gymnasium's own is one physics step late."""
    fresh = mujoco.MjData(own.model)
    fresh.qpos[:] = own.data.qpos
    mujoco.mj_forward(own.model, fresh)
    return fresh.subtree_com[own.model.body("torso").id][:2]


@pytest.mark.parametrize(("kind", "file", "sizes"), [(Walker, "walker2d_v5.xml", (7, 8)), (Ant, "ant.xml", (13, 14)),
                                                    (HalfCheetah, "half_cheetah.xml", (7, 9))])  # fmt: skip
@pytest.mark.parametrize("task", ["mass", "friction"])
def test_other_masses_and_frictions_are_those_of_a_changed_model(kind: Any, file: str, sizes: Any, task: Any) -> None:
    world = kind(task, "gymnasium")
    goals = world.sample_tasks(2, torch.Generator().manual_seed(0))
    assert goals.shape == (2, sizes[task == "friction"])
    assert 1.5**-3 <= goals.min() < 0.6
    assert 1.7 < goals.max() <= 1.5**3
    actions = np.random.default_rng(0).uniform(-1, 1, size=(40, 4, world.actions))
    two_tasks(world, goals.flip(0), actions[:1])  # other tasks before: their factors are gone
    positions, velocities, lived = two_tasks(world, goals, actions)
    for sim in range(4):
        model = mujoco.MjModel.from_xml_path(str(Path(gymnasium.__file__).parent / "envs/mujoco/assets" / file))
        factors = goals[sim // 2].double().numpy()
        if task == "mass":
            model.body_mass[1:] *= factors
            model.body_inertia[1:] *= factors[:, None]
        else:
            model.geom_friction[:] *= factors[:, None]
        data = mujoco.MjData(model)
        mujoco.mj_setConst(model, data)
        data.qpos[:], data.qvel[:] = positions[sim], velocities[sim]
        for (observations, rewards, ended), action in zip(lived, actions[:, sim], strict=True):
            data.ctrl[:] = action
            before = data.qpos[0]
            mujoco.mj_step(model, data, world.physics.frame_skip)
            seen = observations.reshape(4, -1)[sim].numpy()
            size = data.qpos.size - (2 if kind is Ant else 1)
            np.testing.assert_allclose(seen[:size], data.qpos[-size:], atol=1e-9)
            if kind is Walker:
                running = (data.qpos[0] - before) / world.physics.dt
                standing = not (data.qpos[1] < 0.8 or abs(data.qpos[2]) > 1)
                expected = running + standing - 0.001 * (action**2).sum()
                assert rewards.flatten()[sim].item() == pytest.approx(expected, abs=1e-9)
            if ended.flatten()[sim]:
                break
    apart = lived[-1][0].reshape(2, 2, -1)
    assert (apart[0] - apart[1]).abs().max() > 0.1


STARTS = [(HalfCheetah, "paper", 0.01, 0.1), (HalfCheetah, "gymnasium", 0.2 / 12**0.5, 0.1), (Ant, "paper", 0.01, 0.1),
          (Ant, "gymnasium", 0.2 / 12**0.5, 0.1), (Walker, "gymnasium", 0.01 / 12**0.5, 0.01 / 12**0.5),
          (Humanoid, "gymnasium", 0.02 / 12**0.5, 0.02 / 12**0.5)]  # fmt: skip


@pytest.mark.parametrize(("kind", "flavour", "spread", "speed"), STARTS)
def test_starts(kind: Any, flavour: Any, spread: float, speed: float) -> None:
    world = kind("velocity", flavour)
    world.reset(torch.ones(20, 1), 50, [torch.Generator().manual_seed(i) for i in range(20)])
    physics = world.physics
    rest = [0, 0, 0.55, 1, 0, 0, 0, 0, 1, 0, -1, 0, -1, 0, 1] if (kind, flavour) == (Ant, "paper") else physics.rest
    away = physics.positions - rest
    assert away.std() == pytest.approx(spread, rel=0.05)
    assert abs(away.mean(0)).max() < spread / 5
    assert physics.velocities.std() == pytest.approx(speed, rel=0.05)
    if flavour == "gymnasium":
        assert abs(away).max() <= spread * 12**0.5 / 2 + 1e-12, "uniform"


@pytest.mark.parametrize(("kind", "fastest"), [(HalfCheetah, 2), (Ant, 3), (Walker, 2), (Humanoid, 2)])
def test_goals(kind: Any, fastest: float) -> None:
    drawn = kind("velocity").sample_tasks(1000, torch.Generator().manual_seed(0))
    assert 0 <= drawn.min() < 0.1
    assert fastest - 0.1 < drawn.max() <= fastest
    assert drawn.mean().item() == pytest.approx(fastest / 2, rel=0.05)
    drawn = kind("direction").sample_tasks(1000, torch.Generator().manual_seed(0))
    assert kind is Humanoid or set(drawn.flatten().tolist()) == {-1.0, 1.0}


BODIES = [(kind, flavour) for kind in (HalfCheetah, Ant, Walker, Humanoid) for flavour in kind.sizes]


@pytest.mark.parametrize(("kind", "flavour"), BODIES)
def test_a_simulation_that_diverges_is_never_put_back_at_rest(kind: Any, flavour: Any) -> None:
    world, still = kind("direction", flavour), torch.zeros(2, 2, kind.actions)
    goals = world.sample_tasks(2, torch.Generator().manual_seed(0))
    rewards = []
    for broken in (False, True):
        world.reset(goals, 2, [torch.Generator().manual_seed(i) for i in (0, 1)])
        if broken:
            world.physics.velocities[1, -1] = 1e12
            world.physics.positions[2, 0] = np.nan
        for _ in range(3):
            seen, reward, _ = world.step(still)
            assert seen.isfinite().all(-1).flatten().tolist() == [True, not broken, not broken, True]
        rewards.append(reward.flatten())
    assert rewards[1].isnan().tolist() == [False, True, True, False]
    assert torch.equal(rewards[0][[0, 3]], rewards[1][[0, 3]]), "the others do not notice"


def test_a_task_that_diverges_is_named() -> None:
    class Exploding(HalfCheetah):
        def start(self, trajectories: int, generators: Any) -> Any:
            positions, velocities = super().start(trajectories, generators)
            velocities[self.goals[:, 0] > 10, 1] = 1e12
            return positions, velocities

    world = Exploding("velocity", horizon=20)
    policy = policy_of(world, hidden=(4,))
    learner = Learner(policy, likelihood_ratio, SGD(0.1), steps=0, inner_loss=reinforce, stream=True)
    goals, seeds = torch.tensor([[1.0], [1e3]]), torch.tensor([5, 6])
    with pytest.raises(InputError, match=r"1 of 2 tasks .* NaN or infinity\): task \[1000.0\] with seed 6"):
        Explorer(learner, world, trajectories=2).explore(Task((goals, seeds), (goals, seeds)))


def test_wrong_tasks_and_a_missing_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(InputError, match="the task must be one of velocity, direction, mass, friction and the"):
        HalfCheetah("speed")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="the flavour of gymnasium, but 'mass' and 'paper' came"):
        Walker("mass", "paper")
    monkeypatch.setitem(sys.modules, "mujoco", None)
    with pytest.raises(InputError, match=r"pip install 'fewstep\[rl\]'"):
        HalfCheetah()
    with pytest.raises(SystemExit):
        main(["train", "ant-velocity", "--out", str(tmp_path / "run")])
    assert "pip install 'fewstep[rl]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_missing_opengl_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> Any:
        raise AttributeError("'NoneType' object has no attribute 'glGetError'")

    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    monkeypatch.setattr("fewstep.rl.environments.physics.import_module", load)
    with pytest.raises(InputError, match=r"with MUJOCO_GL='osmesa' .*glGetError.* unset it, or give egl where") as e:
        HalfCheetah()
    assert "pip install" not in str(e.value), "it is installed"


@pytest.mark.parametrize("recipe", ["half-cheetah-direction", "ant-velocity", "walker-mass", "humanoid-direction"])
def test_runners_on_the_command_line(recipe: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    main(["train", recipe, *SMALL, "--compile", "no", "--out", str(run)])
    main(["evaluate", str(run)])
    content = json.loads((run / "evaluation.json").read_text())
    assert content["recipe"] == recipe
    assert len(content["by_step"]) == 4


WORLDS = [("fewstep/Navigation-v0", {}), ("fewstep/HalfCheetah-v0", {}),
          ("fewstep/HalfCheetah-v0", {"task": "direction", "flavour": "gymnasium"}), ("fewstep/Ant-v0", {}),
          ("fewstep/Ant-v0", {"flavour": "gymnasium"}), ("fewstep/Walker-v0", {"task": "friction"}),
          ("fewstep/Humanoid-v0", {"task": "direction"}), ("fewstep/Bandits-v0", {}),
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
    with pytest.raises(InputError, match="reset comes first, and again after 4 steps"):
        env.step(env.action_space.sample())
    with pytest.raises(InputError, match="a task has the shape"):
        env.set_task([[1.0, 2.0, 3.0]])
    with pytest.raises(InputError, match="a task is of finite numbers"):
        env.set_task(tasks[0] * np.nan)
    with pytest.raises(InputError, match="the horizon must be at least 1, but -3 came"):
        gymnasium.make(name, horizon=-3, **options)
    assert "entry_point" in gymnasium.spec(name).to_json(), "it can be written down"
    if env.observation_space.shape in ((2,), (1,), (10,)):  # bodies are drawn, see tests/test_film.py
        with pytest.raises(InputError, match="drawn in no way, but the render_mode 'rgb_array' came"):
            gymnasium.make(name, render_mode="rgb_array", **options)
