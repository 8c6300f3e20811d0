"""The report: plots that show something, and tables that repeat evaluation.json, never without its protocol."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from fewstep import plots
from fewstep.commands import train_run
from fewstep.errors import InputError
from fewstep.judge import evaluate_run
from fewstep.recipes import RECIPES
from fewstep.recipes.sinusoid import SinusoidRecipe
from fewstep.report import _training, report_run
from fewstep.tables import describe, markdown, table


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short run on sinusoids, judged beside two baselines and reported."""
    path = tmp_path_factory.mktemp("runs") / "sinusoid"
    recipe = RECIPES["sinusoid"]
    assert isinstance(recipe, SinusoidRecipe)
    short = replace(recipe, iterations=40, check_every=20, log_every=4, plan=False, pretrain_iterations=20)
    train_run("sinusoid", replace(short, ablations=False, test_episodes=20, validation_episodes=20), path)
    evaluate_run(path)
    report_run(path)
    return path


@pytest.fixture
def run(evaluated: Path, tmp_path: Path) -> Path:
    """A copy of that run."""
    return shutil.copytree(evaluated, tmp_path / "run")


def read(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "evaluation.json").read_text())
    return content


def classification() -> dict[str, Any]:
    """An evaluation with accuracies, as evaluate_run writes it."""
    protocol = {
        "ways": 5,
        "shots": 1,
        "queries_per_class": 1,
        "normalisation": "batch statistics (transductive)",
        "class_rotations": True,
        "inner_lr": 0.4,
    }
    by_step = [{"step": step, "mean": 0.2 + 0.07 * step, "ci95": 0.004} for step in range(11)]
    entry = {"name": "1 queries/class", "metric": "accuracy", "by_step": by_step, "episodes": 600, "protocol": protocol}
    baselines = {
        "unadapted | net": {**entry, "by_step": by_step[:1]},
        "fine-tuned": {**entry, "fine_tuning_lr": 0.03},
    }
    other = {**entry, "name": "15 queries/class", "protocol": {**protocol, "queries_per_class": 15}, "baselines": {}}
    about = {"recipe": "omniglot-5way-1shot", "seed": 3, "iterations": 60_000, "seconds": 1.0}
    return {**about, **entry, "baselines": baselines, "other_protocols": [other]}


def test_a_curve_says_what_it_was_validated_on(monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[Any] = []
    monkeypatch.setattr("fewstep.plots.training_figure", lambda *about: notes.append(about[-2]))
    events: list[dict[str, Any]] = [
        {"step": 1, "loss": 1.0, "seconds": 1.0},
        {"step": 1, "validation_accuracy": [0.2, 0.4]},
    ]
    tasks = {"recipe": "mine", "seed": 0, "validation_episodes": 100, "ways": 5, "shots": 2, "queries": 7}
    for more in ({"test_queries": 15}, {"test_queries": None}):
        _training({**tasks, **more}, events, None)
    _training({"recipe": "sinusoid", "seed": 0, "shots": 10, "queries": 7}, events, None)
    assert notes == ["100 validation tasks: 5-way, 2-shot, queries per class: 15",
                     "100 validation tasks: 5-way, 2-shot, queries per class: 2",
                     "validation: 10-shot, 7 queries per task"]  # fmt: skip


def shown(evaluation: dict[str, Any], width: int = 200) -> str:
    console = Console(width=width)
    with console.capture() as capture:
        console.print(table(evaluation))
    return capture.get()


def check_picture(path: Path) -> None:
    """A PNG of a good size, neither blank nor of one colour."""
    with Image.open(path) as image:
        image.verify()
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert min(pixels.shape[:2]) >= 400
    colors = pixels @ [65536, 256, 1]
    assert 0.01 < (colors != 0xFFFFFF).mean() < 0.6
    assert len(np.unique(colors)) > 50


def test_report_of_a_sinusoid_run(evaluated: Path) -> None:
    text = (evaluated / "report.md").read_text()
    assert markdown(read(evaluated)) in text
    for name in ("training.png", "steps.png", "adaptation.png"):
        check_picture(evaluated / name)
        assert f"({name})" in text
    assert not list(evaluated.glob(".*.part"))


def test_a_curve_has_the_name_of_its_method(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps({**config, "algorithm": "fomaml"}))
    figure = plots.adaptation_figure
    names: list[str] = []

    def noted(title: str, learners: Any, episodes: Any) -> Any:
        names.extend(learners)
        return figure(title, learners, episodes)

    monkeypatch.setattr(plots, "adaptation_figure", noted)
    report_run(run)
    assert names[0].startswith("fomaml (rate")


def test_report_trains_nothing_and_says_what_is_old(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Image.open(run / "adaptation.png") as image:
        width = image.width
    shutil.rmtree(run / "baselines")
    (run / "evaluation.json").write_text(json.dumps({**read(run), "iterations": 20}))
    written = report_run(run)
    assert [path.name for path in written] == ["training.png", "steps.png", "adaptation.png", "report.md"]
    said = " ".join(capsys.readouterr().err.split())
    assert "left out until it is trained" in said
    assert "trained further" in said
    assert not (run / "baselines").exists()
    check_picture(run / "adaptation.png")
    with Image.open(run / "adaptation.png") as image:
        assert image.width < width, "one column is left"


def test_rows_repeat_the_evaluation(run: Path) -> None:
    evaluation = read(run)
    text = shown(evaluation)
    for entry in (evaluation, *evaluation["baselines"].values()):
        for point in [*entry["by_step"], *(evaluation["gains"] if entry is evaluation else [])]:
            if point["step"] in (0, 1, 5, 10):
                assert f"{point['mean']:.3f} ± {point['ci95']:.3f}" in text
    assert all(name in text for name in ("meta-learned", "gain per episode", *evaluation["baselines"]))
    assert all(f" {step} step" in text for step in (0, 1, 5, 10))
    assert " 2 steps" not in text
    assert table(evaluation).row_count == 2 + len(evaluation["baselines"])


def test_accuracies_are_in_percent_and_with_their_protocol() -> None:
    evaluation = classification()
    for text in (" ".join(shown(evaluation).split()), markdown(evaluation)):
        assert "27.00 ± 0.40" in text
        assert "90.00 ± 0.40" in text
        assert "fine-tuned (rate 0.03)" in text
        for word in ("5-way, 1-shot", "queries per class: 1,", "transductive", "class rotations", "600 episodes",
                     "60,000 iterations", "seed 3"):  # fmt: skip
            assert word in text


def test_markdown_has_a_table_for_each_protocol() -> None:
    evaluation = classification()
    text = markdown(evaluation)
    assert text.count("## omniglot-5way-1shot") == 2
    assert "queries per class: 15" in text
    assert r"unadapted \| net" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == (2 + 3) + (2 + 1)
    assert {row.replace(r"\|", "").count("|") for row in rows} == {6}


def test_few_steps_and_divergence() -> None:
    evaluation = classification()
    evaluation["by_step"] = evaluation["by_step"][:4]
    evaluation["metric"] = "mse"
    evaluation["by_step"][1]["mean"] = math.nan
    evaluation["by_step"][3]["mean"] = 3.0e12
    row = next(line for line in markdown(evaluation).splitlines() if line.startswith("| meta-learned"))
    assert row == "| meta-learned | 0.200 ± 0.004 | diverged | 3.0e+12 ± 4.0e-03 |"


def test_only_an_evaluation_or_a_diverged_one(tmp_path: Path) -> None:
    for metric in ("accuracy", "mse"):
        evaluation = {**classification(), "metric": metric}
        if metric == "mse":
            for point, value in zip(evaluation["by_step"][4:], (1e9, 1e20, math.inf, *[math.nan] * 4), strict=True):
                point["mean"] = value
        (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
        assert [path.name for path in report_run(tmp_path)] == ["steps.png", "report.md"]
        check_picture(tmp_path / "steps.png")


def test_run_without_evaluation(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "evaluation.json").unlink()
    assert [path.name for path in report_run(run)] == ["training.png"]
    assert f"fewstep evaluate {run}" in " ".join(capsys.readouterr().err.split())


def test_run_with_metrics_only(run: Path, tmp_path: Path) -> None:
    events = [line for line in (run / "metrics.jsonl").read_text().splitlines() if "validation" not in line]
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "metrics.jsonl").write_text("\n".join(events[:3]))
    assert [path.name for path in report_run(bare)] == ["training.png"]
    check_picture(bare / "training.png")


def test_no_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not the folder of a run"):
        report_run(tmp_path)
    with pytest.raises(InputError, match="not the folder of a run"):
        report_run(tmp_path / "missing")
    assert not (tmp_path / "missing").exists()


def test_run_with_nothing_to_show(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="no logged losses"):
        report_run(tmp_path)


@pytest.mark.parametrize("content", ["[]", '{"recipe": "sinusoid"}', "{"])
def test_broken_evaluation(run: Path, content: str) -> None:
    (run / "evaluation.json").write_text(content)
    with pytest.raises(InputError, match=r"evaluation\.json"):
        report_run(run)


def test_protocol_words() -> None:
    evaluation = classification()
    evaluation["protocol"] = {"shots": 2, "class_rotations": False, "own_field": "x", "inner_lr": None}
    assert describe(evaluation).startswith("2-shot, no class rotations, own field x, 600 episodes")
