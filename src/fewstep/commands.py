"""What `fewstep train` does, and which recipe a run was made with."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewstep.data.episodes import Episodes
from fewstep.data.places import expanded
from fewstep.distributed import check_processes, from_first, processes_here, share
from fewstep.engine import Engine
from fewstep.errors import InputError
from fewstep.learner import Learner
from fewstep.patterns import head_of
from fewstep.planner import GIB, Plan, plan
from fewstep.progress import narrate, progress
from fewstep.recipes import RECIPES, Recipe
from fewstep.recipes.base import usable
from fewstep.run import Run
from fewstep.train import train

ENGINE, CLASSES = "engine.json", "classes.json"
PATHS = {"init_from", "root", "data", "split_file"}
# Fields that may change when a run is taken up again.
FREE_FIELDS = {
    "iterations", "device", "log_every", "test_episodes", "pretrain_iterations", "recurrent_iterations",
    "first_order_iterations", "ablations", "root", "plan_seconds", "memory_limit", "keep", "skip_failures",
    "step_limit",
}  # fmt: skip


def train_run(name: str, recipe: Recipe, out: Path) -> None:
    """Train a recipe into the folder `out`, or go on with the training that is there."""
    run = Run(out)
    config = {"recipe": name, **_plain(recipe)}
    if run.exists:
        recipe_of(run)
        _check_same(run.read_json("config.json"), config, out)
        check_classes(run, recipe)
    elif (out / "trainer.pt").exists():
        raise InputError(f"{out} holds a checkpoint whose config.json is gone; delete it, or give another --out")
    check_processes(processes_here(), recipe.meta_batch, recipe.device)
    learner, episodes = recipe.learner(), recipe.episodes("train")
    done = from_first(lambda: (run.load_state() or {"step": None})["step"])
    recipe.episodes("validation"), recipe.protocols()  # what cannot be judged is not worth training
    recipe.check(learner, episodes)  # nor is what these tasks, or these processes, do not allow
    if done is None and recipe.init_from:
        begin_from(recipe.init_from, learner)
    run.write_json("config.json", config)
    if done is None and (classes := recipe.classes):
        run.write_json(CLASSES, classes)
    narrate(f"{name}: iteration {done or 0} of {recipe.iterations}, in {out}")
    if done is None and not recipe.init_from:
        learner = recipe.learner(recipe.first_model(run))
    done = done or 0
    if recipe.plan and done < recipe.iterations:
        learner.engine = from_first(lambda: _planned_engine(recipe, run, learner, episodes))
    with progress(recipe.iterations, done=done) as report:
        train(
            learner, episodes, recipe.training(), run, validate=recipe.validate, step_of=recipe.step_of, report=report
        )
    narrate(f"trained; now: fewstep evaluate {shlex.quote(str(out))}")


def begin_from(path: Path, learner: Learner) -> None:
    """Give the learner the weights of a run or of a net; its head stays where theirs is of another number of ways.

    `InputError` where another tensor of the net is missing or of another shape. What the method has learned beside the
    net, such as rates, is taken where it fits.
    """
    file = path / "model.safetensors" if path.is_dir() else path
    weights, own = Run(file.parent).load_weights(file.name), learner.state_dict()
    if not weights.keys() & own.keys():  # of a net alone, such as a baseline's
        weights = {f"model.{name}": value for name, value in weights.items()}
    fitting = {name: weights[name] for name in own if name in weights and weights[name].shape == own[name].shape}
    new = [name for name in own if name not in fitting]
    head = f"model.{head_of(learner.model)}."
    if other := [name for name in new if name.startswith("model.") and not name.startswith(head)]:
        there = f"of shape {list(weights[other[0]].shape)}" if other[0] in weights else "missing"
        raise InputError(f"--init-from {file} is of another net: {other[0]!r} must be of shape "
                         f"{list(own[other[0]].shape)}, but it is {there}; train the same net")  # fmt: skip
    learner.load_state_dict({**own, **fitting})
    narrate(f"beginning with {file}{', but for ' + ', '.join(new) if new else ''}")


def check_classes(run: Run, recipe: Recipe) -> None:
    """`InputError` where the user's folder splits into other classes now: the test may have some of training's."""
    if not (run.path / CLASSES).exists():  # a run of before they were kept, or of fixed classes
        return
    before = run.read_json(CLASSES)
    with run.reading(CLASSES):
        old = {(name, split) for split, names in before.items() for name in names}
    new = {(name, split) for split, names in recipe.classes.items() for name in names}
    if old == new:
        return
    changes = [f"{name!r} is {amiss} {split}" for amiss, found in (("no more in", old - new), ("new in", new - old))
               for name, split in sorted(found)[:3]]  # fmt: skip
    raise InputError(
        f"the classes are split otherwise than when {run.path} was begun: {', '.join(changes)}, perhaps more; what was "
        "trained on must not be judged on, so have the folder and its split as they were, or train anew"
    )


def _planned_engine(recipe: Recipe, run: Run, learner: Learner, episodes: Episodes) -> Engine:
    """The engine in the run's folder; where there is none, one is planned on the first tasks, and kept."""
    tasks = share(episodes[0])
    if (known := _kept_plan(run)) is not None:
        if _is_elsewhere(known, recipe):
            narrate(f"the engine was planned on {known.machine.get('device')}, and this is {recipe.device}")
        elif recipe.memory_limit is not None and known.peak_of(tasks.size) > recipe.memory_limit * GIB:
            limit = f"--memory-limit {recipe.memory_limit:g}"
            raise InputError(
                f"the engine in {run.path / ENGINE} takes more than {limit} for {tasks.size} tasks ({known}); "
                "delete that file to plan anew"
            )
        else:
            return known.engine
    narrate(f"timing ways to compute on the first tasks, for up to {recipe.plan_seconds:g} s (--no-plan leaves it out)")
    chosen = plan(learner, tasks, seconds=recipe.plan_seconds, memory=recipe.memory_limit,
                  clip=recipe.clip, **recipe.choices)  # fmt: skip
    run.write_json(ENGINE, chosen.to_json())
    narrate(str(chosen))
    return chosen.engine


def judging_engine(recipe: Recipe, run: Run) -> Engine:
    """The engine that the run was trained with, as far as it is of use without a backward pass."""
    known = _kept_plan(run)
    if known is None or _is_elsewhere(known, recipe):
        return recipe.engine
    compiled: Any = "pieces" if known.engine.compile == "pieces" else "no"  # a whole step has a backward pass
    return dataclasses.replace(known.engine, compile=compiled, keep=False, graph=False)


def _is_elsewhere(known: Plan, recipe: Recipe) -> bool:
    """Whether it was made for the other kind of device."""
    return (known.machine.get("device") == "cpu") != (recipe.device == "cpu")


def _kept_plan(run: Run) -> Plan | None:
    if not (run.path / ENGINE).exists():
        return None
    with run.reading(ENGINE) as path:
        return Plan.from_json(json.loads(path.read_text()))


def recipe_of(run: Run) -> tuple[str, Recipe]:
    """The recipe that a run was made with."""
    return recipe_from(run.read_json("config.json"), str(run.path / "config.json"))


def recipe_from(content: Any, where: str) -> tuple[str, Recipe]:
    """The recipe out of the content of a config.json."""
    config = dict(content) if isinstance(content, dict) else {}
    name = config.pop("recipe", None)
    if not isinstance(name, str) or name not in RECIPES:
        raise InputError(f"{where} names the recipe {name!r}; there are: {', '.join(RECIPES)}")
    fields = {field.name for field in dataclasses.fields(RECIPES[name])}
    if unknown := set(config) - fields:
        raise InputError(f"{where} has the unknown fields {', '.join(sorted(unknown))}")
    for key in PATHS & set(config):
        config[key] = None if config[key] is None else Path(config[key])
    if not usable(config.get("device", "cpu")):
        narrate(f"this machine has no {config['device']}, with which {where} was written; computing on the CPU")
        config["device"] = "cpu"
    for field, value in config.items():
        default = getattr(RECIPES[name], field)
        known = (type(default), int) if isinstance(default, float) else type(default)
        if None not in (default, value) and not isinstance(value, known):
            raise InputError(f"{where}: {field} is {value!r}, but {default!r} is of its kind")
    return name, dataclasses.replace(RECIPES[name], **config)


def _plain(recipe: Recipe) -> dict[str, Any]:
    fields = dataclasses.asdict(recipe).items()
    return {key: str(expanded(value).absolute()) if isinstance(value, Path) else value for key, value in fields}


def _check_same(before: Mapping[str, Any], now: Mapping[str, Any], out: Path) -> None:
    """Raise `InputError` where the folder holds a run with other settings."""
    scheduled = {"iterations", "first_order_iterations"}  # a schedule depends on them
    free = FREE_FIELDS - (scheduled if now["schedule"] != "constant" else set())
    known = {**_plain(RECIPES[now["recipe"]]), **before}  # a run of before a field came has its default
    if not now["plan"]:  # nobody chooses then
        known, now = ({**config, "compile": config["compile"] or "no"} for config in (known, now))
    different = [
        f"{key} {known[key]!r} (now {value!r})" for key, value in now.items() if known[key] != value and key not in free
    ]
    if different:
        raise InputError(f"{out} holds a run with {', '.join(different)}; give the same options or another --out")
