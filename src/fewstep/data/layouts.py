"""The layouts in which people keep few-shot data sets: lists of file names, a folder a class, pickled arrays."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from fewstep.data.cache import data_folders, one_of
from fewstep.data.decode import Form, decoded
from fewstep.data.files import SUFFIXES, Picture, is_picture, pictures_in, tell_ignored, walk
from fewstep.data.packed import packed_classes
from fewstep.data.places import entries, is_file, is_folder, lines_of, rows_of
from fewstep.data.table import ImageTable
from fewstep.errors import InputError

Split = Literal["train", "validation", "test"]
Classes = Mapping[str, Sequence[Picture]]
Layout = Callable[[Path, str], AbstractContextManager[Classes]]
STEMS = {"train": ("train",), "validation": ("val", "validation", "valid"), "test": ("test",)}


@dataclass(frozen=True)
class Collection:
    """A data set that its users keep themselves.

    name : of its folder in `$FEWSTEP_DATA`;  classes : of each split;  get : where to get it, and in which layouts
    layouts : those that it is known in, the first that is there counts
    """

    name: str
    classes: Mapping[str, int]
    get: str
    layouts: tuple[Layout, ...]

    def load(self, split: Split, root: Path | None, form: Form) -> ImageTable:
        """The pictures of a split, out of the first folder that holds them in one of the layouts."""
        one_of("split", split, STEMS)
        # Of a folder that several data sets share, only the one with the name is looked into.
        folders = data_folders(self.name, root)[: 1 if root is None else None]
        for folder in filter(is_folder, folders):
            for layout in self.layouts:
                for stem in STEMS[split]:
                    with layout(folder, stem) as classes:
                        if classes:
                            return self._table(classes, split, folder, form)
        where = ", ".join(map(str, folders)) if folders else "any folder: FEWSTEP_DATA is not set"
        raise InputError(f"no {self.name} ({split}) in {where}. {self.get}")

    def _table(self, classes: Classes, split: Split, folder: Path, form: Form) -> ImageTable:
        if len(classes) != self.classes[split]:
            raise InputError(
                f"{folder} has {len(classes)} classes for {split}, but {self.name} has {self.classes[split]}; "
                f"complete it. {self.get}"
            )
        return table_of(f"{self.name}-{split}", classes, form)


def table_of(stem: str, classes: Classes, form: Form, skip: bool = False) -> ImageTable:
    """The pictures of each class, decoded; those left out are counted out."""
    images, left_out = decoded(stem, [picture for pictures in classes.values() for picture in pictures], form, skip)
    sizes = torch.tensor([len(pictures) for pictures in classes.values()])
    owners = torch.arange(len(sizes)).repeat_interleave(sizes)
    counts = sizes - torch.bincount(owners[left_out], minlength=len(sizes))
    if empty := [name for name, count in zip(classes, counts.tolist(), strict=True) if not count]:
        raise InputError(f"the class {empty[0]!r} has no readable pictures; add some, or delete the class")
    return ImageTable(images, counts, tuple(classes))


@contextmanager
def by_lists(folder: Path, stem: str) -> Iterator[Classes]:
    """`train.csv` with lines "filename,label"; the pictures in `images/`, in zips beside it, or anywhere below it."""
    listed = folder / f"{stem}.csv"
    if not is_file(listed):
        yield {}
        return
    places = [folder / "images"] if is_folder(folder / "images") else sorted(folder.glob("*.zip")) or [folder]
    with pictures_in(places) as found:
        by_file: dict[str, list[Picture]] = {}
        for path, picture in found.items():
            for key in {path, path.rsplit("/", 1)[-1]}:
                by_file.setdefault(key, []).append(picture)
        classes: dict[str, list[Picture]] = {}
        lines: dict[str, int] = {}
        for number, name, label in _lines(listed):
            if len(by_file.get(name, [])) != 1:
                amiss = "is there several times; give its path" if name in by_file else "is not there; add it"
                raise InputError(f"{listed} names {name}, which {amiss} (in {', '.join(map(str, places))})")
            (picture,) = by_file[name]
            if (first := lines.setdefault(picture.where, number)) != number:
                raise InputError(f"{listed}, line {number}: {name} is in line {first}, too; leave one of them")
            classes.setdefault(label, []).append(picture)
        remedy = "leave it in one of them, or give the two labels of their own"
        for other in _others(stem, folder, ".csv"):
            check_new(classes, listed, (label for _, _, label in _lines(other)), other, remedy)
        yield dict(sorted(classes.items()))


def _lines(listed: Path) -> Iterator[tuple[int, str, str]]:
    """The number, the file name and the label of each line."""
    for number, row in enumerate(rows_of(listed), 1):
        cells = tuple(map(str.strip, row))
        if not row or (number == 1 and cells == ("filename", "label")):
            continue
        if len(cells) != 2:
            raise InputError(f"{listed}, line {number}: expected filename,label, not {','.join(row)!r:.80}")
        yield number, *cells


def _others(stem: str, folder: Path, suffix: str = "") -> Iterator[Path]:
    """Of each other split the list, or the folder, that counts."""
    is_there = is_file if suffix else is_folder
    for stems in STEMS.values():
        if stem not in stems:
            yield from [path for name in stems if is_there(path := folder / f"{name}{suffix}")][:1]


def check_new(classes: Iterable[str], here: Path, others: Iterable[str], there: Path, remedy: str) -> None:
    """Raise `InputError` where two splits share a class."""
    if both := {*classes} & {*others}:
        raise InputError(
            f"the class {min(both)!r} is in both {here} and {there}, but few-shot learning is judged on new classes; "
            f"{remedy}"
        )


@contextmanager
def by_folders(folder: Path, stem: str) -> Iterator[Classes]:
    """`train/CLASS/*`, a folder for each class."""
    classes = class_folders(folder / stem) if is_folder(folder / stem) else {}
    for other in _others(stem, folder) if classes else ():
        names = [entry.name for entry in entries(other) if is_folder(entry)]
        check_new(classes, folder / stem, names, other, "leave it in one of them")
    yield classes


def class_folders(folder: Path) -> dict[str, list[Picture]]:
    """The pictures of each sub-folder, which is a class; they lie in it, or in one folder in it."""
    classes = {}
    ignored = []
    for entry in entries(folder):
        if is_folder(entry):
            pictures, others = walk(entry, folder)
            ignored += others
            inside = sorted({picture.name.rpartition("/")[0] for picture in pictures})
            if not pictures:
                raise InputError(f"the class {entry} has no pictures ({', '.join(SUFFIXES)}); add some or delete it")
            if len(inside) > 1:
                raise InputError(
                    f"the class {entry} has pictures in several folders, such as {inside[0]} and {inside[1]}, which "
                    "may be classes of their own; have one folder of pictures for each class"
                )
            classes[entry.name] = pictures
        elif is_picture(entry.name):
            ignored.append(entry)
        elif entry.is_symlink() and not entry.exists():
            raise InputError(f"{entry} is a link to what is not there; mend or delete it")
    if classes:
        tell_ignored(folder, ignored, "are no pictures by their names, or lie in no class folder,")
    return classes


@contextmanager
def by_class_lists(folder: Path, stem: str) -> Iterator[Classes]:
    """`splits/bertinetto/train.txt`, a class a line, and `data/CLASS/*`; perhaps in a folder `cifar100`."""
    for top in (folder, folder / "cifar100"):
        lists = top / "splits" / "bertinetto"
        if is_file(listed := lists / f"{stem}.txt"):
            names = _names(listed)
            if missing := [name for name in names if not is_folder(top / "data" / name)]:
                raise InputError(f"{listed} names the class {missing[0]}, but {top / 'data' / missing[0]} is not there")
            for other in _others(stem, lists, ".txt"):
                check_new(names, listed, _names(other), other, "leave it in one of them")
            yield {name: walk(top / "data" / name, top)[0] for name in sorted(names)}
            return
    yield {}


def _names(listed: Path) -> list[str]:
    return [*filter(None, map(str.strip, lines_of(listed)))]


@contextmanager
def by_pickles(folder: Path, stem: str) -> Iterator[Classes]:
    """One of the pickled caches in circulation, whose name ends in the split's; read without running any code.

    Their labels, of which many begin at 0 in each split, are not compared.
    """
    # "train_phase_val" are more pictures of the training classes.
    tail = rf"(?:_phase_{stem})?\.(?:pkl|pickle)|_images(?:_png\.pkl|\.npz)"
    name = re.compile(rf"(?:.*(?<!train_phase)[_-])?{stem}(?:{tail})")
    found = [path for path in entries(folder) if name.fullmatch(path.name) and is_file(path)]
    # tieredImageNet's authors decode one file into another, npz, which is the first by its name.
    if len({re.sub(r"_images.*", "", path.name) for path in found}) > 1:
        raise InputError(f"{folder} has both {found[0].name} and {found[1].name} for {stem}; leave one there")
    yield packed_classes(found[0]) if found else {}
