"""Many simulations of one MuJoCo model side by side, stepped by MuJoCo's own threads."""

from __future__ import annotations

import warnings
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fewstep.errors import InputError

INSTALL = "MuJoCo tasks need gymnasium >= 1.0 and mujoco >= 3.17: pip install 'fewstep[rl]'"


class Physics:
    """`count` simulations of one of Gymnasium's models.

    positions, velocities : of all simulations, live views [count, ...] in float64; written to, then `settle`
    centre, centre_velocity : of the mass of the whole body [count, 3], at the state after `step`

    file : of the model, among those that come with Gymnasium;  root : the body whose subtree is the whole body
    frame_skip : physics steps in a step
    """

    def __init__(self, file: str, root: str, count: int, frame_skip: int) -> None:
        mujoco, batch = modules()
        spec = mujoco.MjSpec.from_file(str(model_file(file)))
        for name, kind in (("centre", "SUBTREECOM"), ("centre_velocity", "SUBTREELINVEL")):
            sensor = spec.add_sensor(name=name, type=getattr(mujoco.mjtSensor, f"mjSENS_{kind}"))
            sensor.objtype, sensor.objname = mujoco.mjtObj.mjOBJ_BODY, root
        with warnings.catch_warnings():  # of what Gymnasium's file says, not the user
            warnings.simplefilter("ignore")
            model = spec.compile()
        self.count, self.frame_skip, self.dt = count, frame_skip, model.opt.timestep * frame_skip
        self.rest = model.qpos0.copy()
        self._stage = mujoco.mjtStage.mjSTAGE_VEL
        # One state for each simulation: then the stages after a step are those that the next step begins with.
        self._batch = batch.Batch(model, count, persistent=True)
        self.positions, self.velocities, self._controls, self._sensors = (
            self._batch.bind(name) for name in ("qpos", "qvel", "ctrl", "sensordata")
        )

    @property
    def centre(self) -> Any:
        """Where the mass of the whole body is [count, 3]."""
        return self._sensors[:, :3]

    @property
    def centre_velocity(self) -> Any:
        """How it moves [count, 3]."""
        return self._sensors[:, 3:6]

    def start(self, positions: Any, velocities: Any) -> None:
        """Begin at the model's rest plus these [count, ...]."""
        self._batch.reset(stage=0)
        self.positions[:] = self.rest + positions
        self.velocities[:] = velocities
        self._batch.forward(stage=self._stage)

    def step(self, controls: Any) -> None:
        """Go on by `frame_skip` physics steps under controls [count, ...]."""
        self._controls[:] = controls
        self._batch.step(nstep=self.frame_skip, stage=self._stage)


def modules() -> tuple[Any, Any]:
    """mujoco and its batched stepping, or `InputError` with what to install."""
    try:
        return import_module("mujoco"), import_module("mujoco.batch")
    except ImportError as error:
        raise InputError(INSTALL) from error


def model_file(name: str) -> Path:
    """One of Gymnasium's models."""
    package = find_spec("gymnasium")
    if package is None or package.origin is None:
        raise InputError(INSTALL)
    return Path(package.origin).parent / "envs" / "mujoco" / "assets" / name


def normal(shape: tuple[int, ...], scale: float, generators: Any) -> Any:
    """Numbers [len(generators) * shape[0], ...] of a normal distribution, each task's from its own generator."""
    rows = [torch.randn(*shape, generator=own, dtype=torch.float64) for own in generators]
    return scale * np.concatenate([row.numpy() for row in rows])
