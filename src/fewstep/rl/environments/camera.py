"""Pictures of a body that runs."""

from __future__ import annotations

from typing import Any

from fewstep.errors import InputError
from fewstep.rl.environments.physics import modules

NO_OPENGL = (
    "MuJoCo cannot draw here ({}); without a screen it needs libEGL (MUJOCO_GL=egl) or libOSMesa (MUJOCO_GL=osmesa), "
    "and to be told so before Python imports it"
)


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
