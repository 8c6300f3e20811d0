"""Training: resumed runs are bit-identical, and whatever happens to a run, its last checkpoint is intact."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fewstep import DivergenceError, InputError, Learner, Task, maml
from fewstep.data import SinusoidEpisodes
from fewstep.evaluate import Evaluation, evaluate
from fewstep.run import Run, checkpoint_name
from fewstep.train import Training, train

EPISODES = SinusoidEpisodes(tasks=4, shots=5, queries=5)
TRAINING = Training(iterations=12, check_every=4, log_every=2, schedule="cosine", clip=0.5)


def learner_with_dropout() -> Learner:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 1))
    return maml(model, functional.mse_loss, lr=0.05)


def validate(learner: Learner) -> Evaluation:
    return evaluate(learner, replace(EPISODES, seed=1), metric="mse", steps=2, count=8)


def go(run: Run, training: Training = TRAINING, learner: Learner | None = None, **options: Any) -> Learner:
    learner = learner or learner_with_dropout()
    train(learner, EPISODES, training, run, validate=validate, **options)
    return learner


def without_time(run: Run) -> list[dict[str, Any]]:
    return [{key: value for key, value in event.items() if key != "seconds"} for event in run.metrics()]


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("stop_at", [1, 4, 7])
def test_a_stopped_run_goes_on_to_the_identical_result(tmp_path: Path, stop_at: int) -> None:
    whole, parted = Run(tmp_path / "whole"), Run(tmp_path / "parted")
    final = go(whole)

    class StopLater(SinusoidEpisodes):
        def __getitem__(self, index: int) -> Task:
            if index + 1 == stop_at:
                os.kill(os.getpid(), signal.SIGINT)
            return super().__getitem__(index)

    with pytest.raises(KeyboardInterrupt):
        train(learner_with_dropout(), StopLater(tasks=4, shots=5, queries=5), TRAINING, parted, validate=validate)
    state = parted.load_state()
    assert state is not None
    assert state["step"] == stop_at
    torch.manual_seed(99)  # a new process has another random state
    resumed = go(parted)
    assert same(final.state_dict(), resumed.state_dict())
    for name in ("model.safetensors", "best.safetensors"):
        assert same(whole.load_weights(name), parted.load_weights(name))
    assert without_time(whole) == without_time(parted)


def test_a_killed_process_goes_on_to_the_identical_result(tmp_path: Path) -> None:
    whole, killed = Run(tmp_path / "whole"), Run(tmp_path / "killed")
    training = replace(TRAINING, iterations=400, check_every=20, schedule="constant")
    final = go(whole, training)
    script = (
        "from tests.test_train import *\n"
        f"go(Run({str(killed.path)!r}), Training(iterations=400, check_every=20, log_every=2, clip=0.5))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], cwd=Path(__file__).parent.parent)
    deadline = time.monotonic() + 120
    while not (killed.path / "trainer.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    state = killed.load_state()
    assert state is not None
    assert 20 <= state["step"] < 400
    assert same(final.state_dict(), go(killed, training).state_dict())
    assert without_time(whole) == without_time(killed)
    assert not list(killed.path.glob(".*.part")) or process.returncode == -signal.SIGKILL


def test_a_finished_run_stays_as_it_is(tmp_path: Path) -> None:
    run = Run(tmp_path)
    first = go(run).state_dict()
    metrics = run.metrics()
    assert same(first, go(run).state_dict())
    assert run.metrics() == metrics


def test_the_best_weights_are_those_of_the_best_validation(tmp_path: Path) -> None:
    run = Run(tmp_path)
    go(run, replace(TRAINING, lr=0.3))
    values = {e["step"]: e["validation_mse"][-1] for e in run.metrics() if "validation_mse" in e}
    best = min(values, key=values.__getitem__)
    learner = learner_with_dropout()
    learner.load_state_dict(run.load_weights("best.safetensors"))
    assert validate(learner).last.mean == pytest.approx(values[best], rel=1e-6)
    state = run.load_state()
    assert state is not None
    assert state["best"][0]["step"] == best


def test_the_best_few_weights_and_the_last_few_are_kept_with_their_files(tmp_path: Path) -> None:
    run = Run(tmp_path)
    go(run, replace(TRAINING, lr=0.3, check_every=2, keep=3))
    values = {e["step"]: e["validation_mse"][-1] for e in run.metrics() if "validation_mse" in e}
    ranked = sorted(values, key=values.__getitem__)
    kept = {*ranked[:3], *sorted(values)[-3:]}
    assert 3 < len(kept) < len(values)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {f"{step}.safetensors" for step in kept}
    state = run.load_state()
    assert state is not None
    assert [each["step"] for each in state["best"]] == [step for step in ranked if step in kept]
    learner = learner_with_dropout()
    learner.load_state_dict(run.load_weights(checkpoint_name(ranked[2])))
    assert validate(learner).last.mean == pytest.approx(values[ranked[2]], rel=1e-6)


def test_elements_of_the_meta_gradient_are_clipped_and_the_rate_follows_its_schedule(tmp_path: Path) -> None:
    seen: list[float] = []
    original = torch.nn.utils.clip_grad_value_
    learner = learner_with_dropout()

    def spy(parameters: Any, clip: float) -> None:
        parameters = list(parameters)
        original(parameters, clip)
        seen.append(max(float(value.grad.abs().max()) for value in parameters))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_value_", spy)
        go(Run(tmp_path), replace(TRAINING, clip=1e-3), learner)
    assert max(seen) == pytest.approx(1e-3)
    assert [TRAINING.lr_at(step) for step in (0, 6, 12)] == pytest.approx([1e-3, 5e-4, 0])


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(tmp_path)
    go(run, replace(TRAINING, iterations=4, schedule="constant"))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.suffix != ".jsonl"}

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"No space left on device; what was saved before is intact"):
        go(run, replace(TRAINING, iterations=8, schedule="constant"))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.suffix != ".jsonl"} == before
    monkeypatch.undo()
    assert go(run, replace(TRAINING, iterations=8, schedule="constant")) is not None


@pytest.mark.parametrize("name", ["trainer.pt", "best.safetensors", "config.json"])
@pytest.mark.parametrize("content", [b"", b"rubbish", None])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes | None) -> None:
    run = Run(tmp_path)
    go(run)
    run.write_json("config.json", {"recipe": "sinusoid", "a": list(range(100))})
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if content is None else content)
    read: dict[str, Any] = {
        "trainer.pt": run.load_state,
        "best.safetensors": lambda: run.load_weights(name),
        "config.json": lambda: run.read_json(name),
    }
    with pytest.raises(InputError, match=rf"{name} is damaged .*; delete it"):
        read[name]()


def test_a_file_that_is_whole_is_not_called_damaged(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.write_json("config.json", {})
    for error, told in (
        (InputError("there is no such net"), r"config.json: there is no such net$"),
        (PermissionError(13, "Permission denied"), r"config.json cannot be read \(Permission denied\)"),
    ):
        with pytest.raises(InputError, match=told), run.reading("config.json"):
            raise error


def test_a_line_cut_short_in_the_metrics_is_left_out(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.log({"step": 1})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    assert run.metrics() == [{"step": 1}]


class Exploding(nn.Module):
    """Fine until it is told otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(1, 4)
        self.middle = nn.Tanh()
        self.head = nn.Linear(4, 1)
        self.bad = False

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.middle(self.body(x))
        out: Tensor = self.head(hidden / 0 if self.bad else hidden)
        return out


def test_nan_stops_the_run_names_step_and_layer_and_keeps_the_checkpoint(tmp_path: Path) -> None:
    learner = maml(Exploding(), functional.mse_loss, lr=0.01)
    run = Run(tmp_path)

    def report(event: dict[str, Any]) -> None:
        if event["step"] == 6:
            learner.get_submodule("model").bad = True  # type: ignore[assignment]

    with pytest.raises(DivergenceError, match=r"iteration 6: after inner step 0 the output of layer 'head' \(Linear\)"):
        go(run, learner=learner, report=report)
    state = run.load_state()
    assert state is not None
    assert state["step"] == 4
    assert all(value.isfinite().all() for value in state["learner"].values())


def test_nan_in_the_data_is_named(tmp_path: Path) -> None:
    class Broken(SinusoidEpisodes):
        def __getitem__(self, index: int) -> Task:
            tasks = super().__getitem__(index)
            if index == 2:
                tasks.support[0][3] = torch.nan
            return tasks

    with pytest.raises(InputError, match="support set of task 3 holds NaN"):
        train(learner_with_dropout(), Broken(tasks=4), TRAINING, Run(tmp_path), validate=validate)


def test_files_are_plain(tmp_path: Path) -> None:
    run = Run(tmp_path)
    go(run)
    assert {path.name for path in tmp_path.iterdir()} == {
        "best.safetensors",
        "metrics.jsonl",
        "model.safetensors",
        "trainer.pt",
    }
    events = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if "loss" in event] == [2, 4, 6, 8, 10, 12]
    assert [event["step"] for event in events if "validation_mse" in event] == [4, 8, 12]
