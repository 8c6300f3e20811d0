"""The house rules that a machine can check: imports one way, short files and functions, one public surface."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import fewstep

SOURCE = Path(fewstep.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))

# A file may import only from rooms in rows above its own, and from its own room.
ROWS = [
    ["reach"],
    [
        "errors",
        "modes",
        "replay",
        "watch",
        "convolution",
        "footprint",
        "splitting",
        "mending",
        "progress",
        "replacing",
    ],
    ["task", "pooling", "channels_last", "hoisting", "structure", "building", "losses"],
    ["compilation"],
    ["patterns", "normalisation", "labels", "cuda_graph"],
    ["ragged", "loss_of"],
    ["functional"],
    ["engine", "models", "updates", "adapted"],
    ["kept", "look"],
    ["per_task", "problem"],
    ["finite_difference", "starts"],
    ["unrolled"],
    ["gradient", "checks", "long_loop", "implicit"],
    ["engine_checks"],
    ["learner"],
    ["algorithms", "data", "diagnose", "meta_step", "streams"],
    ["distributed", "trial"],
    ["agreement", "output"],
    ["search"],
    ["planner", "evaluate", "run", "ensemble"],
    ["train", "launch", "calibrate", "protocol", "heads", "rl"],
    ["baselines"],
    ["recipes"],
    ["commands", "plots"],
    ["tables"],
    ["judge", "classifier"],
    ["comparison", "predict", "export", "film"],
    ["report", "options"],
    ["cli"],
    ["__main__", "__init__"],
]
ROW = {room: number for number, row in enumerate(ROWS) for room in row}


def room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "fewstep":
            parts = node.module.split(".")[1:]
            found |= {parts[0]} if parts else {alias.name for alias in node.names if alias.name in ROW}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("fewstep.")}
    return found


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(SOURCE)) for path in FILES])
def test_imports_go_one_way(path: Path) -> None:
    own = room(path)
    assert own in ROW, f"{own} has no row yet: say in ROWS where it stands"
    wrong = {other for other in imported_rooms(path) if other != own and ROW[other] >= ROW[own]}
    assert not wrong, f"{own} must not import {wrong}"


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(SOURCE)) for path in FILES])
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 60, f"{node.name} is too long"
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", text)


def test_training_and_evaluation_know_no_method_data_set_or_recipe_by_name() -> None:
    for name in ("train", "evaluate", "learner", "gradient", "engine"):
        words = (SOURCE / f"{name}.py").read_text().lower()
        assert not re.search(r"omniglot|sinusoid|glyphs|fomaml|hf_maml", words)


def test_every_method_is_a_file_and_every_file_a_method() -> None:
    files = {path.stem for path in (SOURCE / "algorithms").glob("*.py")} - {"__init__"}
    assert files == set(fewstep.algorithms.__all__)
    assert all(hasattr(fewstep, name) for name in files)


def test_every_public_name_is_documented() -> None:
    for name in fewstep.__all__:
        assert getattr(fewstep, name).__doc__, name
