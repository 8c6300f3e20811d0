"""The pictures of a report. Each function takes plain numbers, or learners, and gives a figure of its own."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from fewstep.data.sinusoid import SinusoidEpisodes
from fewstep.learner import Learner
from fewstep.task import Task

# Okabe and Ito's colours, told apart by colour-blind readers too; blue is always the learner.
BLUE, SKY, ORANGE, BLACK, GREY = "#0072B2", "#56B4E9", "#D55E00", "#000000", "#777777"
COLORS = [BLUE, GREY, ORANGE, "#009E73", "#CC79A7", "#E69F00", SKY, BLACK] * 2
MARKERS = ["o", "", "s", "^", "D", "v", "P", "X"] * 2
SMALL, LARGE = 9, 12


@dataclass(frozen=True)
class Line:
    """A metric against some count, with half the width of its 95 % interval where that is known."""

    name: str
    x: Sequence[int]
    mean: Sequence[float]
    half: Sequence[float] = ()
    like: int | None = None
    """Measured by others: drawn thin and dotted, in the colour of our line with this number."""


def png(figure: Figure) -> bytes:
    """The figure as the content of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def training_figure(
    title: str,
    loss: Line,
    loss_label: str,
    validation: Sequence[Line] = (),
    metric_label: str = "",
    note: str = "",
    best: int | None = None,
) -> Figure:
    """The training loss, as logged and smoothed, above the validation metric; the `best` iteration is marked."""
    figure = Figure(figsize=(8, 6.5 if validation else 3.8), layout="constrained")
    figure.suptitle(title, fontsize=LARGE)
    axes = figure.subplots(2 if validation else 1, 1, sharex=True, squeeze=False)[:, 0]
    mean, width = _smoothed(loss.mean)
    axes[0].plot(loss.x, loss.mean, color=SKY, linewidth=0.8, label=loss.name)
    axes[0].plot(loss.x, mean, color=BLUE, linewidth=2.2, label=f"running mean of {width} logged values")
    _log_if_wide(axes[0], mean)
    _finish(axes[0], loss_label)
    for line, (color, marker, dash) in zip(validation, [(BLUE, "o", "-"), (GREY, "", "--")], strict=False):
        axes[1].plot(line.x, line.mean, dash, color=color, marker=marker, markersize=4, linewidth=1.8, label=line.name)
        if best in line.x and line is validation[0]:
            axes[1].plot([best], [line.mean[line.x.index(best)]], "*", color=ORANGE, markersize=15, zorder=5,
                         linestyle="none", label=f"best: iteration {best:,}")  # fmt: skip
    if validation:
        _log_if_wide(axes[1], [value for line in validation for value in line.mean])
        _finish(axes[1], metric_label)
        figure.supxlabel(note, fontsize=SMALL)
    for axis in axes:
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize=SMALL, borderpad=0.2)
    axes[-1].set_xlabel("iteration")
    axes[-1].xaxis.set_major_formatter("{x:,.0f}")
    return figure


def steps_figure(
    title: str, label: str, note: str, panels: Sequence[tuple[str, Sequence[Line]]], error: bool
) -> Figure:
    """The metric against the inner step, a panel per protocol; a line with one point becomes a dashed level.

    error : the metric is an error, which may span decades and diverge
    """
    figure = Figure(figsize=(max(6.5, 4.6 * len(panels)), 6), layout="constrained")
    figure.suptitle(title, fontsize=LARGE)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (name, lines) in zip(axes, panels, strict=True):
        axis.set_title(name, fontsize=SMALL + 1)
        for line, color, marker in zip(lines, COLORS, MARKERS, strict=False):
            if line.like is not None:
                color, marker = COLORS[line.like], ""
            _draw_line(axis, line, color, marker, strong=line is lines[0])
        _finish(axis, label if axis is axes[0] else "")
        axis.set_xlabel("inner steps")
        axis.xaxis.get_major_locator().set_params(integer=True)
    if error:
        _cut_divergence(axes, [lines for _, lines in panels])
    handles, labels = axes[0].get_legend_handles_labels()
    columns = min(3, len(handles)) if len(panels) > 1 else 1 + len(handles) // 7
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False,
                           fontsize=SMALL + 1, title=note, title_fontsize=SMALL)  # fmt: skip
    legend.get_title().set_multialignment("center")
    return figure


def paths_figure(title: str, panels: Sequence[tuple[str, Sequence[Any]]], goal: Sequence[float]) -> Figure:
    """Paths [steps, 2] in the plane, a panel for each name, all on their way to one goal."""
    figure = Figure(figsize=(max(5.0, 4.0 * len(panels)), 4.6), layout="constrained")
    figure.suptitle(title, fontsize=LARGE)
    axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    places = np.concatenate([[[0, 0], goal], *(path for _, paths in panels for path in paths)])
    low, high = places.min(0), places.max(0)
    middle, reach = (low + high) / 2, 0.55 * (high - low).max()
    for axis, (name, paths) in zip(axes, panels, strict=True):
        for path in paths:
            axis.plot(path[:, 0], path[:, 1], color=BLUE, linewidth=0.9, alpha=0.6)
        axis.plot(0, 0, "o", color=BLACK, markersize=6, label="start")
        axis.plot(*goal, "*", color=ORANGE, markersize=16, label="goal", zorder=5)
        axis.set_title(name, fontsize=SMALL + 1)
        axis.set_aspect("equal")
        axis.set_xlabel("x")
        axis.set(xlim=(middle[0] - reach, middle[0] + reach), ylim=(middle[1] - reach, middle[1] + reach))
        _finish(axis, "y" if axis is axes[0] else "")
    axes[0].legend(frameon=False, fontsize=SMALL)
    return figure


def adaptation_figure(title: str, learners: Mapping[str, Learner], episodes: SinusoidEpisodes) -> Figure:
    """Figure 2 of the paper: each learner's curve before and after adaptation to 5 and to 10 points of one wave."""
    support, wave, grid = _one_wave(episodes)
    figure = Figure(figsize=(max(6.0, 4.8 * len(learners)), 7), layout="constrained")
    figure.suptitle(title, fontsize=LARGE)
    axes = figure.subplots(2, len(learners), sharex=True, sharey=True, squeeze=False)
    shown = {0: (GREY, ":", "before adaptation"), 1: (ORANGE, "--", "after 1 step"), 10: (BLUE, "-", "after 10 steps")}
    for row, shots in zip(axes, (5, 10), strict=True):
        x, y = (part[:, :shots] for part in support)
        for axis, (name, learner) in zip(row, learners.items(), strict=True):
            points = learner.path(Task((x, y), (grid, wave)), 10)
            axis.plot(grid.flatten(), wave.flatten(), color=BLACK, linewidth=1.2, label="true wave")
            for step, (color, dash, label) in shown.items():
                curve = points[step].prediction
                assert curve is not None
                axis.plot(grid.flatten(), curve.flatten(), dash, color=color, linewidth=2.2, label=label)
            axis.plot(x.flatten(), y.flatten(), "o", color=BLACK, markersize=7, zorder=5, label="support points")
            axis.set_title(f"{name}\n{shots} support points", fontsize=SMALL + 1)
            _finish(axis, "y" if axis is row[0] else "")
    height = float(wave.abs().max())
    low, high = axes[0, 0].get_ylim()
    axes[0, 0].set_ylim(max(low, -2.2 * height), min(high, 2.2 * height))
    for axis in axes[-1]:
        axis.set_xlabel("x")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=SMALL + 1)
    return figure


def _one_wave(episodes: SinusoidEpisodes) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor, torch.Tensor]:
    """Ten support points, the whole wave and its x of the first task with an amplitude of at least 2, not flat."""
    tasks = replace(episodes, shots=10, oracle=True)[0]
    x, y = tasks.support
    amplitude = x[:, 0, 1]
    chosen = int((amplitude >= 2).int().argmax())
    grid = torch.linspace(-5, 5, 200).reshape(1, -1, 1)
    wave = amplitude[chosen] * torch.sin(grid - x[chosen, 0, 2])
    return (x[chosen : chosen + 1, :, :1], y[chosen : chosen + 1]), wave, grid


def _draw_line(axis: Axes, line: Line, color: str, marker: str, strong: bool) -> None:
    mean, half, dash = np.asarray(line.mean), np.asarray(line.half), "" if line.like is None else ":"
    if len(line.x) == 1:
        axis.axhline(mean[0], color=color, linestyle=dash or "--", linewidth=1.8, label=line.name)
        return
    width, size = (2.8, 6) if strong else (1.2 if dash else 1.6, 5)
    axis.plot(line.x, mean, dash or "-", color=color, marker=marker, markersize=size, linewidth=width, label=line.name)
    if len(half):
        axis.fill_between(
            line.x, mean - half, mean + half, color=color, alpha=0.2 if line.like is None else 0.1, linewidth=0
        )


def _smoothed(values: Sequence[float]) -> tuple[list[float], int]:
    """A centred running mean over about a twentieth of the values, fewer at both ends; and how many."""
    half = max(2, len(values) // 40)
    means = []
    for i in range(len(values)):
        reach = min(half, i)
        near = values[i - reach : i + reach + 1]
        means.append(math.fsum(near) / len(near))
    return means, 2 * half + 1


def _log_if_wide(axis: Axes, values: Sequence[float]) -> None:
    """A logarithmic axis where all values are positive and the largest is many times the smallest."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite or min(finite) <= 0 or max(finite) < 8 * min(finite):
        return
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if max(finite) < 1000 * min(finite) else (1,)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())


def _cut_divergence(axes: Sequence[Axes], panels: Sequence[Sequence[Line]]) -> None:
    """Keep values far above all starts from hiding the rest; a line that leaves the panel is marked."""
    values = [value for panel in panels for line in panel for value in line.mean]
    top = 3 * max((line.mean[0] for panel in panels for line in panel if math.isfinite(line.mean[0])), default=math.inf)
    shown = [value for value in values if value <= top]
    _log_if_wide(axes[0], shown)
    if len(shown) < len(values) and math.isfinite(top):
        axes[0].set_ylim(top=top)
    if axes[0].get_yscale() == "log":
        axes[0].set_ylim(bottom=0.6 * min(shown))
    for axis, panel in zip(axes, panels, strict=True):
        height = 0.98
        for line, color in zip(panel, COLORS, strict=False):
            gone = [step for step, value in zip(line.x, line.mean, strict=True) if not value <= top]
            if gone:
                axis.annotate("diverges", (gone[0], height), xycoords=("data", "axes fraction"), color=color, va="top")
                height -= 0.05


def _finish(axis: Axes, label: str) -> None:
    axis.set_ylabel(label)
    axis.grid(color="#dddddd", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
