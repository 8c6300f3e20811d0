"""What a person sees while a run goes on: a line with rates and time left on a terminal, else a JSON line per event."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Report = Callable[[dict[str, Any]], None]


@contextmanager
def progress(total: int, *, done: int = 0) -> Iterator[Report]:
    """A function that takes the events of `train` and shows them on standard error."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda event: print(json.dumps(event), file=sys.stderr, flush=True)
        return
    columns = (
        TextColumn("iteration"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[metrics]}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=total, completed=done, rate="", metrics="")
        shown: dict[str, str] = {}

        def report(event: dict[str, Any]) -> None:
            for name, value in event.items():
                if name == "loss":
                    shown["loss"] = f"loss {value:.4f}"
                elif name == "environment_steps_per_s":
                    shown[name] = f"{value:,.0f} environment steps/s"
                elif name.startswith("validation"):
                    shown["validation"] = f"{name.replace('_', ' ')} {value[0]:.3f} -> {value[-1]:.3f}"
            seconds = event.get("seconds")
            rate = f"{event['step'] / seconds:.1f}/s" if seconds else bar.tasks[0].fields["rate"]
            bar.update(task, completed=event["step"], rate=rate, metrics="  ".join(shown.values()))

        yield report


def narrate(text: str) -> None:
    """One line to a person, on standard error."""
    Console(stderr=True).print(text, highlight=False, soft_wrap=True, markup=False)


@cache
def narrate_once(text: str) -> None:
    """As `narrate`, the first time in a process."""
    narrate(text)
