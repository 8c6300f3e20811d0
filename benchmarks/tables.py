"""Tables of a comparison: for the terminal, and in Markdown for the documentation."""

from __future__ import annotations

from statistics import median

from rich.table import Table

from benchmarks.results import Entry, Result, times_faster

MIB = 2**20
HEADINGS = [
    "contender", "variant", "ms/step", "threads", "processes", "tasks/s", "fewstep is", "error", "MiB", "first s",
    "cached", "of peak",
]  # fmt: skip


def as_table(result: Result) -> Table:
    """One row for each contender, the fastest first."""
    table = Table(title=title(result))
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading in HEADINGS[:2] else "right")
    for entry in result.best:
        table.add_row(*cells(result, entry))
    return table


def as_markdown(result: Result) -> str:
    """The same, with a heading, where it comes from, and who is missing."""
    lines = [
        f"### {title(result)}",
        "",
        f"    {result.origin.splitlines()[0]}",
        "",
        *result.origin.splitlines()[1:],
        "",
    ]
    lines += ["| " + " | ".join(HEADINGS) + " |", "|" + "---|" * 2 + "---:|" * (len(HEADINGS) - 2)]
    lines += ["| " + " | ".join(cells(result, entry)) + " |" for entry in result.best]
    if any(entry.meta_gradient for entry in result.best):
        alone = [f"{entry.family} {1000 * median(entry.meta_gradient):.2f}" for entry in result.best]
        lines += ["", f"The meta-gradient alone, ms: {', '.join(alone)}."]
    lines += ["", *(f"* {who}: {why}" for who, why in result.skipped.items())]
    return "\n".join(lines).rstrip()


def title(result: Result) -> str:
    """The workload, its size, and how undisturbed the machine was."""
    rounds = len(result.entries[0].step)
    return (
        f"{result.workload}, {result.tasks} tasks, {result.flops / 1e9:.3g} GFLOP a step "
        f"({rounds} rounds; others used {100 * result.foreign:.0f} % of the machine)"
    )


def cells(result: Result, entry: Entry) -> list[str]:
    """One row."""
    heats = result.heats.get(entry.family, {})  # where one way is hopeless, it has this time only
    by_layout = {layout: f"~{1000 * min(found.values()):.3g}" for layout, found in heats.items() if found}
    by_layout |= {other.layout: f"{1000 * other.seconds:.2f}" for other in result.of(entry.family)}
    ours, fresh = result.ours, result.fresh.get(entry.family)
    ratio = f"{times_faster(ours, entry):.2f}x" if ours else ""
    first = [f"{fresh.peak / MIB:.1f}", f"{fresh.cold:.1f}", f"{fresh.warm:.1f}"] if fresh else [""] * 3
    return [
        entry.family, entry.variant, f"{1000 * entry.seconds:.2f}", by_layout.get("threads", ""),
        by_layout.get("processes", ""), f"{result.tasks / entry.seconds:.0f}", ratio, f"{entry.error:.0e}", *first,
        f"{100 * result.share_of_machine(entry):.1f} %",
    ]  # fmt: skip
