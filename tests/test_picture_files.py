"""Picture files: by what they are known, which are read, and what is told of the others."""

from __future__ import annotations

import io
import os
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fewstep.cli import main
from fewstep.data import load_image_folder
from fewstep.data.cache import write_whole
from fewstep.data.decode import Form, decoded, decoded_now, pixels
from fewstep.data.files import below, one_file, pictures_in
from fewstep.data.layouts import class_folders
from fewstep.errors import InputError
from tests.pictures import make_by_folders, own_folder, picture, put, red

Told = pytest.CaptureFixture[str]


pytestmark = pytest.mark.usefixtures("own_cache")


def fails(capsys: Told, *arguments: str) -> str:
    """The one line of a command that must exit with 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def bitmaps(top: Path, first: int) -> Path:
    """Ten classes of a picture each: files of the same names, sizes and times, whatever the pixels."""
    for name in range(10):
        path = put(top / f"class {name}" / "0.bmp", picture(first + name, kind="BMP"))
        os.utime(path, ns=(10**18, 10**18))
    return top


def test_pictures_of_equal_names_sizes_and_times_are_told_apart(top: Path, own_cache: Path) -> None:
    one, other = bitmaps(top / "one", 10), bitmaps(top / "other", 100)
    assert min(red(load_image_folder("train", data=other))) >= 100
    assert max(red(load_image_folder("train", data=one))) < 20
    bitmaps(one, 200)  # in place
    assert min(red(load_image_folder("train", data=one))) >= 200
    arrays = sorted(own_cache.glob("*.npy"))
    one.rename(top / "moved")
    assert min(red(load_image_folder("train", data=top / "moved"))) >= 200
    assert sorted(own_cache.glob("*.npy")) == arrays  # known by their content wherever they lie


def test_pictures_are_read_for_their_digest_once(top: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = red(load_image_folder("train", data=own_folder(top)))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"{path} was read again"))
        assert red(load_image_folder("train", data=top)) == expected
    for path in own_cache.glob("contents-*.txt"):
        path.write_text("")  # as a crash may leave it
    assert red(load_image_folder("train", data=top)) == expected


def test_what_was_left_half_written_is_deleted_a_day_later(own_cache: Path) -> None:
    old, new = put(own_cache / "fewstep-a.part", b""), put(own_cache / "fewstep-b.part", b"")
    foreign = put(own_cache / "film.part", b"")
    for path in (old, foreign):
        os.utime(path, (time.time() - 90_000, time.time() - 90_000))
    write_whole(own_cache / "array.npy", lambda file: file.write(b"x"))
    assert [path.exists() for path in (old, new, foreign)] == [False, True, True]


def grey(values: int, kind: str, bits: type = np.uint16) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((12, 12), values, bits)).save(file, kind)
    return file.getvalue()


def test_white_is_known_of_a_kind_and_not_guessed_from_the_pixels() -> None:
    form = Form(12, channels=1)
    assert pixels(grey(200, "PNG"), form).max() == 0  # a dark picture of 16 bits
    assert pixels(grey(257 * 40, "PPM", np.int32), form).max() == 40
    for value in (200, 70_000):
        with pytest.raises(ValueError, match="32-bit numbers, of which it is not known what is white"):
            pixels(grey(value, "TIFF", np.int32), form)


def test_no_program_is_called_for_a_picture(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was called"))
    eps = io.BytesIO()
    Image.new("RGB", (12, 12)).save(eps, "EPS")
    with pytest.raises(InputError, match=r"x.png cannot be read as a picture \(of no kind that is read"):
        decoded_now([one_file(put(top / "x.png", eps.getvalue()))], Form(12))


def test_pictures_of_other_kinds_are_named_and_other_files_counted(top: Path, capsys: Told) -> None:
    own_folder(top, classes=5)
    for name in range(5):
        put(top / f"class {name}" / "a.jfif", picture(7, kind="JPEG"))
        put(top / f"class {name}" / "Thumbs.db", b"x")
    put(top / "loose.png", picture(1))
    assert load_image_folder("train", data=top).counts.tolist() == [4, 4, 4]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("are ignored: class 0/Thumbs.db and 5 more")
    load_image_folder("test", data=top)
    assert capsys.readouterr().err == ""  # said once
    for number in range(12):
        put(top / "class 0" / f"{number:02}.HEIC", b"x")
    listed = put(top.parent / "split.csv", b"class 0,train\n")
    with pytest.raises(InputError, match=r"12 files cannot .*00.HEIC \(.*09.HEIC \([^)]*\) and 2 more; mend, convert"):
        load_image_folder("train", data=top, split_file=listed)


def test_what_lies_beside_pictures_is_told_of(top: Path, capsys: Told) -> None:
    put(top / "a" / "0.png", picture(1))
    put(top / "notes.txt", b"x")
    assert len(below(top)) == 1
    assert "no pictures by their names are ignored: notes.txt" in capsys.readouterr().err


@pytest.mark.parametrize("refused", ["train", "class 3", "class 3/0.png"])
def test_a_folder_that_may_not_be_entered(
    refused: str, top: Path, capsys: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_folder(top)
    real = Path.stat

    def refuse(path: Path, **options: Any) -> os.stat_result:
        if path == top / refused:
            raise PermissionError(13, "Permission denied")
        return real(path, **options)

    monkeypatch.setattr(Path, "stat", refuse)
    line = fails(capsys, "train", "image-folder", "--data", str(top), "--out", str(top.parent / "run"))
    where, name = (top / refused).parent, (top / refused).name
    assert line.startswith(f"fewstep: {where} cannot be entered ({name}: Permission denied); give a folder that you")
    if refused != "train":
        with pytest.raises(InputError, match=f"{where} cannot be entered"):
            class_folders(top)


def test_no_permission_to_list_or_to_read(top: Path, capsys: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("train", "image-folder", "--data", str(own_folder(top)), "--out", str(top.parent / "run"))
    for method, path, message in (
        ("iterdir", top / "class 3", "class 3 cannot be listed (Permission denied); give the path of a folder"),
        ("read_bytes", top / "class 3" / "0.png", "0.png cannot be read (Permission denied); mend that, or delete it"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(Path, method, _refuses(getattr(Path, method), path))
            assert message in fails(capsys, *command, "--split-file", _all_for_training(top))


def _refuses(real: Callable[[Path], Any], refused: Path) -> Callable[[Path], Any]:
    def refuse(path: Path) -> Any:
        if path == refused:
            raise PermissionError(13, "Permission denied")
        return real(path)

    return refuse


def _all_for_training(top: Path) -> str:
    rows = "\n".join(f"class {name},{'train' if name < 6 else 'val' if name < 8 else 'test'}" for name in range(10))
    return str(put(top.parent / "split.csv", rows.encode()))


def test_one_picture_in_a_class(top: Path, capsys: Told) -> None:
    own_folder(top, pictures=6)
    for name in range(1, 6):
        (top / "class 2" / f"{name}.png").unlink()
    command = ("train", "image-folder", "--data", str(top), "--ways", "2", "--out", str(top.parent / "run"))
    line = fails(capsys, *command, "--split-file", _all_for_training(top))
    assert "train: 1 shots and 5 queries asked, but class 'class 2' has 1 examples" in line


def test_a_folder_that_says_twice_how_it_is_split(top: Path, capsys: Told) -> None:
    make_by_folders(top)
    with pytest.raises(InputError, match=r"is split into folders, such as train; leave --split-file no.csv out"):
        load_image_folder("train", data=top, split_file=Path("no.csv"))
    load_image_folder("train", data=top, split_seed=3)
    assert "is split into folders, such as train: --split-seed 3 changes nothing" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"no.csv cannot be read"):
        load_image_folder("train", data=top / "train", split_file=Path("no.csv"), split_seed=3)
    assert "no.csv says how classes are split: --split-seed 3 changes nothing" in capsys.readouterr().err
    put(top / "more" / "0.png", picture(1))
    assert len(load_image_folder("train", data=top)) == 3
    assert "folders beside train, val, test are ignored: more" in capsys.readouterr().err
    put(top / "validation" / "x" / "0.png", picture(1))
    with pytest.raises(InputError, match=r"has val, validation, but should have one of them; join the two"):
        load_image_folder("train", data=top)


def test_a_user_is_at_home(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(top.parent))
    own_folder(top)
    rows = put(top.parent / "split.csv", b"class 1,train\n")
    assert load_image_folder("train", data=Path("~/data"), split_file=Path("~", rows.name)).names == ("class 1",)
    with pytest.raises(InputError, match=r"~nobody-here: .*write the folder in full"):
        load_image_folder("train", data=Path("~nobody-here"))


def zipped(path: Path, value: int) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/0.png", picture(value))
    return path


def test_zips_with_pictures_of_one_name(top: Path) -> None:
    zips = [zipped(top / "one.zip", 1), zipped(top / "two.zip", 1)]
    with pictures_in(zips) as found:
        assert [*found] == ["a/0.png"]
    zipped(top / "two.zip", 2)
    with (
        pytest.raises(InputError, match=r"0.png in .*one.zip and a/0.png in .*two.zip are different pictures; delete"),
        pictures_in(zips),
    ):
        pass


def test_an_encrypted_zip(top: Path) -> None:
    content = bytearray(zipped(top / "a.zip", 1).read_bytes())
    content[6] |= 1  # the flag, before the member and in the directory
    content[content.index(b"PK\x01\x02") + 8] |= 1
    put(top / "a.zip", bytes(content))
    with (
        pictures_in([top / "a.zip"]) as found,
        pytest.raises(InputError, match=r"0.png in .*a.zip cannot be read as a picture \(.*encrypted"),
    ):
        decoded("zip", [*found.values()], Form(12))
    with pictures_in([zipped(top / "a.zip", 1)]) as found:  # which has the same checksums
        assert len(decoded("zip", [*found.values()], Form(12))[0]) == 1
