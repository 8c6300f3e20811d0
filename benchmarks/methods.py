"""Every method of the family at an equal budget, on real few-shot classes: accuracy, time, peak memory.

python -m benchmarks.methods [--methods maml anil ...] [--data omniglot glyphs] [--iterations N] [--out FOLDER]

Each method is a `fewstep train` and a `fewstep evaluate` of its own, with one thread, two at a time; metric learners,
which adapt without steps, stand beside them (`benchmarks.metric_learners`). What has been evaluated is not run again;
what was stopped goes on. Settings beside the budget are the recipe's, and where a method needs others, those of
`settings`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from benchmarks.metric_learners import KINDS
from benchmarks.workloads import origin
from fewstep import algorithms
from fewstep.errors import InputError
from fewstep.run import Run

DATA = {
    "omniglot": ["omniglot-20way-1shot", "--meta-batch", "4", "--inner-steps", "3"],
    "glyphs": ["glyphs-5way-1shot", "--meta-batch", "4", "--inner-steps", "3", "--inner-lr", "0.1"],
}
WAYS = {"omniglot": 20, "glyphs": 5}
METHODS = (*algorithms.__all__, *KINDS)


def settings(method: str, ways: int) -> list[str]:
    """What a method needs beside the recipe's settings.

    Published rates and strengths are of the mean cross-entropy, the recipes' loss is `ways` times it.
    """
    own = {
        # As its paper for images: 100 numbers, after the third convolution.
        "cavia": ["--inner-lr", str(1.0 / ways), "--algorithm-options", "context=100,layer=blocks.2.norm"],
        # All six parts; a tenth of the training and a third (50 epochs) of it, as in its paper.
        "maml_pp": ["--schedule", "cosine", "--algorithm-options", "anneal=100,first_order_until=333"],
        # Inner loops have to come near their minimum, and cost no memory.
        "imaml": ["--inner-lr", str(0.1 / ways), "--inner-steps", "15", "--test-steps", "15",
                  "--algorithm-options", f"strength={2 * ways}"],
    }  # fmt: skip
    return own.get(method, [])


@dataclass(frozen=True)
class Options:
    """What to train, and how long."""

    methods: tuple[str, ...] = ()
    """By default all."""
    data: tuple[str, ...] = tuple(DATA)
    """Of omniglot and glyphs."""
    iterations: int = 1000
    """Meta-updates of 4 tasks each."""
    validation: int = 60
    """Validation episodes, twice in a training."""
    episodes: int = 600
    """Test episodes."""
    at_once: int = 2
    """Processes of one thread each."""
    plan: bool = False
    """Let each method plan its engine; else all take compiled pieces, one task at a time."""
    compiled: bool = True
    """Without a plan: compile."""
    out: Path = Path("runs/methods")
    """Folder of the runs and of methods.json and methods.md."""


def main(options: Options) -> None:
    """Train and judge every method, then write the table."""
    chosen = options.methods or METHODS
    if unknown := [name for name in (*chosen, *options.data) if name not in (*METHODS, *DATA)]:
        raise InputError(f"unknown {', '.join(unknown)}; there are: {', '.join((*METHODS, *DATA))}")
    console = Console()
    console.print(origin("benchmarks.methods"), highlight=False)
    jobs = [(data, method) for data in options.data for method in chosen]
    with ThreadPoolExecutor(options.at_once) as pool:
        for line in pool.map(lambda job: _run(job[0], job[1], options), jobs):
            console.print(line, highlight=False)
    text = as_markdown(options.out)
    (options.out / "methods.md").write_text(f"{origin('benchmarks.methods')}\n\n{text}")
    console.print(options.out / "methods.md", highlight=False)


def _run(data: str, method: str, options: Options) -> str:
    """One method on one kind of data, from where it stands, in words."""
    folder = options.out / data / method
    if (folder / "cost.json").exists():
        return f"{data}, {method}: there already"
    folder.parent.mkdir(parents=True, exist_ok=True)
    resumed = folder.exists()  # then the time of what came before is not known
    log = options.out / data / f"{method}.log"
    training, *judging = _commands(data, method, folder, options)
    code, seconds, peak = _wait(training, log)
    for command in judging if code == 0 else []:
        code, *_ = _wait(command, log)
    if code:
        return f"{data}, {method}: failed with code {code}, see {log}"
    (folder / "cost.json").write_text(json.dumps({"seconds": None if resumed else seconds, "peak_mib": peak}))
    return f"{data}, {method}: {_accuracy(folder)}"


def _commands(data: str, method: str, folder: Path, options: Options) -> list[list[str]]:
    """The modules that train a method, and then judge it."""
    amounts = ["--iterations", str(options.iterations)]
    episodes, out = ["--episodes", str(options.episodes)], ["--out", str(folder)]
    if method in KINDS:
        validation = ["--validation", str(options.validation)]
        return [["benchmarks.metric_learners", method, DATA[data][0], *amounts, *validation, *episodes, *out]]
    kind = "pieces" if options.compiled else "no"
    engine = ["--no-plan", "--compile", kind, "--chunk", "1", "--convolution", "matmul"]
    checks = ["--check-every", str(max(options.iterations // 2, 1)), "--validation-episodes", str(options.validation)]
    train = [*DATA[data], "--algorithm", method, *amounts, *checks, "--test-steps", "5", *out,
             *settings(method, WAYS[data])]  # fmt: skip
    return [
        ["fewstep", "train", *train, *([] if options.plan else engine)],
        ["fewstep", "evaluate", str(folder), "--no-baselines", "--first-only", *episodes],
    ]


def _wait(arguments: Sequence[str], log: Path) -> tuple[int, float, float]:
    """A module of Python with one thread: its exit code, the processor's seconds, its compiler's too (the machine is
    shared, so that the clock's do not count), and the most MiB that the command itself held, its compiler's not."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    peak = 0
    with log.open("a") as output:
        process = subprocess.Popen([sys.executable, "-m", *arguments], stdout=output, stderr=output,
                                   env=environment)  # fmt: skip
        ended = 0
        while not ended:
            time.sleep(0.2)
            peak = max(peak, _held(process.pid))
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
    process.returncode = os.waitstatus_to_exitcode(status)  # so that Popen does not wait again
    return process.returncode, usage.ru_utime + usage.ru_stime, peak / 2**10


def _held(process: int) -> int:
    """The most KiB that a process has held until now; 0 once it has ended."""
    found = re.search(r"VmHWM:\s*(\d+)", Path(f"/proc/{process}/status").read_text())
    return int(found[1]) if found else 0


def _pace(folder: Path) -> str:
    """Milliseconds of a training step in the fastest stretch between two lines of the log: the machine is shared."""
    marks = [(event["step"], event["seconds"]) for event in Run(folder).metrics() if "seconds" in event]
    paces = [(late[1] - early[1]) / (late[0] - early[0]) for early, late in pairwise(marks) if late[0] > early[0]]
    return f"{1000 * min(paces):.0f}" if paces else ""


def _accuracy(folder: Path) -> str:
    last = json.loads((folder / "evaluation.json").read_text())["by_step"][-1]
    return f"{100 * last['mean']:.2f} ± {100 * last['ci95']:.2f} %"


def as_markdown(out: Path) -> str:
    """A table for each kind of data, the best method first."""
    parts = []
    for data in DATA:
        rows = [_row(cost.parent) for cost in sorted(out.glob(f"{data}/*/cost.json"))]
        if rows:
            rows.sort(key=lambda row: -row["mean"])
            head = (
                "| method | accuracy | after 1 step | steps | seconds of training | ms a step | peak MiB |\n"
                "|---|---:|---:|---:|---:|---:|---:|"
            )
            body = "\n".join(row["text"] for row in rows)
            parts.append(f"### {data}: {rows[0]['about']}\n\n{head}\n{body}\n")
    return "\n".join(parts)


def _row(folder: Path) -> dict[str, Any]:
    evaluation = json.loads((folder / "evaluation.json").read_text())
    cost = json.loads((folder / "cost.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    cells = [f"{100 * point['mean']:.2f} ± {100 * point['ci95']:.2f}" for point in evaluation["by_step"]]
    first = cells[1] if len(cells) > 1 else ""  # metric learners take no steps
    last = evaluation["by_step"][-1]
    about = (
        f"{config['iterations']:,} iterations, the best validated weights, "
        f"{evaluation['episodes']} episodes, {evaluation['protocol']['queries_per_class']} query a class, "
        f"{evaluation['protocol']['normalisation']}, seed {evaluation['seed']}"
    )
    seconds = "resumed" if cost.get("seconds") is None else f"{cost['seconds']:.0f}"
    columns = [
        folder.name,
        f"**{cells[-1]}**",
        first,
        f"{config['inner_steps']}, {last['step']}",
        seconds,
        _pace(folder),
        f"{cost['peak_mib']:.0f}",
    ]
    text = f"| {' | '.join(columns)} |"
    return {"mean": last["mean"], "about": about, "text": text}


if __name__ == "__main__":
    main(tyro.cli(Options))
