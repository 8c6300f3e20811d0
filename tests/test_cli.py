"""The command line, end to end: training, evaluation, report, and what a user does wrong."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import fewstep
from fewstep.cli import main
from fewstep.data import SinusoidEpisodes
from fewstep.recipes import RECIPES
from fewstep.run import Run

OPTIONS = """
    --no-plan --iterations 6 --check-every 3 --log-every 1 --meta-batch 2 --validation-episodes 4
    --test-episodes 8 --test-steps 2 --pretrain-iterations 3
"""
QUICK = OPTIONS.split()


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must exit with 2, and return its one line."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    out = capsys.readouterr()
    assert out.out == ""
    (line,) = out.err.strip().splitlines()
    assert line.startswith("fewstep: ")
    return line


def test_sinusoid_from_training_to_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    main(["train", "sinusoid", *QUICK, "--no-ablations", "--out", str(out)])
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    assert [event["step"] for event in events if "loss" in event] == [1, 2, 3, 4, 5, 6]
    main(["evaluate", str(out)])
    printed = capsys.readouterr().out
    assert "oracle" in printed
    assert str(out / "evaluation.json") in printed
    evaluation = json.loads((out / "evaluation.json").read_text())
    assert set(evaluation) >= {
        *("recipe", "metric", "by_step", "episodes", "protocol", "baselines", "seed", "iterations", "seconds"),
    }
    assert [point["step"] for point in evaluation["by_step"]] == [0, 1, 2]
    assert evaluation["episodes"] == 8
    assert [entry["protocol"]["shots"] for entry in (evaluation, *evaluation["other_protocols"])] == [10, 5, 20]
    assert set(evaluation["baselines"]) == {
        "the same net without adaptation",
        "pre-trained on all tasks, fine-tuned",
        "oracle",
    }
    main(["report", str(out)])
    written = [Path(line) for line in capsys.readouterr().out.split()]
    assert {path.name for path in written} == {"training.png", "steps.png", "adaptation.png", "report.md"}
    assert all(path.stat().st_size > 0 for path in written)


def test_a_second_evaluation_takes_the_trained_baselines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    main(["train", "sinusoid", *QUICK, "--no-ablations", "--out", str(tmp_path)])
    main(["evaluate", str(tmp_path)])
    first = json.loads((tmp_path / "evaluation.json").read_text())
    monkeypatch.setattr("fewstep.recipes.sinusoid.pretrain_on_tasks", None)
    main(["evaluate", str(tmp_path)])
    second = json.loads((tmp_path / "evaluation.json").read_text())
    assert {**first, "seconds": 0} == {**second, "seconds": 0}


@pytest.mark.parametrize("derivative", ["exact", "none", "finite_difference"])
def test_glyphs_by_each_derivative(tmp_path: Path, derivative: str) -> None:
    main(["train", "glyphs-5way-1shot", *QUICK, "--derivative", derivative, "--out", str(tmp_path)])
    main(["evaluate", str(tmp_path)])
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    protocol = evaluation["protocol"]
    assert protocol["queries_per_class"] == 1
    assert protocol["normalisation"] == "batch statistics (transductive)"
    assert evaluation["other_protocols"][0]["protocol"]["queries_per_class"] == 15
    assert 0 <= evaluation["by_step"][-1]["mean"] <= 1
    assert "pre-trained on all classes, fine-tuned" in evaluation["baselines"]


def test_real_omniglot(tmp_path: Path, omniglot_root: Path) -> None:
    for name in ("omniglot-5way-1shot", "omniglot-5way-1shot-mlp"):
        options = [*QUICK, "--root", str(omniglot_root), "--out", str(tmp_path / name)]
        main(["train", name, *options])
        main(["evaluate", str(tmp_path / name), "--no-baselines"])
        evaluation = json.loads((tmp_path / name / "evaluation.json").read_text())
        assert evaluation["protocol"]["class_rotations"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_exits_with_130(tmp_path: Path, number: int) -> None:
    arguments = ["train", "sinusoid", "--no-plan", "--log-every", "1", "--out", str(tmp_path)]
    process = subprocess.Popen([sys.executable, "-m", "fewstep", *arguments], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not Run(tmp_path).metrics() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, number)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in error
    assert error.splitlines()[-1] == "fewstep: stopped; the same command goes on from the last checkpoint"
    state = Run(tmp_path).load_state()
    assert state is not None
    assert state["step"] == Run(tmp_path).metrics()[-1]["step"]


def test_a_run_goes_on_only_with_its_own_settings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", "sinusoid", *QUICK, "--out", str(tmp_path)])
    before = (tmp_path / "config.json").read_bytes()
    capsys.readouterr()
    line = fails(capsys, "train", "sinusoid", *QUICK, "--inner-lr", "0.5", "--out", str(tmp_path))
    assert "inner_lr 0.001 (now 0.5); give the same options or another --out" in line
    assert "recipe 'sinusoid' (now 'glyphs" in fails(capsys, "train", "glyphs-5way-1shot", "--out", str(tmp_path))
    assert (tmp_path / "config.json").read_bytes() == before
    main(["train", "sinusoid", *QUICK, "--iterations", "8", "--out", str(tmp_path)])
    state = Run(tmp_path).load_state()
    assert state is not None
    assert state["step"] == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian"], "unknown command 'trian'; did you mean 'train'?"),
        (["train", "sinusiod"], "unknown recipe 'sinusiod'; did you mean 'sinusoid'?"),
        (["train", "sinusoid", "--iteratons", "3"], "--iteratons"),
        (["train", "sinusoid", "--iterations", "many"], "invalid literal for int() with base 10: 'many'"),
        (["train", "sinusoid", "--iterations", "0"], "--iterations must be at least 1, but 0 came"),
        (["train", "sinusoid", "--device", "nowhere"], "--device 'nowhere' cannot be used"),
        (["train", "sinusoid", "--derivative", "third"], "'third'"),
        (["train", "sinusoid", "--derivative", "none", "--algorithm", "reptile"], "what makes reptile what it is"),
        (["train", "glyphs-5way-1shot", "--ways", "9999", "--out", "unused"], "9999 ways asked of"),
        (["train", "sinusoid", "--inner-lr", "-1", "--out", "unused"], "inner learning rate must be above 0"),
        (["train", "sinusoid", "--clip", "-1"], "--clip must be above 0, but -1.0 came"),
        (["train", "sinusoid", "--meta-lr", "nan"], "--meta-lr must be above 0 and finite, but nan came"),
        (["train", "sinusoid", "--seed", "99999999999999999999"], "--seed must be from 0 to 2^60"),
        (["train", "sinusoid", "--validation-episodes", "1"], "--validation-episodes must be at least 2, but 1 came"),
        (["train", "sinusoid", "--device", "meta"], "--device 'meta' cannot be used"),
        (["train", "glyphs-5way-1shot", "--queries", "0", "--out", "unused"], "at least 1"),
        (["list"], "say what to list"),
        (["evaluate", "nowhere"], "nowhere/config.json is not there"),
        (["evaluate"], "PATH"),
        (["report", "nowhere"], "nowhere is not the folder of a run"),
        (["list", "everything"], "unknown list 'everything'"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in fails(capsys, *arguments)
    assert not list(tmp_path.iterdir())


def test_a_run_of_a_missing_device_is_evaluated_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", "sinusoid", *QUICK, "--out", str(tmp_path)])
    run = Run(tmp_path)
    run.write_json("config.json", {**run.read_json("config.json"), "device": "meta:1:2"})
    main(["evaluate", str(tmp_path), "--no-baselines", "--episodes", "5"])
    assert "computing on the CPU" in capsys.readouterr().err
    assert run.read_json("evaluation.json")["episodes"] == 5


def test_out_is_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    assert "cannot write" in fails(capsys, "train", "sinusoid", *QUICK, "--out", str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("config", ["[]", '{"recipe": ["a"]}', '{"recipe": "sinusoid", "shots": "ten"}', "{"])
def test_a_damaged_config(tmp_path: Path, config: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(config)
    for command in (["evaluate", str(tmp_path)], ["train", "sinusoid", *QUICK, "--out", str(tmp_path)]):
        assert "config.json" in fails(capsys, *command)
    assert (tmp_path / "config.json").read_text() == config


def test_an_untrained_run_and_a_damaged_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", "sinusoid", *QUICK, "--out", str(tmp_path)])
    capsys.readouterr()
    (tmp_path / "trainer.pt").write_bytes(b"PK rubbish")
    assert "trainer.pt is damaged" in fails(capsys, "train", "sinusoid", *QUICK, "--out", str(tmp_path))
    (tmp_path / "best.safetensors").unlink()
    assert "has not been validated yet; train on, or use --weights model" in fails(
        capsys, "evaluate", str(tmp_path), "--no-baselines"
    )
    (tmp_path / "config.json").write_text(json.dumps({"recipe": "sinusoid", "speed": 3}))
    assert "unknown fields speed" in fails(capsys, "evaluate", str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "usage: fewstep train RECIPE"),
        (["--help"], "usage: fewstep train RECIPE"),
        (["--version"], f"fewstep {fewstep.__version__}"),
        (["train"], "omniglot-20way-5shot"),
        (["list", "algorithms"], "hf_maml"),
        (["list", "datasets"], "glyphs"),
    ],
)
def test_help(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(arguments)
    assert expected in capsys.readouterr().out


def test_every_field_of_every_recipe_is_an_option_with_help(capsys: pytest.CaptureFixture[str]) -> None:
    for name, recipe in RECIPES.items():
        with pytest.raises(SystemExit) as stop:
            main(["train", name, "--help"])
        assert stop.value.code == 0
        text = capsys.readouterr().out
        for field in dataclasses.fields(recipe):
            assert f"--{field.name.replace('_', '-')}" in text


PAPER: dict[str, dict[str, Any]] = {
    "sinusoid": {"meta_batch": 25, "inner_steps": 1, "shots": 10, "iterations": 70_000},
    "omniglot-5way-1shot": {"ways": 5, "shots": 1, "inner_lr": 0.4, "inner_steps": 1, "meta_batch": 32},
    "omniglot-5way-5shot": {"ways": 5, "shots": 5, "inner_lr": 0.4, "inner_steps": 1, "meta_batch": 32},
    "omniglot-20way-1shot": {"ways": 20, "shots": 1, "inner_lr": 0.1, "inner_steps": 5, "meta_batch": 16},
    "omniglot-20way-5shot": {"ways": 20, "shots": 5, "inner_lr": 0.1, "inner_steps": 5, "meta_batch": 16},
    "omniglot-5way-1shot-mlp": {"ways": 5, "shots": 1, "inner_lr": 0.4, "network": "mlp"},
    "omniglot-5way-5shot-mlp": {"ways": 5, "shots": 5, "inner_lr": 0.4, "network": "mlp"},
    "omniglot-5way-1shot-context": {"shots": 1, "inner_lr": 0.4, "network": "context", "adapting": "context"},
    "omniglot-5way-5shot-context": {"shots": 5, "inner_lr": 0.4, "network": "context", "adapting": "context"},
}


CLIP = 10  # of the authors' loss, on Mini-ImageNet; ours is shots / queries times it
PUBLISHED: dict[str, dict[str, Any]] = {
    "miniimagenet-5way-1shot": {"inner_lr": 0.01, "inner_steps": 5, "meta_batch": 4, "clip": CLIP / 15, "filters": 32},
    "miniimagenet-5way-5shot": {"inner_lr": 0.01, "inner_steps": 5, "meta_batch": 2, "clip": CLIP / 3, "filters": 32},
    "miniimagenet-5way-5shot-first-order": {"derivative": "none", "meta_batch": 2, "clip": CLIP / 3, "queries": 15},
    "miniimagenet-5way-1shot-maml-pp": {"inner_lr": 0.01 / 5, "schedule": "constant", "clip": 5 * CLIP, "filters": 48},
    "omniglot-20way-5shot-maml-pp": {"inner_lr": 0.1 / 20, "schedule": "cosine", "inner_steps": 5, "meta_batch": 8},
    "miniimagenet-5way-1shot-unicorn": {"inner_lr": 0.1 / 5, "inner_steps": 5, "test_steps": 5, "derivative": "none"},
    "miniimagenet-5way-5shot-unicorn": {"inner_lr": 0.1 / 5, "inner_steps": 20, "test_steps": 20, "queries": 15},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_other_recipes_have_the_published_settings(name: str) -> None:
    """Their inner rates are of the mean loss, ours of N times it."""
    for field, value in PUBLISHED[name].items():
        assert getattr(RECIPES[name], field) == pytest.approx(value)


def test_the_authors_clip_goes_with_its_shots_and_queries(capsys: pytest.CaptureFixture[str]) -> None:
    for shots, told in ((1, ""), (5, "for 5 and 15 theirs is --clip 3.333")):
        named: Any = RECIPES["miniimagenet-5way-1shot"]
        recipe = dataclasses.replace(named, shots=shots)
        learner = recipe.learner()
        recipe.check(learner, SinusoidEpisodes(tasks=1))
        assert (told in capsys.readouterr().err) if told else not capsys.readouterr().err


@pytest.mark.parametrize("name", PAPER)
def test_recipes_have_the_papers_settings(name: str) -> None:
    recipe = RECIPES[name]
    assert recipe.meta_lr == 1e-3
    assert recipe.test_steps == 10
    assert recipe.test_episodes == 600
    for field, value in PAPER[name].items():
        assert getattr(recipe, field) == value


def test_options_of_a_method(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    train = ["train", "glyphs-5way-1shot", *QUICK, "--algorithm", "maml_pp", "--out", str(tmp_path / "run")]
    main([*train, "--algorithm-options", "anneal=3,step_norms=False"])
    assert Run(tmp_path / "run").read_json("config.json")["algorithm_options"] == "anneal=3,step_norms=False"
    capsys.readouterr()
    assert "maml_pp has: multi_step, anneal" in fails(capsys, *train, "--algorithm-options", "aneal=3")
    assert "--algorithm must be one of alfa" in fails(capsys, *train, "--algorithm", "mammal")


def test_a_method_that_does_not_suit_leaves_nothing_behind(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    line = fails(capsys, "train", "sinusoid", *QUICK, "--algorithm", "proto_maml", "--out", str(out))
    assert "integer labels" in line
    assert not (out / "config.json").exists()
