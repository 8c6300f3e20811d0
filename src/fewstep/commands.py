"""What each command of the command line does."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from fewstep.baselines import Contender, contend
from fewstep.calibrate import calibrate
from fewstep.data.episodes import Episodes
from fewstep.distributed import check_processes, from_first, processes_here, share
from fewstep.engine import Engine
from fewstep.errors import InputError
from fewstep.evaluate import evaluate
from fewstep.learner import Learner
from fewstep.normalisation import MEANINGS, Policy
from fewstep.planner import GIB, Plan, plan
from fewstep.progress import narrate, progress
from fewstep.recipes import RECIPES, Recipe
from fewstep.recipes.base import usable
from fewstep.run import Run
from fewstep.train import train

ENGINE = "engine.json"
# Fields that may change when a run is taken up again.
FREE_FIELDS = {
    "iterations", "device", "log_every", "test_episodes", "pretrain_iterations", "ablations", "root", "plan_seconds",
    "memory_limit",
}  # fmt: skip


def train_run(name: str, recipe: Recipe, out: Path) -> None:
    """Train a recipe into the folder `out`, or go on with the training that is there."""
    run = Run(out)
    config = {"recipe": name, **_plain(recipe)}
    if run.exists:
        recipe_of(run)
        _check_same(run.read_json("config.json"), config, out)
    check_processes(processes_here(), recipe.meta_batch, recipe.device)
    learner, episodes, state = recipe.learner(), recipe.episodes("train"), run.load_state()
    recipe.protocols()  # what cannot be evaluated is not worth training
    learner.known(episodes[0])  # nor is what has a start that these tasks do not give
    run.write_json("config.json", config)
    done = state["step"] if state else 0
    narrate(f"{name}: iteration {done} of {recipe.iterations}, in {out}")
    if recipe.plan and done < recipe.iterations:
        learner.engine = from_first(lambda: _planned_engine(recipe, run, learner, episodes))
    with progress(recipe.iterations, done=done) as report:
        train(learner, episodes, recipe.training(), run, validate=recipe.validate, report=report)
    narrate(f"trained; now: fewstep evaluate {out}")


def _planned_engine(recipe: Recipe, run: Run, learner: Learner, episodes: Episodes) -> Engine:
    """The engine in the run's folder; where there is none, one is planned on the first tasks, and kept."""
    if (run.path / ENGINE).exists():
        with run.reading(ENGINE) as path:
            known = Plan.from_json(json.loads(path.read_text()))
        if recipe.memory_limit is not None and (known.chosen.peak or 0) > recipe.memory_limit * GIB:
            limit = f"--memory-limit {recipe.memory_limit:g}"
            raise InputError(f"the engine in {path} takes more than {limit} ({known}); delete that file to plan anew")
        return known.engine
    narrate(f"timing ways to compute on the first tasks, for up to {recipe.plan_seconds:g} s (--no-plan leaves it out)")
    chosen = plan(learner, share(episodes[0]), seconds=recipe.plan_seconds, memory=recipe.memory_limit,
                  clip=recipe.clip, **recipe.choices)  # fmt: skip
    run.write_json(ENGINE, chosen.to_json())
    narrate(str(chosen))
    return chosen.engine


def evaluate_run(
    path: Path, weights: str = "best", baselines: bool = True, episodes: int | None = None,
    normalisation: Policy = "batch", protocols: Literal["all", "first"] = "all",
) -> dict[str, Any]:  # fmt: skip
    """Judge a run on the test tasks of its recipe, beside the baselines, and write evaluation.json.

    normalisation : by which statistics batch norm goes, in the learner and in the baselines
    protocols : all test protocols of the recipe, or only the first, the paper's own
    """
    run = Run(path)
    name, recipe = recipe_of(run)
    if episodes is not None:
        recipe = dataclasses.replace(recipe, test_episodes=episodes)
    started = time.monotonic()
    learner = recipe.learner()
    if weights == "best" and not (path / "best.safetensors").exists() and (path / "model.safetensors").exists():
        raise InputError(f"{path} has not been validated yet; train on, or use --weights model")
    run.restore(f"{weights}.safetensors", learner)
    policy = _policy_of(recipe, normalisation)
    _prepare(policy, recipe.episodes("train"), recipe.test_steps, learner)
    contenders = contenders_of(recipe, run, policy) if baselines else []
    results = []
    chosen = list(recipe.protocols().items())[: 1 if protocols == "first" else None]
    for title, tasks in chosen:
        entry = _entry(recipe, learner, tasks, recipe.test_steps)
        unadapted = {**entry, "by_step": entry["by_step"][:1]}
        entry["baselines"] = {"the same net without adaptation": unadapted}
        for c in contenders:
            judged = _entry(recipe, c.learner, c.baseline.view(tasks), c.baseline.steps)
            judged["protocol"]["inner_lr"] = c.about.get("fine_tuning_lr")
            entry["baselines"][c.baseline.name] = {**judged, **c.about}
        results.append({"name": title, **entry})
    content = {
        "recipe": name,
        **results[0],
        "seed": recipe.seed,
        "iterations": run.step_of(f"{weights}.safetensors"),
        "weights": weights,
        "seconds": round(time.monotonic() - started, 1),
        "other_protocols": results[1:],
    }
    run.write_json("evaluation.json", content)
    return content


def _policy_of(recipe: Recipe, normalisation: Policy) -> Policy | None:
    """None for a recipe whose protocol knows no normalisation, where only the default can be asked for."""
    if "normalisation" in recipe.protocol(recipe.episodes("test")):
        return normalisation
    if normalisation != "batch":
        raise InputError(
            f"the net of this recipe has no batch normalisation; leave out --normalisation {normalisation}"
        )
    return None


def _prepare(policy: Policy | None, episodes: Episodes, steps: int, learner: Learner) -> None:
    """Have a learner judged under a policy, by the statistics of training tasks where it needs any."""
    learner.normalisation = policy
    if policy in ("running", "per_step"):
        narrate(f"measuring {MEANINGS[policy]}")
        calibrate(learner, episodes, steps=steps)


def contenders_of(recipe: Recipe, run: Run, policy: Policy | None = None) -> list[Contender]:
    """The recipe's baselines under a policy: out of the run's folder, or trained and kept there."""
    validation, training = recipe.episodes("validation"), recipe.episodes("train")
    return [
        contend(
            baseline,
            run,
            recipe.loss,
            validation,
            recipe.metric,
            episodes=recipe.validation_episodes,
            adapt=recipe.adapt,
            prepare=partial(_prepare, policy, baseline.view(training), baseline.steps),
        )
        for baseline in recipe.baselines()
    ]


def _entry(recipe: Recipe, learner: Learner, episodes: Episodes, steps: int) -> dict[str, Any]:
    protocol, count = recipe.protocol(episodes), recipe.test_episodes
    if learner.normalisation is not None:
        protocol["normalisation"] = MEANINGS[learner.normalisation]
    return evaluate(learner, episodes, metric=recipe.metric, steps=steps, count=count, protocol=protocol).to_json()


def recipe_of(run: Run) -> tuple[str, Recipe]:
    """The recipe that a run was made with."""
    config = run.read_json("config.json")
    name = config.pop("recipe", None) if isinstance(config, dict) else None
    if not isinstance(name, str) or name not in RECIPES:
        raise InputError(f"{run.path / 'config.json'} names the recipe {name!r}; there are: {', '.join(RECIPES)}")
    fields = {field.name for field in dataclasses.fields(RECIPES[name])}
    if unknown := set(config) - fields:
        raise InputError(f"{run.path / 'config.json'} has the unknown fields {', '.join(sorted(unknown))}")
    if config.get("root") is not None:
        config["root"] = Path(config["root"])
    if not usable(config.get("device", "cpu")):
        narrate(f"this machine has no {config['device']}, with which {run.path} was made; computing on the CPU")
        config["device"] = "cpu"
    for field, value in config.items():
        default = getattr(RECIPES[name], field)
        known = (type(default), int) if isinstance(default, float) else type(default)
        if None not in (default, value) and not isinstance(value, known):
            raise InputError(f"{run.path / 'config.json'}: {field} is {value!r}, but {default!r} is of its kind")
    return name, dataclasses.replace(RECIPES[name], **config)


def _plain(recipe: Recipe) -> dict[str, Any]:
    return {key: str(value) if isinstance(value, Path) else value for key, value in dataclasses.asdict(recipe).items()}


def _check_same(before: Mapping[str, Any], now: Mapping[str, Any], out: Path) -> None:
    """Raise `InputError` where the folder holds a run with other settings."""
    free = FREE_FIELDS - ({"iterations"} if now["schedule"] != "constant" else set())  # the schedule depends on them
    known = {**_plain(RECIPES[now["recipe"]]), **before}  # a run of before a field came has its default
    different = [
        f"{key} {known[key]!r} (now {value!r})" for key, value in now.items() if known[key] != value and key not in free
    ]
    if different:
        raise InputError(f"{out} holds a run with {', '.join(different)}; give the same options or another --out")
