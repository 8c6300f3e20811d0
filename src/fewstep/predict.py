"""What an adapted classifier says of picture files: as a table, JSON or CSV."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fewstep.classifier import Classifier
from fewstep.data.files import Picture, below, one_file
from fewstep.data.places import is_folder
from fewstep.errors import InputError

Format = Literal["table", "json", "csv"]


def predict(classifier: Classifier, files: Sequence[Path], how: Format = "table", skip: bool = False) -> str:
    """The class of each picture and the probability of each class, as text.

    files : pictures, and folders of them
    """
    if not files:
        raise InputError("say which pictures: files, or folders of them")
    pictures = [each for path in files for each in (below(path) if is_folder(path) else [one_file(path)])]
    if not pictures:
        raise InputError(f"no pictures in {', '.join(map(str, files))}; give picture files, or folders of them")
    pictures, shares = classifier.probabilities(pictures, skip)
    rows = [_row(picture, own, classifier.classes) for picture, own in zip(pictures, shares.tolist(), strict=True)]
    return {"table": _table, "json": _json, "csv": _csv}[how](rows, classifier.classes)


Row = dict[str, object]


def _row(picture: Picture, values: list[float], classes: Sequence[str]) -> Row:
    best = max(range(len(values)), key=values.__getitem__)
    shares = {name: round(value, 6) for name, value in zip(classes, values, strict=True)}
    return {"file": picture.where, "class": classes[best], "probability": round(values[best], 6),
            "probabilities": shares}  # fmt: skip


def _json(rows: list[Row], classes: Sequence[str]) -> str:
    return json.dumps(rows, indent=2, ensure_ascii=False)


def _csv(rows: list[Row], classes: Sequence[str]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "class", "probability", *classes])
    for row in rows:
        shares = row["probabilities"]
        assert isinstance(shares, dict)
        writer.writerow([row["file"], row["class"], row["probability"], *shares.values()])
    return text.getvalue().rstrip("\n")


def _table(rows: list[Row], classes: Sequence[str]) -> str:
    """The best three classes of each picture."""
    table = Table()
    for name in ("file", "class", "probability", "then"):
        table.add_column(name, justify="right" if name == "probability" else "left", overflow="fold")  # never cut
    for row in rows:
        shares = row["probabilities"]
        assert isinstance(shares, dict)
        others = sorted(((value, name) for name, value in shares.items() if name != row["class"]), reverse=True)[:2]
        then = ", ".join(f"{name} {100 * value:.1f} %" for value, name in others)
        texts = (str(row["file"]), str(row["class"]), f"{100 * shares[row['class']]:.1f} %", then)
        table.add_row(*map(Text, texts))
    console = Console(record=True, file=io.StringIO())
    console.print(table)
    return console.export_text().rstrip("\n")
