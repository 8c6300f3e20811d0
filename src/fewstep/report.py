"""The report of a run: tables of its evaluation, and plots. No number of it comes without its protocol."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from textwrap import fill
from typing import Any

from matplotlib.figure import Figure
from torch import nn

from fewstep import plots
from fewstep.baselines import contend
from fewstep.commands import recipe_of
from fewstep.errors import InputError
from fewstep.evaluate import METRICS
from fewstep.plots import Line
from fewstep.progress import narrate
from fewstep.recipes import RECIPES
from fewstep.recipes.published import published
from fewstep.recipes.sinusoid import SinusoidRecipe
from fewstep.run import Run
from fewstep.tables import Json, label, lines, markdown, number, plural, protocols, words

ALGORITHMS = {"exact": "MAML", "none": "first-order MAML", "finite_difference": "HF-MAML"}


def report_run(path: Path) -> list[Path]:
    """Draw a run's plots and write its tables to report.md; returns the files written."""
    run = Run(path)
    metrics = run.metrics()
    evaluation = _evaluation(run)
    if not run.exists and not metrics and evaluation is None:
        raise InputError(f"{path} is not the folder of a run; make one with: fewstep train RECIPE --out {path}")
    figures: dict[str, Figure] = {}
    if any("loss" in event for event in metrics):
        config = run.read_json("config.json") if run.exists else {}
        figures["training.png"] = _training(config, metrics, evaluation)
    if evaluation is None:
        narrate(f"no evaluation.json yet; tables and the other plots need: fewstep evaluate {path}")
    else:
        if metrics and metrics[-1]["step"] != evaluation["iterations"]:
            narrate(
                f"evaluated at iteration {evaluation['iterations']}, but trained further; now: fewstep evaluate {path}"
            )
        figures["steps.png"] = _by_step(evaluation)
        if run.exists and (curves := _adaptation(run, evaluation)):
            figures["adaptation.png"] = curves
    if not figures:
        raise InputError(
            f"{path} has no logged losses and no evaluation yet; train on with: fewstep train ... --out {path}"
        )
    written = [run.write(name, plots.png(figure)) for name, figure in figures.items()]
    if evaluation is not None:
        pictures = "\n\n".join(f"![{Path(name).stem}]({name})" for name in figures)
        written.append(run.write("report.md", f"{markdown(evaluation)}\n{pictures}\n".encode()))
    return written


def _evaluation(run: Run) -> Json | None:
    """What evaluation.json holds, or None where it is not there."""
    if not (run.path / "evaluation.json").exists():
        return None
    content = run.read_json("evaluation.json")
    needed = {"recipe", "name", "metric", "by_step", "episodes", "protocol", "baselines", "seed", "iterations"}
    if not isinstance(content, dict) or (missing := needed - set(content)):
        lacking = ", ".join(sorted(missing)) if isinstance(content, dict) else "an object"
        raise InputError(f"{run.path / 'evaluation.json'} lacks {lacking}; write it anew: fewstep evaluate {run.path}")
    return content


def _training(config: Json, metrics: list[Json], evaluation: Json | None) -> Figure:
    """Loss and validation metric by iteration."""
    losses = [event for event in metrics if "loss" in event]
    tasks = f" of {config['meta_batch']} tasks" if "meta_batch" in config else ""
    loss = Line(f"one meta-batch{tasks}", [event["step"] for event in losses], [event["loss"] for event in losses])
    inner = f" after {_steps(config['inner_steps'])}" if "inner_steps" in config else ""
    title, loss_label = _heading({**config, "iterations": losses[-1]["step"]}), f"training loss{inner}"
    checks = [(event["step"], key, event[key]) for event in metrics for key in event if key.startswith("validation_")]
    if not checks:
        return plots.training_figure(title, loss, loss_label)
    metric, last = checks[-1][1].removeprefix("validation_"), len(checks[-1][2]) - 1
    scale = 100 if metric == "accuracy" else 1
    steps = [step for step, _, _ in checks]
    validation = [
        Line(name, steps, [scale * number(values[index]) for _, _, values in checks])
        for index, name in ((-1, f"after {_steps(last)}"), (0, "before adaptation"))
    ]
    results = [(values[-1], step) for step, _, values in checks if values[-1] is not None]
    sign = 1 if METRICS[metric].higher_is_better else -1
    best = max(results, key=lambda result: sign * result[0])[1] if results else None
    # The first protocol of the evaluation is that of validation, on other tasks.
    protocol = {key: config[key] for key in ("ways", "shots", "queries") if config.get(key) is not None}
    if "test_queries" in config:  # of classification, whose queries are those of training
        protocol["queries_per_class"] = config["test_queries"] or protocol["shots"]
        protocol.pop("queries", None)
    told = ", ".join(words(evaluation["protocol"] if evaluation else protocol))
    count = f"{config['validation_episodes']} validation tasks" if "validation_episodes" in config else "validation"
    note = fill(f"{count}: {told}" if told else count, 100)
    return plots.training_figure(title, loss, loss_label, validation, f"validation: {label(metric)}", note, best)


def _by_step(evaluation: Json) -> Figure:
    """The metric by inner step, a panel per protocol; what the protocols share stands below, once."""
    entries = protocols(evaluation)
    each_words = [list(words(entry["protocol"])) for entry in entries]
    shared = [word for word in each_words[0] if all(word in other for other in each_words)]
    panels = []
    for entry, each in zip(entries, each_words, strict=True):
        own = ", ".join(word for word in each if word not in shared)
        ours = lines(entry)
        panels.append((own or entry["name"], [*ours, *_authors(entry["protocol"], ours)]))
    metric, count = evaluation["metric"], f"{evaluation['episodes']:,} test episodes, mean and 95 % interval"
    note = fill(", ".join([*shared, count]), max(80, 60 * len(panels)))
    title = f"{_heading(evaluation)}: {label(metric)} by inner steps"
    return plots.steps_figure(title, label(metric), note, panels, error=metric == "mse")


def _authors(protocol: Json, ours: list[Line]) -> list[Line]:
    """What the authors published for the same world and horizon, each curve like ours of that kind."""
    found = []
    for index, (name, (returns, half)) in enumerate(published(protocol).items()):
        kind = "meta-learned" if name == "MAML" else name
        like = next((place for place, line in enumerate(ours) if line.name.startswith(kind)), len(ours) + index)
        found.append(Line(f"authors' {name}", range(len(returns)), returns, half, like=like))
    return found


def _adaptation(run: Run, evaluation: Json) -> Figure | None:
    """Curves of the learner and, where it is trained already, of the pre-trained baseline; for sinusoids only."""
    is_sinusoid = isinstance(RECIPES.get(evaluation["recipe"]), SinusoidRecipe)
    if not is_sinusoid or not (run.path / "best.safetensors").exists():
        return None
    _, recipe = recipe_of(run)
    assert isinstance(recipe, SinusoidRecipe)
    recipe = dataclasses.replace(recipe, method=None, chunk=None, compile=None, convolution=None, device="cpu")
    learner = recipe.learner()
    learner.load_state_dict(run.load_weights("best.safetensors"))
    name = ALGORITHMS[recipe.derivative] if recipe.algorithm == "maml" else recipe.algorithm
    learners = {f"{name} (rate {recipe.inner_lr:g})": learner}
    baseline = recipe.baselines()[0]
    rate = evaluation["baselines"].get(baseline.name, {}).get("fine_tuning_lr")
    try:
        if rate is None:
            raise _UntrainedError
        known = dataclasses.replace(baseline, train=_untrained, rates=[rate])  # chosen already, in the evaluation
        c = contend(
            known, run, recipe.loss, recipe.episodes("validation"), recipe.metric, episodes=2, adapt=recipe.adapting
        )
        learners[f"{baseline.name} (rate {rate:g})"] = c.learner
    except _UntrainedError:
        narrate(f"the baseline's curves are left out until it is trained by: fewstep evaluate {run.path}")
    title = f"{_heading(evaluation)}: the first test task with an amplitude of at least 2"
    return plots.adaptation_figure(title, learners, recipe.episodes("test"))


class _UntrainedError(Exception):
    """A baseline would have to be trained first."""


def _untrained(model: nn.Module, run: Run) -> Mapping[str, Any]:
    raise _UntrainedError


def _heading(about: Mapping[str, Any]) -> str:
    seed = f", seed {about['seed']}" if "seed" in about else ""
    return f"{about.get('recipe', 'training')}, {about['iterations']:,} iterations{seed}"


def _steps(count: int) -> str:
    return f"{count} inner step{plural(count)}"
