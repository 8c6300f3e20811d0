"""Many simulations of one MuJoCo model side by side, stepped by MuJoCo's own threads."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from fewstep.distributed import cores, processes_here
from fewstep.errors import InputError

Quantity = Literal["mass", "friction"]

FIELDS: dict[Quantity, tuple[str, ...]] = {"mass": ("body_mass", "body_inertia"), "friction": ("geom_friction",)}
MOST = 1e6  # of a position or a velocity: what is beyond it has nothing to do with a body
INSTALL = "MuJoCo tasks need gymnasium >= 1.0 and mujoco >= 3.17: pip install 'fewstep[rl]'"


class Physics:
    """`count` simulations of one of Gymnasium's models.

    model : MuJoCo's, as it is before `multiply`
    positions, velocities : of all simulations, live views [count, ...] in float64; written by `start`
    centre, centre_velocity : of the mass of the whole body [count, 3], at the state after `step`
    contacts : forces and torques of contacts on each body [count, bodies, 6]
    turned : the rotation of the torso [count, 9]

    file : of the model, among those that come with Gymnasium;  root : the body whose subtree is the whole body
    frame_skip : physics steps in a step;  contacts : whether their forces are wanted, of where the last physics step
        began, or of the state after it, which takes half a physics step more
    change : what is changed in the model
    """

    def __init__(self, file: str, root: str, count: int, frame_skip: int, *,
                 contacts: Literal["none", "before", "after"] = "none",
                 change: Callable[[Any], None] = lambda spec: None) -> None:  # fmt: skip
        mujoco, batch = modules()
        spec, mass = _specification(file)
        change(spec)
        # Else MuJoCo puts a simulation that diverges back at rest without a word, and it goes on to earn rewards.
        spec.option.disableflags |= int(mujoco.mjtDisableBit.mjDSBL_AUTORESET)
        if contacts != "none":  # MuJoCo computes them where a sensor of accelerations asks for it
            spec.body(root).add_site(name="inside")
            felt = spec.add_sensor(name="felt", type=mujoco.mjtSensor.mjSENS_ACCELEROMETER)
            felt.objtype, felt.objname = mujoco.mjtObj.mjOBJ_SITE, "inside"
        for name, kind in (("centre", "SUBTREECOM"), ("centre_velocity", "SUBTREELINVEL")):
            sensor = spec.add_sensor(name=name, type=getattr(mujoco.mjtSensor, f"mjSENS_{kind}"))
            sensor.objtype, sensor.objname = mujoco.mjtObj.mjOBJ_BODY, root
        model = spec.compile()
        if mass:
            mujoco.mj_setTotalmass(model, mass)
            mujoco.mj_setConst(model, mujoco.MjData(model))
        self.count, self.frame_skip, self.dt = count, frame_skip, model.opt.timestep * frame_skip
        self.model = model
        self.rest, self._root = model.qpos0.copy(), model.body(root).id
        self._sensor = int(model.sensor("centre").adr[0])
        self._stage = mujoco.mjtStage.mjSTAGE_ACC if contacts == "after" else mujoco.mjtStage.mjSTAGE_VEL
        # One state for each simulation: then the stages after a step are those that the next step begins with.
        self._batch = batch.Batch(model, count, max(1, cores() // processes_here()), persistent=True)
        self.positions, self.velocities, self._controls, self._sensors, self._rotations = (
            self._batch.bind(name) for name in ("qpos", "qvel", "ctrl", "sensordata", "xmat")
        )
        self.contacts: Any = self._batch.bind("cfrc_ext") if contacts != "none" else None

    @property
    def centre(self) -> Any:
        """Where the mass of the whole body is [count, 3]."""
        return self._sensors[:, self._sensor : self._sensor + 3]

    @property
    def centre_velocity(self) -> Any:
        """How it moves [count, 3]."""
        return self._sensors[:, self._sensor + 3 : self._sensor + 6]

    @property
    def turned(self) -> Any:
        """The rotation of the torso [count, 9]."""
        return self._rotations[:, self._root].reshape(self.count, 9)

    @property
    def lost(self) -> Any:
        """Which simulations have diverged [count]: their state is not finite, or absurd."""
        states = np.concatenate([self.positions, self.velocities], 1)
        return ~(abs(states) <= MOST).all(1)

    def multiply(self, quantity: Quantity, factors: Any) -> None:
        """Each body's mass and inertia, or each geom's friction, is the model's times these [count, parts]."""
        for name in FIELDS[quantity]:
            own, model = self._batch.expand(name), getattr(self.model, name)
            parts = factors.shape[1]  # the world, the first of bodies, has no mass
            own[:, -parts:] = model[-parts:] * factors.reshape(*factors.shape, *[1] * (model.ndim - 1))
        self._batch.set_const()

    def start(self, positions: Any, velocities: Any) -> None:
        """Begin at the model's rest plus these [count, ...]."""
        self._batch.reset(stage=0)
        self.positions[:] = self.rest + positions
        self.velocities[:] = velocities
        self._batch.forward(stage=self._stage)

    def step(self, controls: Any, going: Any) -> None:
        """Go on by `frame_skip` physics steps under controls [count, ...]; those that are not going [count] stay."""
        self._controls[:] = controls
        ids = None if going.all() else np.flatnonzero(going)
        self._batch.step(ids, nstep=self.frame_skip, stage=self._stage)


def modules() -> tuple[Any, Any]:
    """mujoco and its batched stepping, or `InputError` with what to install."""
    try:
        mujoco = import_module("mujoco")
    except Exception as error:  # each OpenGL library that is missing fails in its own way
        if find_spec("mujoco") is None:
            raise InputError(INSTALL) from error
        raise InputError(
            f"MuJoCo cannot be loaded, with MUJOCO_GL={os.environ.get('MUJOCO_GL', '')!r} ({type(error).__name__}: "
            f"{error}); only drawing needs that: unset it, or give egl where libEGL is, osmesa where libOSMesa is"
        ) from error
    try:
        return mujoco, import_module("mujoco.batch")
    except ImportError as error:
        raise InputError(INSTALL) from error


def model_file(name: str) -> Path:
    """One of Gymnasium's models."""
    package = find_spec("gymnasium")
    if package is None or package.origin is None:
        raise InputError(INSTALL)
    return Path(package.origin).parent / "envs" / "mujoco" / "assets" / name


@cache
def parts_of(file: str, quantity: Quantity) -> int:
    """How many bodies a model has, or geoms."""
    spec, _ = _specification(file)
    return len(spec.bodies) - 1 if quantity == "mass" else len(spec.geoms)


def _specification(file: str) -> tuple[Any, float | None]:
    """A model that can be changed yet, and what its bodies are to weigh together."""
    text = model_file(file).read_text()
    # MuJoCo warns of this attribute, into a file where the user stands; it is done by hand.
    mass = re.search(r'settotalmass="([\d.]+)"', text)
    spec = modules()[0].MjSpec.from_string(text.replace(mass[0], "") if mass else text)
    return spec, float(mass[1]) if mass else None


def uniform(shape: tuple[int, ...], most: float, generators: Any) -> Any:
    """Numbers [len(generators) * shape[0], ...] from -most to most, each task's from its own generator."""
    rows = [torch.rand(*shape, generator=own, dtype=torch.float64, device="cpu") for own in generators]
    return 2 * most * np.concatenate([row.numpy() for row in rows]) - most


def normal(shape: tuple[int, ...], scale: float, generators: Any) -> Any:
    """Numbers [len(generators) * shape[0], ...] of a normal distribution, each task's from its own generator."""
    rows = [torch.randn(*shape, generator=own, dtype=torch.float64, device="cpu") for own in generators]
    return scale * np.concatenate([row.numpy() for row in rows])
