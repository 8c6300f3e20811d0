"""Glyphs: many characters, always the same, distinct, split by script."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep.data.episodes import ClassEpisodes
from fewstep.data.glyphs import ALIKE, build, candidates, distinct, examples, load_glyphs, resemblance, split_of
from fewstep.errors import InputError


@pytest.fixture(scope="module")
def tables() -> dict[str, Tensor]:
    """All three splits; from the user's cache where it holds them."""
    return {"train": load_glyphs("train"), "validation": load_glyphs("validation"), "test": load_glyphs("test")}


def test_counts(tables: dict[str, Tensor]) -> None:
    counts = {split: len(table) for split, table in tables.items()}
    assert sum(counts.values()) >= 1500
    assert counts["train"] >= 1000
    assert counts["validation"] >= 150
    assert counts["test"] >= 400
    for table in tables.values():
        assert table.shape[1:] == (20, 1, 28, 28)
        assert table.dtype == torch.uint8


def test_no_picture_is_blank_or_full(tables: dict[str, Tensor]) -> None:
    for table in tables.values():
        bright = (table > 127).flatten(2).float().mean(-1)
        assert bright.min() > 0.005
        assert bright.max() < 0.8
        assert (table.float().mean((0, 1, 2))[[0, 0, -1, -1], [0, -1, 0, -1]] < 10).all()  # background is 0


def test_the_table_is_what_the_fonts_give(tables: dict[str, Tensor]) -> None:
    """The cached table against a fresh rendering: of some classes, in the order of their code points."""
    train = [character for character in distinct(candidates()[:60]) if split_of(character) == "train"]
    for index, character in enumerate(train[:30]):
        assert np.array_equal(tables["train"][index, :, 0].numpy(), examples(character, 28))


def test_same_pictures_each_time() -> None:
    characters = ["A", "Ж", "ش", "∑", "g"]
    one, other = build(characters, 28), build(characters[::-1], 28)
    assert np.array_equal(one["validation"], other["validation"])
    assert np.array_equal(one["test"], other["test"])
    assert np.array_equal(one["train"], other["train"][::-1])
    assert [len(one[split]) for split in ("train", "validation", "test")] == [3, 1, 1]


def test_examples_differ_from_each_other(tables: dict[str, Tensor]) -> None:
    for table in tables.values():
        assert all(len({picture.tobytes() for picture in row}) == 20 for row in table.numpy())


def test_classes_are_distinct_across_splits(tables: dict[str, Tensor]) -> None:
    means = torch.cat([table.double().mean((1, 2)) for table in tables.values()]).numpy()
    centred = list(means - means.mean((1, 2), keepdims=True))
    alike = resemblance(centred[::3], centred)
    alike[np.arange(len(alike)), np.arange(0, len(centred), 3)] = 0
    assert alike.max() < 0.995  # means over the jitter are blurred, so closer to each other than the characters
    assert (alike.max(1) > ALIKE).mean() < 0.5


def test_look_alikes_count_once() -> None:
    assert distinct(["O", "Ο", "О", "o", "P", "Р", "Ρ", "q"]) == ["O", "P", "q"]  # Greek and Cyrillic O, P
    assert distinct(["T", "ᐪ", "L", "ᒻ"]) == ["T", "L"]  # small, bold syllabics
    assert distinct(["6", "9", "→", "↑", "↓", "⇒"]) == ["6", "→", "⇒"]  # turned by quarters
    assert distinct([" ", "⠀", "—", ".", "B"]) == ["B"]  # blank, a line, a dot


def test_candidates_leave_out_variants_and_marks() -> None:
    found = set(candidates())
    assert {"A", "ß", "Ω", "Ж", "א", "ᐁ", "⠓", "→", "√"} <= found
    assert not {"é", "𝐀", "ﬁ", "²", "\u0301", "\u00a0", "\ue000", "█", "😀", "🂡"} & found


def test_scripts_are_whole() -> None:
    splits = {"Z": "train", "ω": "train", "я": "validation", "ש": "validation", "ⴻ": "validation", "٣": "test"}
    splits |= {"ᓀ": "test", "ქ": "test", "ⴃ": "test", "Ֆ": "test", "ߐ": "test", "۴": "test", "⡇": "train"}
    assert {character: split_of(character) for character in splits} == splits


def test_other_sizes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path))
    monkeypatch.setattr("fewstep.data.glyphs.candidates", lambda: list("ABCDЖЯשԱԲ"))
    small = load_glyphs("train", size=14)
    assert small.shape == (4, 20, 1, 14, 14)
    assert len(load_glyphs("test", size=14)) == 2
    assert (small > 127).flatten(1).any(1).all()


@pytest.mark.parametrize("size", [0, 7, 1000])
def test_unusable_size(size: int) -> None:
    with pytest.raises(InputError, match=f"size must be 8 to 128 pixels, but {size} came"):
        load_glyphs("train", size=size)


def test_unknown_split() -> None:
    with pytest.raises(InputError, match="split must be 'train' or 'validation' or 'test', but 'dev' came"):
        load_glyphs("dev")  # type: ignore[arg-type]


def test_episodes_of_glyphs(tables: dict[str, Tensor]) -> None:
    episodes = ClassEpisodes(tasks=2, images=tables["test"], ways=20, shots=1, queries=5, rotate=True)
    assert episodes[0].support[0].shape == (2, 20, 1, 28, 28)
