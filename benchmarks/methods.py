"""Every method of the family at an equal budget, on real few-shot classes: accuracy, time, peak memory.

python -m benchmarks.methods [--methods maml anil ...] [--data omniglot glyphs] [--iterations N] [--out FOLDER]

Each method is a `fewstep train` and a `fewstep evaluate` of its own, with one thread, two at a time. What has been
evaluated is not run again; what was stopped goes on. Settings beside the budget are those of METHODS: the methods' own
papers where those are for this data, else the recipe's. None is tuned on test classes.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from benchmarks.workloads import origin
from fewstep.errors import InputError

DATA = {
    "omniglot": ["omniglot-20way-1shot", "--meta-batch", "4", "--inner-steps", "3"],
    "glyphs": ["glyphs-5way-1shot", "--meta-batch", "4", "--inner-steps", "3", "--inner-lr", "0.1"],
}
# What a method needs beside the recipe's settings.
METHODS: dict[str, list[str]] = {
    "maml": [],
    "fomaml": [],
    "hf_maml": [],
    "reptile": [],
    "anil": [],
    "boil": [],
    # As its paper for images: 100 numbers, after the third convolution.
    "cavia": ["--inner-lr", "1.0", "--algorithm-options", "context=100,layer=blocks.2.norm"],
    "proto_maml": [],
    "unicorn_maml": [],
    "meta_sgd": [],
    # All six parts; a tenth of the training and a third (50 epochs) of it, as in its paper.
    "maml_pp": ["--schedule", "cosine", "--algorithm-options", "anneal=100,first_order_until=333"],
    "meta_curvature": [],
    "t_net": [],
    "warp_grad": [],
    "alfa": [],
    "imaml": [],
    "sharp_maml": [],
    "l2f": [],
    "bmg": [],
}


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
    chosen = options.methods or tuple(METHODS)
    if unknown := [name for name in (*chosen, *options.data) if name not in {**METHODS, **DATA}]:
        raise InputError(f"unknown {', '.join(unknown)}; there are: {', '.join({**METHODS, **DATA})}")
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
    kind = "pieces" if options.compiled else "no"
    engine = ["--no-plan", "--compile", kind, "--chunk", "1", "--convolution", "matmul"]
    train = [*DATA[data], "--algorithm", method, *METHODS[method], "--iterations", str(options.iterations),
             "--check-every", str(max(options.iterations // 2, 1)), "--validation-episodes", str(options.validation),
             "--test-steps", "5", "--out", str(folder)]  # fmt: skip
    log = options.out / data / f"{method}.log"
    code, usage = _wait(["train", *train, *([] if options.plan else engine)], log)
    if code == 0:
        code, _ = _wait(["evaluate", str(folder), "--no-baselines", "--first-only", "--episodes",
                         str(options.episodes)], log)  # fmt: skip
    if code:
        return f"{data}, {method}: failed with code {code}, see {log}"
    seconds = None if resumed else usage.ru_utime + usage.ru_stime
    (folder / "cost.json").write_text(json.dumps({"seconds": seconds, "peak_mib": usage.ru_maxrss / 2**10}))
    return f"{data}, {method}: {_accuracy(folder)}"


def _wait(arguments: Sequence[str], log: Path) -> tuple[int, resource.struct_rusage]:
    """Exit code of a `fewstep` command with one thread, and what it used, its compiler too: the machine is shared, so
    the processor's seconds count and not the clock's."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("a") as output:
        process = subprocess.Popen([sys.executable, "-m", "fewstep", *arguments], stdout=output, stderr=output,
                                   env=environment)  # fmt: skip
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)  # so that Popen does not wait again
    return process.returncode, usage


def _pace(folder: Path) -> str:
    """Milliseconds of a training step in the fastest stretch between two lines of the log: the machine is shared."""
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    marks = [(event["step"], event["seconds"]) for event in events if "seconds" in event]
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
                "| method | accuracy | after 1 step | seconds of training | ms a step | peak MiB |\n"
                "|---|---:|---:|---:|---:|---:|"
            )
            body = "\n".join(row["text"] for row in rows)
            parts.append(f"### {data}: {rows[0]['about']}\n\n{head}\n{body}\n")
    return "\n".join(parts)


def _row(folder: Path) -> dict[str, Any]:
    evaluation = json.loads((folder / "evaluation.json").read_text())
    cost = json.loads((folder / "cost.json").read_text())
    iterations = json.loads((folder / "config.json").read_text())["iterations"]
    cells = [f"{100 * point['mean']:.2f} ± {100 * point['ci95']:.2f}" for point in evaluation["by_step"]]
    last = evaluation["by_step"][-1]
    about = (
        f"{iterations:,} iterations, the best validated weights, {last['step']} steps at test, "
        f"{evaluation['episodes']} episodes, {evaluation['protocol']['queries_per_class']} query a class, "
        f"{evaluation['protocol']['normalisation']}, seed {evaluation['seed']}"
    )
    seconds = "resumed" if cost.get("seconds") is None else f"{cost['seconds']:.0f}"
    text = f"| {folder.name} | **{cells[-1]}** | {cells[1]} | {seconds} | {_pace(folder)} | {cost['peak_mib']:.0f} |"
    return {"mean": last["mean"], "about": about, "text": text}


if __name__ == "__main__":
    main(tyro.cli(Options))
