"""Your own pictures: a folder that holds a folder of pictures for each class."""

from __future__ import annotations

import random
import unicodedata
from itertools import combinations
from pathlib import Path

from fewstep.data.cache import one_of
from fewstep.data.decode import Form
from fewstep.data.files import Picture
from fewstep.data.layouts import STEMS, Classes, Split, check_new, class_folders, table_of
from fewstep.data.places import entries, expanded, is_file, is_folder, rows_of
from fewstep.data.table import ImageTable
from fewstep.errors import InputError
from fewstep.progress import narrate_once

SHARES = {"train": 0.64, "validation": 0.16, "test": 0.2}


def load_image_folder(
    split: Split,
    *,
    data: Path,
    size: int = 84,
    grey: bool = False,
    split_file: Path | None = None,
    split_seed: int = 0,
    skip_unreadable: bool = False,
) -> ImageTable:
    """The pictures of the classes of one split, cropped to a square and resized.

    data : the folder. Where it holds `train`, `val` and `test`, each of those holds the class folders of its split;
        else it holds the class folders themselves, and `split_file` or `split_seed` says which class is for what
    size : pixels of a side;  grey : one channel instead of three
    split_file : lines "class,split" with the splits train, val and test; classes that it does not name are left out
    split_seed : without a file, the classes are shuffled by it: 64 % train, 16 % validation, 20 % test
    skip_unreadable : leave damaged pictures out, and name them; else they raise `InputError`
    Splits share no class: few-shot learning is judged on classes that training has not seen.
    """
    one_of("split", split, STEMS)
    classes = splits_of(data, split_file, split_seed)[split]
    if not classes:
        raise InputError(f"{data} leaves no class for {split}; add classes, or say which are for what in a split file")
    return table_of("folder", classes, Form(size, 1 if grey else 3, crop=True), skip_unreadable)


def splits_of(data: Path, split_file: Path | None = None, split_seed: int = 0) -> dict[str, Classes]:
    """The pictures of each class of each split."""
    data, split_file = expanded(data), None if split_file is None else expanded(split_file)
    found = {split: [data / stem for stem in stems if is_folder(data / stem)] for split, stems in STEMS.items()}
    if found["train"] and (found["validation"] or found["test"]):
        if split_file is not None:
            raise InputError(f"{data} is split into folders, such as train; leave --split-file {split_file} out")
        if split_seed:
            narrate_once(f"{data} is split into folders, such as train: --split-seed {split_seed} changes nothing")
        return _given(data, found)
    if split_file is not None and split_seed:
        narrate_once(f"{split_file} says how classes are split: --split-seed {split_seed} changes nothing")
    classes = class_folders(data)
    if not classes:
        pictures = [entry.name for entry in entries(data) if is_file(entry)]
        lies = f"but {pictures[0]} lies there without one" if pictures else "but it is empty"
        raise InputError(f"{data} should hold a folder of pictures for each class, {lies}")
    assigned = _from_file(split_file, classes) if split_file is not None else _shuffled(list(classes), split_seed)
    return {split: {name: classes[name] for name in names} for split, names in assigned.items()}


def _given(data: Path, found: dict[str, list[Path]]) -> dict[str, Classes]:
    """The classes in the folders of each split."""
    there = [folder.name for folders in found.values() for folder in folders]
    for split, paths in found.items():
        if len(paths) != 1:
            amiss = f"nothing for {split}; add the folder" if not paths else "should have one of them; join the two"
            raise InputError(f"{data} has {', '.join(path.name for path in paths) or ', '.join(there)}, but {amiss}")
    if beside := [entry.name for entry in entries(data) if is_folder(entry) and entry.name not in there]:
        narrate_once(f"{data}: folders beside {', '.join(there)} are ignored: {', '.join(beside)}")
    folders = {split: paths[0] for split, paths in found.items()}
    splits = {split: class_folders(folder) for split, folder in folders.items()}
    remedy = "put all class folders into one folder, and they are split by class"
    for one, other in combinations(splits, 2):
        check_new(splits[one], folders[one], splits[other], folders[other], remedy)
    return dict(splits)


def _from_file(path: Path, classes: dict[str, list[Picture]]) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {split: [] for split in STEMS}
    there: dict[str, str] = {}
    for name in classes:  # macOS writes accents in another way
        if (other := there.setdefault(unicodedata.normalize("NFC", name), name)) != name:
            raise InputError(
                f"{other!r} and {name!r} differ only in how accents are written; rename one of the classes"
            )
    stems = {stem: split for split, stems in STEMS.items() for stem in stems}
    seen = set()
    for number, row in enumerate(rows_of(path)):
        cells = [cell.strip() for cell in row]
        if not any(cells) or (number == 0 and cells == ["class", "split"]):
            continue
        known = there.get(unicodedata.normalize("NFC", cells[0]))
        if len(cells) != 2 or cells[1] not in stems or known in seen:
            raise InputError(
                f"{path}, line {number + 1}: expected class,split with train, val or test, each class once, but "
                f"{','.join(row)!r:.80} came"
            )
        if known is None:
            raise InputError(
                f"{path} names the class {cells[0]!r}, which has no folder; there are {', '.join(classes)}"
            )
        seen.add(known)
        names[stems[cells[1]]].append(known)
    return names


def _shuffled(names: list[str], seed: int) -> dict[str, list[str]]:
    """All names, shuffled and cut: validation and test get their share, rounded and at least one."""
    random.Random(seed).shuffle(names)
    held = {split: max(1, round(share * len(names))) for split, share in SHARES.items() if split != "train"}
    first, second = held["validation"], held["validation"] + held["test"]
    return {"train": names[second:], "validation": names[:first], "test": names[first:second]}
