"""Watching a policy: paths in the plane, videos before and after adaptation, and what cannot be drawn."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from fewstep.cli import main
from fewstep.errors import InputError
from fewstep.film import SIZE
from fewstep.plots import paths_figure
from fewstep.rl.environments import camera
from tests.test_cli import fails
from tests.test_rl import SMALL


def trained(recipe: str, path: Path, *options: str) -> Path:
    main(["train", recipe, *SMALL, *options, "--out", str(path)])
    return path


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a body that can be drawn on this machine."""
    mujoco = pytest.importorskip("mujoco", reason="the extra rl is not installed")
    pytest.importorskip("gymnasium", reason="the extra rl is not installed")
    try:
        mujoco.Renderer(mujoco.MjModel.from_xml_string("<mujoco/>"), 8, 8).close()
    except Exception as error:  # each OpenGL library fails in its own way
        pytest.skip(f"MuJoCo cannot draw here: {error}")
    options = ["--horizon", "21", "--compile", "no"]
    return trained("half-cheetah-direction", tmp_path_factory.mktemp("runner") / "run", *options)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere MuJoCo has a library of its own")
def test_the_opengl_library_is_one_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trained("navigation", tmp_path / "run")
    for there, chosen in ((["EGL", "OSMesa"], "egl"), (["OSMesa"], "osmesa"), ([], "egl")):
        for name in ("MUJOCO_GL", "DISPLAY"):
            monkeypatch.setenv(name, "")  # so that it is put back
            monkeypatch.delenv(name)
        monkeypatch.delitem(sys.modules, "mujoco", raising=False)
        monkeypatch.setattr(camera, "find_library", lambda name, there=there: name if name in there else None)
        main(["watch", str(run)])
        assert os.environ["MUJOCO_GL"] == chosen


def test_mujoco_that_was_loaded_without_a_way_to_draw(
    runner: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import gymnasium

    from fewstep.rl.environments.single import register

    register()
    monkeypatch.delenv("DISPLAY", raising=False)
    for name in ("egl", "osmesa"):
        monkeypatch.delitem(sys.modules, f"mujoco.{name}", raising=False)
    with pytest.raises(InputError, match="set MUJOCO_GL=egl"):
        gymnasium.make("fewstep/HalfCheetah-v0", render_mode="rgb_array")
    told = fails(capsys, "watch", str(runner))
    assert "MuJoCo was loaded when nothing told it how to draw; set MUJOCO_GL=egl" in told
    assert f"in a process of its own: fewstep watch {runner}" in told


@pytest.mark.usefixtures("runner")
@pytest.mark.parametrize("body", ["HalfCheetah", "Ant", "Walker", "Humanoid"])
def test_gymnasium_has_pictures_of_bodies(body: str) -> None:
    import gymnasium

    from fewstep.rl.environments.single import register

    register()
    env = gymnasium.make(f"fewstep/{body}-v0", render_mode="rgb_array", task="direction")
    with pytest.raises(InputError, match="reset comes first"):
        env.unwrapped.render()
    env.reset(seed=0)
    before: Any = env.render()
    assert (before.shape, before.dtype) == ((240, 320, 3), np.uint8)
    for _ in range(5):
        env.step(env.action_space.sample())
    assert (before != env.render()).any()
    assert 1 <= env.unwrapped.metadata["render_fps"] <= 200
    env.close()


def test_paths_in_the_plane(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    run = trained("navigation", tmp_path / "run")
    drawn: list[Any] = []

    def draw(*about: Any) -> Figure:
        drawn.append(about)
        return paths_figure(*about)

    monkeypatch.setattr("fewstep.plots.paths_figure", draw)
    main(["watch", str(run), "--task", "3", "--steps", "0", "2"])
    assert capsys.readouterr().out.split()[-1] == str(run / "watch.png")
    assert size_of(run / "watch.png")[0] > 500
    (title, panels, goal), *_ = drawn
    assert title == "2 of 2 trajectories in one task"
    assert [name.split(":")[0] for name, _ in panels] == ["after 0 steps", "after 2 steps"]
    for _, paths in panels:
        assert [path.shape for path in paths] == [(5, 2)] * 2
        assert all(not path[0].any() for path in paths), "they start at 0"
    assert len(goal) == 2
    assert max(map(abs, goal)) <= 0.5


def test_a_video_before_and_after(runner: Path, tmp_path: Path) -> None:
    main(["watch", str(runner)])
    with Image.open(runner / "watch.gif") as opened:
        video: Any = opened
        assert video.size == (2 * SIZE[0], SIZE[1])
        assert video.n_frames == 6, "22 states of 10 ms, each fourth"
        assert video.info["duration"] == 40
        first = np.asarray(video.convert("L")).astype(int)
        video.seek(5)
        last = np.asarray(video.convert("L")).astype(int)
    assert abs(first - last).max() > 20, "it moves"
    main(["watch", str(runner), "--steps", "3", "--out", str(tmp_path / "new" / "after.gif")])
    assert size_of(tmp_path / "new" / "after.gif") == SIZE


def test_mp4_goes_through_ffmpeg(runner: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    out = tmp_path / "a.mp4"
    assert "a.mp4 needs ffmpeg, which is not installed" in fails(capsys, "watch", str(runner), "--out", str(out))
    fake = tmp_path / "ffmpeg"
    fake.write_text(f"#!{sys.executable}\nimport sys\nopen(sys.argv[-1], 'wb').write(sys.stdin.buffer.read())\n")
    fake.chmod(0o755)
    main(["watch", str(runner), "--out", str(out)])
    capsys.readouterr()
    assert out.stat().st_size == 6 * SIZE[1] * 2 * SIZE[0] * 3
    fake.write_text(f"#!{sys.executable}\nimport sys\nsys.exit('no such codec')\n")
    assert "ffmpeg failed: no such codec" in fails(capsys, "watch", str(runner), "--out", str(out))


def test_a_machine_that_cannot_draw(runner: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    import mujoco

    def refuse(*about: Any) -> Any:
        raise RuntimeError("no display")

    monkeypatch.setattr(mujoco, "Renderer", refuse)
    assert "cannot draw here (no display); without a screen it needs libEGL" in fails(capsys, "watch", str(runner))


def test_what_cannot_be_watched(tmp_path: Path, capsys: Any) -> None:
    bandits, run = trained("bandits", tmp_path / "bandits"), trained("navigation", tmp_path / "navigation")
    main(["train", "sinusoid", "--no-plan", "--iterations", "1", "--check-every", "1", "--validation-episodes", "2",
          "--out", str(tmp_path / "sinusoid")])  # fmt: skip
    capsys.readouterr()
    assert "bandits with 5 arms has nothing to look at" in fails(capsys, "watch", str(bandits))
    assert "is a run of sinusoid, which has no policy to watch" in fails(capsys, "watch", str(tmp_path / "sinusoid"))
    assert "the folder of a run (fewstep train" in fails(capsys, "watch", str(tmp_path / "nothing"))
    assert "at least 0, but 0 and [-1] came" in fails(capsys, "watch", str(run), "--steps", "-1")
    wrong = fails(capsys, "watch", str(run), "--out", str(tmp_path / "a.mp4"))
    assert "2D navigation is drawn into .png, not into" in wrong
