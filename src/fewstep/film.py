"""What a trained policy does before and after adaptation, to look at: a video of a body, or paths in the plane."""

from __future__ import annotations

import io
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from fewstep import plots
from fewstep.commands import recipe_of
from fewstep.errors import InputError
from fewstep.recipes.policies import PolicyRecipe
from fewstep.rl import Explorer
from fewstep.rl.environments import Navigation, Runner
from fewstep.rl.environments.camera import TOO_LATE, Camera, choose_opengl
from fewstep.run import Run
from fewstep.tables import plural
from fewstep.task import Task

SIZE = 320, 240  # of a panel, in pixels
PATHS = 5  # in a panel
RATE = 25  # frames per second at most


def film_run(path: Path, *, task: int = 0, steps: Sequence[int] = (0, 1), out: Path | None = None,
             weights: str = "best") -> Path:  # fmt: skip
    """Draw test task number `task` of a run after each of these inner steps; returns the file.

    A body that runs becomes a video, watch.gif in the run's folder unless `out` says a .gif or .mp4 file; the paths of
    2D navigation become a picture, watch.png. Each shows the policy adapting as in the evaluation of the run.
    """
    run = Run(path)
    name, recipe = recipe_of(run)
    if not isinstance(recipe, PolicyRecipe):
        raise InputError(f"{path} is a run of {name}, which has no policy to watch")
    if task < 0 or not steps or min(steps) < 0:
        raise InputError(f"the task and the steps must be at least 0, but {task} and {list(steps)} came")
    can_draw = choose_opengl()
    learner = recipe.learner()
    run.restore(run.weights_file(weights), learner)
    explorer, episodes = recipe.seen_by(learner), recipe.episodes("test")
    assert isinstance(explorer, Explorer)
    batch, place = divmod(task, episodes.tasks)
    tasks = episodes[batch].select(slice(place, place + 1))
    kinds = {Navigation: (".png",), Runner: (".gif", ".mp4")}
    kind = next((kind for kind in kinds if isinstance(explorer.environment, kind)), None)
    if kind is None:
        raise InputError(f"{recipe.world} has nothing to look at; 2D navigation and bodies that run have")
    out = out or path / f"watch{kinds[kind][0]}"
    if out.suffix not in kinds[kind]:
        raise InputError(f"{recipe.world} is drawn into {' or '.join(kinds[kind])}, not into {out}")
    if out.suffix == ".mp4" and not shutil.which("ffmpeg"):
        raise InputError(f"{out} needs ffmpeg, which is not installed; a .gif does not")
    if kind is Runner and not can_draw:  # to try all the same can end the process
        raise InputError(f"{TOO_LATE}, or run this in a process of its own: fewstep watch {path}")
    drawn = _paths(explorer, tasks, steps) if kind is Navigation else _video(explorer, tasks, steps, out.suffix)
    return Run(out.parent).write(out.name, drawn)


def _paths(explorer: Explorer, tasks: Task, steps: Sequence[int]) -> bytes:
    """The paths of the first trajectories after each of the steps, as a PNG file."""
    panels = []
    for step, lived in enumerate(explorer.walk(tasks, max(steps))):
        if step in steps:
            shown = zip(lived.observations[0, :PATHS], lived.mask[0, :PATHS], strict=True)
            places = [seen[taken].cpu().numpy() for seen, taken in shown]
            panels.append((_title(step, lived.returns), places))
    title = f"{min(PATHS, explorer.trajectories)} of {explorer.trajectories} trajectories in one task"
    return plots.png(plots.paths_figure(title, panels, tasks.support[0][0].tolist()))


def _title(step: int, returns: Tensor) -> str:
    return f"after {step} step{plural(step)}: mean return {float(returns[0]):.1f}"


class _Recorder:
    """An environment whose first trajectory is remembered: a state for each step, of each phase."""

    def __init__(self, world: Runner) -> None:
        self.world, self.phases = world, list[list[Any]]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.world, name)

    def reset(self, *about: Any) -> Tensor:
        seen = self.world.reset(*about)
        self.phases.append([self.world.physics.positions[0].copy()])
        return seen

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = self.world.step(actions)
        self.phases[-1].append(self.world.physics.positions[0].copy())
        return found


def _video(explorer: Explorer, tasks: Task, steps: Sequence[int], suffix: str) -> bytes:
    """The first trajectory after each of the steps side by side, as a GIF or MP4 file."""
    world = explorer.environment
    assert isinstance(world, Runner)
    recorder = _Recorder(world)
    explorer.environment = recorder
    titles, lengths = [], []
    for step, lived in enumerate(explorer.walk(tasks, max(steps))):
        titles.append(_title(step, lived.returns))
        lengths.append(int(lived.mask[0, 0].sum()))
    every = max(1, round(1 / (RATE * world.physics.dt)))
    columns = [
        _frames(world, recorder.phases[step][: lengths[step] + 1 : every], titles[step]) for step in sorted(set(steps))
    ]
    longest = max(map(len, columns))
    padded = [column + [column[-1]] * (longest - len(column)) for column in columns]  # what has ended stands still
    frames = [np.concatenate(panels, 1) for panels in zip(*padded, strict=True)]
    return _gif(frames, every * world.physics.dt) if suffix == ".gif" else _mp4(frames, every * world.physics.dt)


def _frames(world: Runner, states: Sequence[Any], title: str) -> list[Any]:
    """A picture [height, width, 3] of each state, with a title."""
    found = []
    with closing(Camera(world.physics.model, *SIZE)) as camera:
        for state in states:
            picture = Image.fromarray(camera.frame(state))
            ImageDraw.Draw(picture).text((6, 4), title, "white", ImageFont.load_default(15))
            found.append(np.asarray(picture))
    return found


def _gif(frames: Sequence[Any], seconds: float) -> bytes:
    first, *others = [Image.fromarray(frame) for frame in frames]
    buffer = io.BytesIO()
    first.save(buffer, "GIF", save_all=True, append_images=others, duration=1000 * seconds, loop=0)
    return buffer.getvalue()


def _mp4(frames: Sequence[Any], seconds: float) -> bytes:
    height, width, _ = frames[0].shape
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "video.mp4"
        command = ["ffmpeg", "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}",
                   "-r", f"{1 / seconds:g}", "-i", "-", "-pix_fmt", "yuv420p", str(file)]  # fmt: skip
        result = subprocess.run(command, input=np.stack(frames).tobytes(), capture_output=True, check=False)
        if result.returncode:
            raise InputError(f"ffmpeg failed: {result.stderr.decode(errors='replace').strip()}")
        return file.read_bytes()
