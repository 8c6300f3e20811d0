"""Pictures of a body that runs."""

from __future__ import annotations

import os
import sys
from ctypes.util import find_library
from typing import Any

from fewstep.errors import InputError
from fewstep.rl.environments.physics import modules

NO_OPENGL = (
    "MuJoCo cannot draw here ({}); without a screen it needs libEGL (MUJOCO_GL=egl) or libOSMesa (MUJOCO_GL=osmesa), "
    "and to be told so before Python imports it"
)
TOO_LATE = "MuJoCo was loaded when nothing told it how to draw; set MUJOCO_GL=egl (or osmesa) before Python starts"


def choose_opengl() -> bool:
    """Tell MuJoCo, which reads it once, how to draw without a screen; False where it is too late for that.

    To draw all the same can end the process.
    """
    if "DISPLAY" in os.environ or sys.platform != "linux":
        return True
    if "mujoco" in sys.modules:
        return "mujoco.egl" in sys.modules or "mujoco.osmesa" in sys.modules
    only_mesa = find_library("OSMesa") and not find_library("EGL")
    os.environ.setdefault("MUJOCO_GL", "osmesa" if only_mesa else "egl")
    return True


class Camera:
    """Draws a model's states, from the camera that follows it. Raises `InputError` where there is no OpenGL.

    model : MuJoCo's;  width, height : in pixels
    """

    def __init__(self, model: Any, width: int = 320, height: int = 240) -> None:
        self._mujoco, _ = modules()
        self._model, self._data = model, self._mujoco.MjData(model)
        try:
            self._renderer = self._mujoco.Renderer(model, height, width)
        except Exception as error:  # each OpenGL library fails in its own way
            raise InputError(NO_OPENGL.format((str(error).splitlines() or [type(error).__name__])[0])) from error

    def frame(self, positions: Any) -> Any:
        """A picture uint8 [height, width, 3] of a state, of which only the positions show."""
        self._data.qpos[:] = positions
        self._mujoco.mj_forward(self._model, self._data)
        self._renderer.update_scene(self._data, camera="track")
        return self._renderer.render()

    def close(self) -> None:
        self._renderer.close()
