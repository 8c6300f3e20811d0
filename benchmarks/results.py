"""What a comparison found, as it is written to a file and read again."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Literal

Layout = Literal["threads", "processes"]
LAYOUTS: tuple[Layout, ...] = ("processes", "threads")


@dataclass
class Entry:
    """A contender's best variant in one layout: seconds per step in each round.

    error : the relative distance of its meta-gradient from the autograd loop's. That loop's own error is how far a
        change of 1e-7 in the weights moves it: no smaller error of another means anything.
    """

    family: str
    layout: Layout
    variant: str
    options: dict[str, Any]
    error: float = 0.0
    step: list[float] = field(default_factory=list)
    meta_gradient: list[float] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """The median over the rounds."""
        return median(self.step)


@dataclass
class Fresh:
    """What a new process needs, with one thread a core: seconds of the first step, and bytes of a later one."""

    variant: str
    cold: float
    warm: float
    peak: int


@dataclass
class Result:
    """All contenders on one workload.

    flops : of the matrix products and convolutions of one meta-step
    product : of one step of the matrix product
    foreign : the share of the machine that was busy with something else in the turns that count
    heats : seconds per step of each variant that was tried, alone, before the rounds: family -> layout -> variant
    """

    workload: str
    tasks: int
    cores: int
    flops: int
    rounding: float
    product: int = 0
    foreign: float = 0.0
    origin: str = ""
    entries: list[Entry] = field(default_factory=list)
    fresh: dict[str, Fresh] = field(default_factory=dict)
    heats: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def save(self, folder: Path, product: int) -> None:
        """Write NAME.json."""
        self.product = product
        (folder / f"{self.workload}.json").write_text(json.dumps(asdict(self), indent=1))

    def of(self, family: str) -> list[Entry]:
        """A contender's entries, the best layout first."""
        return sorted((entry for entry in self.entries if entry.family == family), key=lambda entry: entry.seconds)

    @property
    def best(self) -> list[Entry]:
        """Each contender in its best layout, the fastest first."""
        families = dict.fromkeys(entry.family for entry in self.entries if entry.family != "matrix product")
        return sorted((self.of(family)[0] for family in families), key=lambda entry: entry.seconds)

    @property
    def ours(self) -> Entry | None:
        """The fastest of ours."""
        return next((entry for entry in self.best if entry.family.startswith("fewstep")), None)

    def share_of_machine(self, entry: Entry) -> float:
        """The part of the machine's matrix-product rate, measured in the same layout, that the meta-step reaches."""
        parts = 1 if entry.layout == "threads" else self.cores  # each process does a whole product
        product = next(e for e in self.entries if e.family == "matrix product" and e.layout == entry.layout)
        return (self.flops / entry.seconds) / (parts * self.product / product.seconds)


def times_faster(one: Entry, other: Entry) -> float:
    """How many times faster `one` is: the median over the rounds, so that what slows a whole round cancels out."""
    return median(theirs / own for theirs, own in zip(other.step, one.step, strict=True))


def load(path: Path) -> Result:
    """The result in a file."""
    content = json.loads(path.read_text())
    content["entries"] = [Entry(**entry) for entry in content["entries"]]
    content["fresh"] = {family: Fresh(**fresh) for family, fresh in content["fresh"].items()}
    return Result(**content)
