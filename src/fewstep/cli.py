"""The command line: train, evaluate, compare, report, list."""

from __future__ import annotations

import contextlib
import difflib
import importlib
import io
import os
import re
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import field, fields, is_dataclass, make_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast

import torch
import tyro
from rich.console import Console

import fewstep
from fewstep.algorithms import __all__ as algorithms
from fewstep.classifier import Classifier, adapt_run
from fewstep.commands import recipe_of, train_run
from fewstep.comparison import compare_runs
from fewstep.data import DATASETS
from fewstep.data.places import expanded
from fewstep.distributed import check_processes, joined, ranks
from fewstep.errors import FewstepError, InputError
from fewstep.export import export
from fewstep.film import film_run
from fewstep.footprint import keep_freed_memory
from fewstep.judge import evaluate_all, evaluate_run, file_of
from fewstep.launch import launch
from fewstep.options import (
    AdaptOptions,
    CompareOptions,
    EvaluateOptions,
    ExportOptions,
    PredictOptions,
    ReportOptions,
    WatchOptions,
)
from fewstep.output import paths_told, speaking
from fewstep.predict import predict
from fewstep.recipes import RECIPES, Recipe
from fewstep.report import report_run
from fewstep.rl.environments import WORLDS
from fewstep.run import Run
from fewstep.tables import comparison_table, protocols_table, table

T = TypeVar("T")

USAGE = """usage: fewstep train RECIPE [--field value ...] [--out RUN]   train, or go on with what is in RUN
       fewstep evaluate RUN                                  judge it on test tasks, beside baselines
       fewstep adapt RUN --support DIR [--out ADAPTED]       a classifier for your own classes
       fewstep predict ADAPTED FILES...                      what it says of picture files
       fewstep export ADAPTED --out FILE.onnx                for other programs
       fewstep compare RUN RUN                               the difference of two runs on the same tasks
       fewstep report RUN                                    tables and plots
       fewstep watch RUN                                     a policy before and after adaptation, as a video
       fewstep list recipes|algorithms|datasets|environments what there is
       fewstep bench [speed|memory|scaling|planner|methods|episodes|sampler|WORKLOAD] measure it, from a checkout
Each command tells its options with --help; `fewstep train RECIPE --help` tells every setting of a recipe."""


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command. A mistake that the user can mend is one line and exit code 2; Ctrl-C is 130."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if argv is None:  # the process is ours
        keep_freed_memory()
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
                stream.reconfigure(errors="backslashreplace")  # names of files may be in no alphabet of the terminal
        torch.backends.cudnn.allow_tf32 = False  # on a GPU float32 is float32, in convolutions too
    warnings.showwarning = lambda message, *_: print(f"fewstep: {message}", file=sys.stderr)
    is_rank = argv is None and int(os.environ.get("WORLD_SIZE", "1")) > 1
    code: str | int | None = 0
    try:
        with joined(), speaking(), paths_told():
            _run(arguments)
    except FewstepError as error:
        print(f"fewstep: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("fewstep: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        code = 130
    except SystemExit as leaving:
        if not is_rank:
            raise
        code = leaving.code or 0
    if is_rank and isinstance(code, int):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # threads of gloo can abort a process that ends in the usual way
    if code:
        sys.exit(code)


def _run(arguments: list[str]) -> None:
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    if command in ("-h", "--help"):
        print(USAGE)
    elif command == "--version":
        print(f"fewstep {fewstep.__version__}")
    else:
        COMMANDS[_known("command", command, list(COMMANDS))](rest)


def _train(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: fewstep train RECIPE [--field value ...] [--out RUN]\n")
        _list(["recipes"])
        return
    name = _known("recipe", arguments[0], list(RECIPES))
    recipe, out, procs = _train_options(name, arguments[1:])
    if not _shared_out("train", arguments, procs, recipe.meta_batch, recipe.device):
        train_run(name, recipe, out)


def _shared_out(command: str, arguments: list[str], procs: int, tasks: int, device: str) -> bool:
    """Run the command in `procs` processes, if it takes more than this one, and say whether that was so."""
    if procs in (1, ranks()):  # under torchrun the processes are there already
        return False
    if ranks() > 1:
        raise InputError(f"torchrun started {ranks()} processes; leave out --procs {procs}")
    check_processes(procs, tasks, device)
    if code := launch([sys.executable, "-m", "fewstep", command, *arguments], procs):
        sys.exit(code)
    return True


def _judged_by_many(command: str, arguments: list[str], procs: int, run: Path) -> bool:
    """The same for a command that judges a run."""
    return procs != 1 and _shared_out(command, arguments, procs, procs, recipe_of(Run(run))[1].device)


def _train_options(name: str, arguments: list[str]) -> tuple[Recipe, Path, int]:
    recipe = RECIPES[name]
    folder = Annotated[Path, tyro.conf.arg(help="Folder of the run; a run that is there goes on.")]
    processes = Annotated[int, tyro.conf.arg(help="Processes on this machine that share the tasks, with a GPU each.")]
    options = make_dataclass(
        "Train",
        [
            ("recipe", type(recipe), field(default=recipe)),
            ("out", folder, field(default=Path("runs") / name)),
            ("procs", processes, field(default=1)),
        ],
    )
    chosen: Any = _parsed(options, f"fewstep train {name}", arguments)
    return chosen.recipe, chosen.out, chosen.procs


def _evaluate(arguments: list[str]) -> None:
    options = _parsed(EvaluateOptions, "fewstep evaluate", arguments)
    if _judged_by_many("evaluate", arguments, options.procs, options.run):
        return
    asked = options.asked
    console = Console()
    if options.all_protocols:
        if options.normalisation or options.first_only or options.queries is not None:
            without = "leave out --normalisation, --first-only and --queries"
            raise InputError(f"--all-protocols says by itself how to judge; {without}")
        console.print(protocols_table(evaluate_all(options.run, options.weights, options.episodes, asked)))
        print(options.run / file_of("protocols", asked))
        return
    evaluation = evaluate_run(options.run, options.weights, options.baselines, options.episodes, options.normalisation,
                              options.first_only, asked)  # fmt: skip
    for protocol in (evaluation, *evaluation["other_protocols"]):
        console.print(table({**evaluation, **protocol}))
    print(options.run / file_of("evaluation", asked))


def _compare(arguments: list[str]) -> None:
    options = _parsed(CompareOptions, "fewstep compare", arguments)
    if _judged_by_many("compare", arguments, options.procs, options.first):
        return
    found = compare_runs(options.first, options.second, options.weights, options.episodes, options.asked)
    Console().print(comparison_table(str(options.first), str(options.second), found))


def _adapt(arguments: list[str]) -> None:
    options = _parsed(AdaptOptions, "fewstep adapt", arguments)
    classifier = adapt_run(options.run, options.support, steps=options.steps, head=options.head,
                           normalisation=options.normalisation, weights=options.weights,
                           skip=options.skip_unreadable)  # fmt: skip
    classifier.save(options.out)
    about = f"{len(classifier.classes)} classes, {classifier.about['steps']} steps, head: {classifier.about['head']}"
    print(f"{options.out}: {about}; now: fewstep predict {shlex.quote(str(options.out))} FILES")


def _predict(arguments: list[str]) -> None:
    options = _parsed(PredictOptions, "fewstep predict", arguments)
    print(predict(Classifier.load(options.adapted), options.files, options.format, options.skip_unreadable))


def _export(arguments: list[str]) -> None:
    options = _parsed(ExportOptions, "fewstep export", arguments)
    print(export(Classifier.load(options.adapted), options.out))


def _report(arguments: list[str]) -> None:
    for path in report_run(_parsed(ReportOptions, "fewstep report", arguments).run):
        print(path)


def _watch(arguments: list[str]) -> None:
    options = _parsed(WatchOptions, "fewstep watch", arguments)
    print(film_run(options.run, task=options.task, steps=options.steps, out=options.out, weights=options.weights))


def _list(arguments: list[str]) -> None:
    if len(arguments) != 1:
        raise InputError("say what to list: fewstep list recipes, algorithms, datasets or environments")
    what = _known("list", arguments[0], ["recipes", "algorithms", "datasets", "environments"])
    entries = {
        "recipes": {name: recipe.summary for name, recipe in RECIPES.items()},
        "algorithms": {name: getattr(fewstep, name).__doc__ for name in algorithms},
        "datasets": {name: source.__doc__ for name, source in DATASETS.items()},
        "environments": {name: world.__doc__ for name, world in WORLDS.items()},
    }[what]
    width = max(map(len, entries))
    for name, text in entries.items():
        print(f"{name:{width}}  {(text or '').strip().splitlines()[0]}")


BENCHMARKS = ["speed", "memory", "scaling", "planner", "methods", "episodes", "sampler"]


def _bench(arguments: list[str]) -> None:
    """Run a benchmark out of the checkout that this package was installed from."""
    checkout = Path(fewstep.__file__).resolve().parents[2]
    if not (checkout / "benchmarks" / "speed.py").is_file():
        raise InputError("the benchmarks are not in the installed package; clone the repository, then pip install -e .")
    sys.path.insert(0, str(checkout))
    known = [*BENCHMARKS, *importlib.import_module("benchmarks.workloads").WORKLOADS]
    named = bool(arguments) and not arguments[0].startswith("-")
    what = _known("benchmark", arguments[0], known) if named else "speed"
    rest = arguments[1:] if named else arguments
    if what not in BENCHMARKS:
        what, rest = "speed", ["--workload", what, *rest]
    tyro.cli(importlib.import_module(f"benchmarks.{what}").main, prog=f"fewstep bench {what}", args=rest,
             config=(tyro.conf.OmitArgPrefixes,))  # fmt: skip


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "bench": _bench,
    "train": _train,
    "evaluate": _evaluate,
    "compare": _compare,
    "adapt": _adapt,
    "predict": _predict,
    "export": _export,
    "report": _report,
    "watch": _watch,
    "list": _list,
}


def _known(kind: str, name: str, names: list[str]) -> str:
    """`name` if it is one of `names`, else an error that proposes the nearest."""
    if name in names:
        return name
    near = difflib.get_close_matches(name, names, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise InputError(f"unknown {kind} {name!r}; {hint}There are: {', '.join(names)}")


def _at_home(value: Any) -> Any:
    """Options whose paths have the user's own folder in place of `~`, as no shell does it in --data=~/pictures."""
    if isinstance(value, tuple):
        return tuple(map(_at_home, value))
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{each.name: _at_home(getattr(value, each.name)) for each in fields(value) if each.init})
    return expanded(value) if isinstance(value, Path) and not value.exists() else value


def _parsed(what: type[T], program: str, arguments: list[str]) -> T:
    """The options as tyro reads them; its boxed error message becomes one line."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            options = tyro.cli(what, prog=program, args=arguments, config=(tyro.conf.OmitArgPrefixes,))
            return cast(T, _at_home(options))
    except SystemExit as stop:
        if not stop.code:
            raise
        words = re.sub(r"[─-╿]+|\x1b\[[0-9;]*m", " ", errors.getvalue())
        raise InputError(f"{' '.join(words.split())}") from None
