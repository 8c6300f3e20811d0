"""A picture of the comparison: tasks per second, one panel for each workload."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.results import Result, times_faster

OURS, THEIRS = "#c2410c", "#94a3b8"


def chart(results: list[Result], path: Path) -> None:
    """Bars of ms per step, the fastest on top."""
    columns = min(len(results), 3)
    rows = -(-len(results) // columns)
    figure = Figure(figsize=(5.2 * columns, 0.8 + 3.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in list(axes.flat)[len(results) :]:
        axis.set_visible(False)
    for axis, result in zip(axes.flat, results, strict=False):
        _panel(axis, result)
    figure.suptitle(
        "ms for a second-order meta-step with Adam\n(x: the fastest fewstep is so many times faster)", fontsize=11
    )
    figure.savefig(path, dpi=130)


def _panel(axis: Axes, result: Result) -> None:
    entries = result.best[::-1]
    times = [1000 * entry.seconds for entry in entries]
    colours = [OURS if entry.family.startswith("fewstep") else THEIRS for entry in entries]
    bars = axis.barh([entry.family for entry in entries], times, color=colours)
    ours = result.ours
    labels = []
    for time, entry in zip(times, entries, strict=True):
        label = f" {time:,.0f} ms" if time > 100 else f" {time:.3g} ms"
        labels.append(label + (f", {times_faster(ours, entry):.2g}x" if ours and entry is not ours else ""))
    axis.bar_label(bars, labels, fontsize=9)
    axis.set_xlim(0, 1.45 * max(times))
    axis.set_title(f"{result.workload}, {result.tasks} tasks", fontsize=11)
    axis.spines[["top", "right"]].set_visible(False)
