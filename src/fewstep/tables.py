"""An evaluation as a table, on the terminal and in Markdown. No number comes without its protocol."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from fewstep.plots import Line

Json = dict[str, Any]
LABELS = {"accuracy": "accuracy in %", "mse": "mean squared error"}
WORDS = {"ways": "{}-way", "shots": "{}-shot", "normalisation": "{}", "loss": "{}", "inner_lr": "inner rate {}",
         "queries_per_class": "queries per class: {}", "queries": "{} queries per task",
         "trained_on_shots": "trained on {} shots", "trained_on_ways": "trained on {} ways"}  # fmt: skip


def table(evaluation: Mapping[str, Any]) -> Table:
    """The learner and its baselines after 0, 1, 5, 10 inner steps, under the first protocol of `evaluation`."""
    header, *rows = _rows(evaluation)
    result = Table(title=Text(_title(evaluation)), caption=Text(describe(evaluation)), min_width=70)
    for name in header:
        result.add_column(name, justify="left" if name == header[0] else "right", no_wrap=name != header[0])
    for row in rows:
        result.add_row(*map(Text, row))
    return result


def protocols_table(content: Mapping[str, Any]) -> Table:
    """One row for each protocol: what it is, and the metric before adaptation and after the last step."""
    entries = content["protocols"]
    shared = _shared(entries)
    result = Table(title=Text(f"{content['recipe']}: {label(entries[0]['metric'])}"),
                   caption=Text(", ".join([*words(shared), "mean ± 95 % interval", *_trained(content)])))  # fmt: skip
    first, last = (entries[0]["by_step"][place]["step"] for place in (0, -1))
    ends = [f"after {first} steps", f"after {last}"][: 2 if last > first else 1]
    for name in ("protocol", "episodes", *ends):
        result.add_column(name, justify="left" if name == "protocol" else "right", no_wrap=name != "protocol")
    for entry in entries:
        own = {key: value for key, value in entry["protocol"].items() if key not in shared}
        (line,) = lines({**entry, "baselines": {}})
        digits = 2 if entry["metric"] == "accuracy" else 3
        cells = [_cell(line.mean[place], line.half[place], digits) for place in (0, -1)][: len(ends)]
        result.add_row(Text(", ".join(words(own)) or entry["name"]), f"{entry['episodes']:,}", *cells)
    return result


def _shared(entries: Sequence[Mapping[str, Any]]) -> Json:
    """What all protocols have in common."""
    plain = [entry["protocol"] for entry in entries]
    return {key: value for key, value in plain[0].items() if all(other.get(key) == value for other in plain)}


def comparison_table(first: str, second: str, found: Sequence[Mapping[str, Any]]) -> Table:
    """Two runs side by side, a row for each protocol."""
    title = f"{first} and {second}: {label(found[0]['metric'])}"
    told = ", ".join(words({**_shared(found), "queries_per_class": None}))
    steps = " and ".join(dict.fromkeys(str(result.step) for result in found[0]["results"]))
    about = f"the same {found[0]['episodes']:,} episodes for both, after {steps} inner steps, {told}"
    result = Table(title=Text(title), caption=Text(about))
    for name in ("protocol", "first", "second", "difference", "p"):
        result.add_column(name, justify="left" if name == "protocol" else "right", no_wrap=name != "protocol")
    for entry in found:
        scale, digits = (100, 2) if entry["metric"] == "accuracy" else (1, 3)
        values = [*entry["results"], entry["difference"]]
        cells = [_cell(scale * each.mean, scale * each.ci95, digits) for each in values]
        result.add_row(entry["name"], *cells, f"{entry['difference'].p:.2g}")
    return result


def markdown(evaluation: Mapping[str, Any]) -> str:
    """The tables of all protocols of `evaluation` in Markdown."""
    parts = []
    for entry in protocols(evaluation):
        header, *rows = ([cell.replace("|", r"\|") for cell in row] for row in _rows(entry))
        rule = ["---", *["---:"] * (len(header) - 1)]
        body = "\n".join(f"| {' | '.join(row)} |" for row in [header, rule, *rows])
        parts.append(f"## {_title(entry)}\n\n{body}\n\n{describe(entry)}\n")
    return "\n".join(parts)


def describe(evaluation: Mapping[str, Any]) -> str:
    """The protocol of a number in words."""
    return ", ".join(
        [
            *words(evaluation["protocol"]),
            f"{evaluation['episodes']:,} episodes, mean ± 95 % interval",
            *_trained(evaluation),
        ]
    )


def _trained(content: Mapping[str, Any]) -> list[str]:
    """How what was judged had been trained, in words."""
    about = f"{content['iterations']:,} iterations of training with seed {content['seed']}"
    return [about, *filter(None, [content.get("begun")])]  # older files do not tell


def words(protocol: Mapping[str, Any]) -> Iterator[str]:
    for key, value in protocol.items():
        name = key.replace("_", " ")
        if isinstance(value, bool):
            yield name if value else f"no {name}"
        elif value is not None:
            yield WORDS.get(key, f"{name} {{}}").format(value)


def shown(steps: Sequence[int]) -> list[int]:
    """Those of the inner steps after which a table tells the metric.

    >>> shown(range(13))
    [0, 1, 5, 10, 12]
    """
    return [step for step in steps if step in (0, 1, 5, 10, max(steps))]


def _title(evaluation: Mapping[str, Any]) -> str:
    return f"{evaluation['recipe']}, {evaluation['name']}: {label(evaluation['metric'])} by inner steps"


def _rows(evaluation: Mapping[str, Any]) -> list[list[str]]:
    """A header, then a row of texts for the learner and for each baseline."""
    found = lines(evaluation)
    steps = shown(found[0].x)
    digits = 2 if evaluation["metric"] == "accuracy" else 3
    rows = [["after", *(f"{step} step{plural(step)}" for step in steps)]]
    if gains := evaluation.get("gains"):  # older files lack them
        found.insert(1, _line("gain per episode", evaluation["metric"], gains))
    for line in found:
        known = {x: _cell(m, h, digits) for x, m, h in zip(line.x, line.mean, line.half, strict=True)}
        rows.append([line.name, *(known.get(step, "") for step in steps)])
    return rows


def _cell(mean: float, half: float, digits: int) -> str:
    if not math.isfinite(mean):
        return "diverged"
    return f"{mean:.{digits}f} ± {half:.{digits}f}" if mean < 1e4 else f"{mean:.1e} ± {half:.1e}"


def lines(evaluation: Mapping[str, Any]) -> list[Line]:
    """The metric by inner step, accuracies in %, of the learner and of each baseline."""
    found = []
    for name, entry in {"meta-learned": evaluation, **evaluation["baselines"]}.items():
        rate = entry.get("fine_tuning_lr")
        found.append(_line(name if rate is None else f"{name} (rate {rate:g})", evaluation["metric"], entry["by_step"]))
    return found


def _line(name: str, metric: str, points: Sequence[Mapping[str, Any]]) -> Line:
    scale = 100 if metric == "accuracy" else 1
    mean, half = ([scale * number(point[key]) for point in points] for key in ("mean", "ci95"))
    return Line(name, [point["step"] for point in points], mean, half)


def protocols(evaluation: Mapping[str, Any]) -> list[Json]:
    """One evaluation for each protocol, the first as it is."""
    return [{**evaluation, **other} for other in ({}, *evaluation.get("other_protocols", []))]


def plural(count: int) -> str:
    """The ending of a noun that stands after `count`."""
    return "" if count == 1 else "s"


def number(value: float | None) -> float:
    """A value out of a JSON file, where null stands for what is not finite."""
    return math.nan if value is None else value


def label(metric: str) -> str:
    """The metric with its unit."""
    return LABELS.get(metric, metric)
