"""Pictures in the layouts that people keep: what they decode to, the cache, and what goes wrong."""

from __future__ import annotations

import io
import os
import pickle
import re
import unicodedata
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.cli import main
from fewstep.data import (
    ClassEpisodes,
    ImageTable,
    load_cifar_fs,
    load_fc100,
    load_image_folder,
    load_mini_imagenet,
    load_tiered_imagenet,
)
from fewstep.data.decode import Form, pixels
from fewstep.data.layouts import Collection, Split, by_class_lists, by_folders, by_lists, by_pickles
from fewstep.errors import InputError
from fewstep.run import Run
from tests.pictures import NAMES, make_by_folders, own_folder, picture, put, red

FEW = {"train": 3, "validation": 2, "test": 2}


pytestmark = pytest.mark.usefixtures("own_cache")


def few(name: str = "few") -> Collection:
    return Collection(name, FEW, "Get it.", (by_lists, by_folders, by_class_lists, by_pickles))


def make_by_lists(top: Path, zipped: bool) -> None:
    for stem, classes in NAMES.items():
        rows = [(f"{name}{i}.png", name) for name in classes for i in range(2)]
        (top / f"{stem}.csv").write_text("filename,label\n" + "".join(f"{file},{name}\n" for file, name in rows))
        if zipped:
            with zipfile.ZipFile(top / f"{stem}.zip", "w") as archive:
                for number, (file, _) in enumerate(rows):
                    archive.writestr(f"deep/{file}", picture(number))
        else:
            for number, (file, _) in enumerate(rows):
                put(top / "images" / file, picture(number))


def make_by_class_lists(top: Path) -> None:
    for stem, classes in NAMES.items():
        put(top / "cifar100/splits/bertinetto" / f"{stem}.txt", "\n".join(classes).encode())
        for number, name in enumerate(classes):
            for i in range(2):
                put(top / "cifar100/data" / name / f"{i}.png", picture(2 * number + i))


def arrays(stem: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.stack([np.full((12, 12, 3), number, np.uint8) for number in range(2 * len(NAMES[stem]))])


def by_cache_pickles(top: Path) -> None:
    for stem, classes in NAMES.items():
        rows = {name: [2 * number, 2 * number + 1] for number, name in enumerate(classes)}
        content = {"image_data": arrays(stem), "class_dict": rows}
        put(top / f"mini-imagenet-cache-{stem}.pkl", pickle.dumps(content, protocol=5))


def by_category_pickles(top: Path) -> None:
    for stem, classes in NAMES.items():
        labels = [number for number in range(len(classes)) for _ in range(2)]
        tail = "train_phase_train" if stem == "train" else stem
        content = pickle.dumps({"data": arrays(stem), "labels": labels}, protocol=2)
        put(top / f"miniImageNet_category_split_{tail}.pickle", content)
    put(top / "miniImageNet_category_split_train_phase_val.pickle", b"not to be read")


def by_png_pickles(top: Path) -> None:
    for stem, classes in NAMES.items():
        encoded = [np.frombuffer(picture(number), np.uint8) for number in range(2 * len(classes))]
        put(top / f"{stem}_images_png.pkl", pickle.dumps(encoded))
        labels = {"label_specific": np.repeat(np.arange(len(classes)), 2)}
        put(top / f"{stem}_labels.pkl", pickle.dumps(labels))


def by_npz(top: Path) -> None:
    for stem, classes in NAMES.items():
        np.savez(top / f"{stem}_images.npz", images=arrays(stem))
        put(top / f"{stem}_labels.pkl", pickle.dumps(np.repeat(np.arange(len(classes)), 2)))


LAYOUTS: dict[str, Callable[[Path], None]] = {
    "lists and images": lambda top: make_by_lists(top, zipped=False),
    "lists and zips": lambda top: make_by_lists(top, zipped=True),
    "folders": make_by_folders,
    "lists of classes": make_by_class_lists,
    "cache pickles": by_cache_pickles,
    "category pickles": by_category_pickles,
    "pickled png": by_png_pickles,
    "npz": by_npz,
}


@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS)
def test_every_layout_gives_the_same_tables(make: Callable[[Path], None], top: Path) -> None:
    make(top)
    for split, classes in (("train", 3), ("validation", 2), ("test", 2)):
        table = few().load(split, top, Form(12))  # type: ignore[arg-type]
        assert table.counts.tolist() == [2] * classes
        assert red(table) == [*range(2 * classes)]
        again = few().load(split, top, Form(12))  # type: ignore[arg-type]
        assert torch.equal(again.images, table.images)
        assert again.names == table.names


def test_the_first_of_several_layouts_counts_and_a_folder_by_name_comes_first(top: Path) -> None:
    make_by_folders(top / "few")
    put(top / "few" / "train" / "a" / "0.png", picture(77))
    make_by_lists(top, zipped=False)
    assert red(few().load("train", top, Form(12)))[0] == 77
    assert few().load("train", top, Form(12)).names == ("a", "b", "c")


def test_names_in_lists_may_be_paths_and_must_be_of_one_picture(top: Path) -> None:
    for stem in NAMES:
        rows = [(f"{name}/{i}.png", name) for name in NAMES[stem] for i in range(2)]
        (top / f"{stem}.csv").write_text(
            "\ufefffilename,label\n\n" + "".join(f"{file},{name}\n" for file, name in rows)
        )
        for number, (file, _) in enumerate(rows):
            put(top / "images" / file, picture(number))
    assert red(few().load("train", top, Form(12))) == [0, 1, 2, 3, 4, 5]
    (top / "val.csv").write_text("0.png,d\n")
    with pytest.raises(InputError, match=r"names 0.png, which is there several times; give its path"):
        few().load("validation", top, Form(12))


def test_one_data_set_is_not_taken_for_another(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_by_class_lists(top)
    monkeypatch.setenv("FEWSTEP_DATA", str(top))
    with pytest.raises(InputError, match=r"no few .train. in .*/few. Get it"):
        few().load("train", None, Form(12))
    by_cache_pickles(top)
    put(top / "CIFAR_FS_train.pickle", pickle.dumps({}))
    with pytest.raises(InputError, match=r"both CIFAR_FS_train.pickle and mini-imagenet-cache-train.pkl"):
        Collection("few", FEW, "Get it.", (by_pickles,)).load("train", top, Form(12))


def test_what_could_not_be_read_is_read_again(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own_folder(top)
    real = Path.read_bytes

    def refuse(path: Path) -> bytes:
        if path.name == "0.png":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(InputError, match=r"0.png cannot be read \(Permission denied\)"):
        load_image_folder("train", data=top, skip_unreadable=True)
    monkeypatch.setattr(Path, "read_bytes", real)
    assert load_image_folder("train", data=top).counts.tolist() == [3] * 6


def test_what_is_missing_is_said_with_where_to_get_it(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEWSTEP_DATA", raising=False)
    for load in (load_mini_imagenet, load_cifar_fs, load_fc100, load_tiered_imagenet):
        with pytest.raises(InputError, match=r"FEWSTEP_DATA is not set.*[Gg]et .*FEWSTEP_DATA"):
            load("train")
        with pytest.raises(InputError, match=f"no .* in {top}"):
            load("test", root=top)
    make_by_folders(top)
    with pytest.raises(InputError, match="has 3 classes for train, but mini_imagenet has 64"):
        load_mini_imagenet("train", root=top)


def test_a_split_file_may_write_accents_in_another_way(top: Path) -> None:
    folder = own_folder(top / "own")
    composed, apart = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
    (folder / "class 0").rename(folder / apart)
    listed = put(top / "split.csv", f"class 1,train\n{composed},test\nclass 2,val\n".encode())
    assert load_image_folder("test", data=folder, split_file=listed).names == (apart,)
    listed.write_text(f"{composed},train\n{apart},test\n")
    with pytest.raises(InputError, match=r"split.csv, line 2: expected class,split .* each class once"):
        load_image_folder("test", data=folder, split_file=listed)


@pytest.mark.parametrize("layout", ["folders", "lists and images", "lists of classes"])
def test_a_class_in_two_splits_is_refused(layout: str, top: Path) -> None:
    twice, gone = NAMES["train"][0], NAMES["val"][0]
    LAYOUTS[layout](top)
    assert len(few().load("test", top, Form(12)).names) == len(NAMES["test"])
    if layout == "folders":
        (top / "val" / gone).rename(top / "val" / twice)
    else:
        listed = top / ("val.csv" if layout == "lists and images" else "cifar100/splits/bertinetto/val.txt")
        listed.write_text(re.sub(rf"\b{gone}$", twice, listed.read_text(), flags=re.MULTILINE))
    splits: tuple[Split, ...] = ("train", "validation")
    for split in splits:
        with pytest.raises(InputError, match=rf"the class '{twice}' is in both .*; leave it in one of them"):
            few().load(split, top, Form(12))
    assert len(few().load("test", top, Form(12)).names) == len(NAMES["test"])


def test_lists_that_do_not_fit_the_pictures(top: Path) -> None:
    make_by_lists(top, zipped=False)
    (top / "images" / "b1.png").unlink()
    with pytest.raises(InputError, match=r"train.csv names b1.png, which is not there; .*images"):
        few().load("train", top, Form(12))
    rows = (top / "test.csv").read_text().splitlines()
    (top / "test.csv").write_text("\n".join([*rows, rows[1]]))
    with pytest.raises(InputError, match=rf"test.csv, line {len(rows) + 1}: .* is in line 2, too; leave one of them"):
        few().load("test", top, Form(12))
    (top / "test.csv").write_text('filename,label\n"' + 30_000 * "one,two\n")
    with pytest.raises(InputError, match=r"test.csv is no list with commas .*is a quote left open"):
        few().load("test", top, Form(12))
    (top / "test.csv").write_text("\n".join(rows))
    (top / "val.csv").write_text("filename,label\nonly\n")
    with pytest.raises(InputError, match=r"val.csv, line 2: expected filename,label, .*only"):
        few().load("validation", top, Form(12))
    put(top / "broken.zip", b"no zip")
    (top / "images").rename(top / "elsewhere")
    with pytest.raises(InputError, match=r"broken.zip is damaged"):
        few().load("test", top, Form(12))


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("true",)


def test_a_pickle_that_would_run_code_is_refused(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    monkeypatch.setattr(os, "system", ran.append)
    put(top / "few_train.pkl", pickle.dumps({"data": _Evil(), "labels": [0]}))
    with pytest.raises(InputError, match=r"few_train.pkl is no pickle of plain arrays \(it would run"):
        few().load("train", top, Form(12))
    assert not ran
    put(top / "few_val.pkl", b"\x80")
    with pytest.raises(InputError, match=r"few_val.pkl is no pickle"):
        few().load("validation", top, Form(12))
    put(top / "few_test.pkl", pickle.dumps({"other": 1}))
    with pytest.raises(InputError, match=r"should hold image_data and class_dict, .* but the keys other came"):
        few().load("test", top, Form(12))


def test_pixels_of_every_mode() -> None:
    form = Form(12)
    assert pixels(picture(9), form)[:, 0, 0].tolist() == [9, 0, 246]
    assert pixels(picture(9, mode="L"), form)[:, 0, 0].tolist() == [9, 9, 9]
    assert pixels(picture(9, mode="RGBA"), form)[:, 5, 5].tolist() == [159, 155, 251]  # on white
    assert pixels(picture(9), Form(12, channels=1)).shape == (1, 12, 12)
    assert pixels(picture(5, (30, 40), kind="JPEG"), form).shape == (3, 12, 12)
    deep = io.BytesIO()
    Image.fromarray(np.full((12, 12), 257 * 50, np.uint16)).save(deep, "PNG")
    assert pixels(deep.getvalue(), form)[:, 0, 0].tolist() == [50, 50, 50]  # Pillow alone says 255
    palette = io.BytesIO()
    Image.open(io.BytesIO(picture(9))).quantize(2).save(palette, "GIF", transparency=0)
    assert pixels(palette.getvalue(), form)[:, 0, 0].tolist() == [255, 255, 255]
    turned = io.BytesIO()
    wide = Image.new("RGB", (12, 12))
    wide.paste((255, 0, 0), (0, 0, 12, 6))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    wide.save(turned, "PNG", exif=exif)
    assert pixels(turned.getvalue(), form)[0, [0, 11], 0].tolist() == [0, 255]


def test_cropping_keeps_the_middle() -> None:
    wide = Image.new("RGB", (36, 12))
    wide.paste((255, 0, 0), (12, 0, 24, 12))
    file = io.BytesIO()
    wide.save(file, "PNG")
    assert (pixels(file.getvalue(), Form(12, crop=True))[0] == 255).all()
    assert (pixels(file.getvalue(), Form(12))[0] == 255).mean() < 0.5
    with pytest.raises(InputError, match="8 to 512 pixels"):
        Form(4)


def test_the_cache_follows_the_content_and_serves_processes_at_once(top: Path, own_cache: Path) -> None:
    make_by_folders(top)
    with ThreadPoolExecutor(4) as pool:
        tables = [*pool.map(lambda _: few().load("train", top, Form(12)), range(4))]
    assert all(red(table) == [0, 1, 2, 3, 4, 5] for table in tables)
    assert len([*own_cache.glob("*.npy")]) == 1
    assert not [*own_cache.glob("*.part")]
    put(top / "train" / "a" / "0.png", picture(99))
    os.utime(top / "train" / "a" / "0.png", ns=(1, 1))
    assert red(few().load("train", top, Form(12)))[0] == 99
    for path in own_cache.glob("*.npy"):
        path.write_bytes(b"damaged")
    assert red(few().load("train", top, Form(12)))[0] == 99
    tables[0].images.zero_()  # a copy of its own
    assert red(few().load("train", top, Form(12)))[0] == 99


def test_a_cache_that_cannot_be_written_is_done_without(top: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_by_folders(top)
    monkeypatch.setenv("FEWSTEP_CACHE", str(put(top / "file", b"")))
    with pytest.warns(UserWarning, match="cannot be written"):
        assert red(few().load("train", top, Form(12))) == [0, 1, 2, 3, 4, 5]


def test_classes_of_different_sizes_in_episodes() -> None:
    sizes = [3, 7, 4]
    images = torch.cat([torch.full((n, 1, 8, 8), 50 * k, dtype=torch.uint8) for k, n in enumerate(sizes)])
    images[:, 0, 0, 0] = torch.arange(14)
    table = ImageTable(images, torch.tensor(sizes), ("x", "y", "z"))
    seen = set()
    for index in range(60):
        tasks = ClassEpisodes(images=table, ways=3, shots=1, queries=2, tasks=4)[index]
        x = torch.cat([tasks.support[0], tasks.query[0]], 1) * 255
        y = torch.cat([tasks.support[1], tasks.query[1]], 1)
        seen |= {round(value) for value in x[:, :, 0, 0, 0].flatten().tolist()}
        for task in range(4):
            assert len({round(value) for value in x[task, :, 0, 0, 0].tolist()}) == 9  # no picture twice
            for label in range(3):
                assert len(set(x[task, y[task] == label, 0, 4, 4].tolist())) == 1
    assert seen == set(range(14))
    with pytest.raises(InputError, match="class 'x' has 3 examples"):
        ClassEpisodes(images=table, ways=3, shots=2, queries=2, tasks=4)


def test_tables_that_make_no_sense() -> None:
    images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    with pytest.raises(InputError, match="sum to 3"):
        ImageTable(images, torch.tensor([1, 2]))
    with pytest.raises(InputError, match="uint8"):
        ImageTable(images.float(), torch.tensor([4]))


def mini_root() -> Path:
    folder = Path(os.environ.get("FEWSTEP_DATA", ""), "mini_imagenet")
    if "FEWSTEP_DATA" not in os.environ or not (folder / "test.csv").is_file():
        pytest.skip("FEWSTEP_DATA names no folder with mini_imagenet")
    return folder


def test_the_real_mini_imagenet() -> None:
    table = load_mini_imagenet("validation", root=mini_root())
    assert table.images.shape == (9600, 3, 84, 84)
    assert table.counts.tolist() == [600] * 16
    assert table.names == tuple(sorted(table.names))
    assert table.names[0] == "n01855672"
    with zipfile.ZipFile(mini_root() / "val.zip") as archive, archive.open("n0185567200000004.jpg") as file:
        expected = np.asarray(Image.open(file).convert("RGB")).transpose(2, 0, 1)
    assert np.array_equal(table.images[1].numpy(), expected)


@pytest.mark.parametrize(("name", "folder", "counts"), [
    ("cifar-fs", "cifar_fs", (64, 16, 20)), ("fc100", "fc100", (60, 20, 20)),
    ("tieredimagenet", "tiered_imagenet", (351, 97, 160)),
])  # fmt: skip
def test_a_recipe_of_each_data_set(name: str, folder: str, counts: tuple[int, ...], top: Path,
                                   monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.setenv("FEWSTEP_DATA", str(top))
    for split, count in zip(("train", "val", "test"), counts, strict=True):
        for number in range(count):
            for i in range(2):
                put(top / folder / split / f"{split} {number}" / f"{i}.png", picture(number % 256))
    out = top / "run"
    main(["train", f"{name}-5way-1shot", "--iterations", "2", "--queries", "1", "--meta-batch", "1", "--no-plan",
          "--filters", "2", "--validation-episodes", "2", "--clip", "10", "--out", str(out)])  # fmt: skip
    run = Run(out)
    assert run.read_json("config.json")["clip"] == 10
    assert "validation_accuracy" in run.metrics()[-1]


def test_a_folder_of_classes_is_split_by_class(top: Path) -> None:
    own_folder(top)
    splits = {split: load_image_folder(split, data=top, size=8) for split in ("train", "validation", "test")}
    assert [len(table) for table in splits.values()] == [6, 2, 2]
    assert len({name for table in splits.values() for name in table.names}) == 10
    assert splits["train"].images.shape == (18, 3, 8, 8)
    other = load_image_folder("train", data=top, size=8, split_seed=1)
    assert set(other.names) != set(splits["train"].names)
    assert load_image_folder("train", data=top, size=8, grey=True).images.shape == (18, 1, 8, 8)


def test_a_folder_with_a_split_file_or_split_folders(top: Path) -> None:
    own_folder(top / "one")
    listed = put(top / "split.csv", b"class,split\nclass 1,train\nclass 2,val\nclass 3,test\n")
    assert load_image_folder("validation", data=top / "one", split_file=listed).names == ("class 2",)
    make_by_folders(top / "two")
    assert load_image_folder("test", data=top / "two").names == ("f", "g")


def _bad_utf8(top: Path) -> dict[str, Any]:
    own_folder(top)
    return {"split_file": put(top.parent / "split.csv", b"\xff\xfe,train")}


def _split_lines(text: str) -> Callable[[Path], dict[str, Any]]:
    def make(top: Path) -> dict[str, Any]:
        own_folder(top)
        return {"split_file": put(top.parent / "split.csv", text.encode())}

    return make


def _with(change: Callable[[Path], Any]) -> Callable[[Path], dict[str, Any]]:
    def make(top: Path) -> dict[str, Any]:
        change(own_folder(top))
        return {}

    return make


def _dangling(top: Path) -> None:
    (top / "class 0" / "0.png").unlink()
    (top / "class 0" / "0.png").symlink_to(top / "nowhere.png")


def _loop(top: Path) -> None:
    (top / "class 0" / "again").symlink_to(top / "class 0", target_is_directory=True)


def _nested(top: Path) -> None:
    put(top / "animals" / "cat" / "0.png", picture(1))
    put(top / "animals" / "dog" / "0.png", picture(2))


def _same_class(top: Path) -> None:
    make_by_folders(top)
    put(top / "test" / "a" / "0.png", picture(1))


def _a_file(top: Path) -> None:
    top.rmdir()
    put(top, b"")


def _no_validation(top: Path) -> None:
    own_folder(top / "train")
    own_folder(top / "test")


def _float(top: Path) -> None:
    Image.new("F", (12, 12)).save(top / "class 0" / "f.tiff")


BAD: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (lambda top: top.rmdir(), "cannot be listed .*No such file"),
    "a file": (_a_file, "cannot be listed .*Not a directory"),
    "empty": (lambda top: {}, "a folder of pictures for each class, but it is empty"),
    "no class folders": (lambda top: put(top / "x.png", picture(1)), "but x.png lies there without one"),
    "a pipe": (_with(lambda top: os.mkfifo(top / "class 0" / "pipe.png")), "pipe.png is no file, but a pipe"),
    "a class that is gone": (_with(lambda top: (top / "gone").symlink_to("nowhere")), "gone is a link to what is not"),
    "empty class": (_with(lambda top: (top / "nothing").mkdir()), "class .*nothing has no pictures"),
    "no pictures": (_with(lambda top: put(top / "texts" / "a.txt", b"x")), r"texts has no pictures \(.png"),
    "corrupt": (_with(lambda top: put(top / "class 0" / "x.jpg", b"x")), "x.jpg cannot be read as a picture"),
    "empty file": (_with(lambda top: put(top / "class 0" / "x.png", b"")), "x.png cannot be read as a picture"),
    "cut short": (_with(lambda top: put(top / "class 0" / "x.png", picture(1)[:45])), "x.png cannot be read"),
    "a folder named as a picture": (_with(lambda top: (top / "class 0" / "d.png").mkdir()), ""),
    "dangling link": (_with(_dangling), "0.png cannot be read .No such file"),
    "loop": (_with(_loop), "again is a link to a folder that it lies in"),
    "nested": (_with(_nested), "animals has pictures in several folders, such as animals/cat and animals/dog"),
    "class in train and test": (_same_class, "class 'a' is in both .*train and .*test, .*; put all class folders into"),
    "no validation": (_no_validation, "has train, test, but nothing for validation"),
    "one picture": (lambda top: put(top / "class" / "0.png", picture(1)), "leaves no class for train"),
    "float pixels": (_with(_float), "f.tiff cannot be read .*floating-point"),
    "split file, bytes": (_bad_utf8, "split.csv cannot be read"),
    "split file, class": (_split_lines("cat,train\n"), "names the class 'cat', which has no folder; there are class 0"),
    "split file, split": (_split_lines("class 0,dev\n"), "line 1: expected class,split .* but 'class 0,dev' came"),
    "split file, twice": (_split_lines("class 0,train\nclass 0,test\n"), "line 2: .*each class once"),
    "split file, no train": (_split_lines("class 0,test\n"), "leaves no class for train"),
    "missing split file": (lambda top: {"split_file": own_folder(top) / "no.csv"}, "no.csv cannot be read .*No such"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD)
def test_bad_folders_are_told_apart_in_one_line(
    make: Callable[[Path], Any], message: str, top: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = made if isinstance(made := make(top), dict) else {}
    if not message:  # nothing is amiss
        assert len(load_image_folder("train", data=top, **options)) == 6
        return
    with pytest.raises(InputError, match=message) as told:
        load_image_folder("train", data=top, **options)
    listed = [f"--split-file={path}" for path in options.values()]
    with pytest.raises(SystemExit) as stop:
        main(["train", "image-folder", "--data", str(top), *listed, "--out", str(tmp_path / "run")])
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"fewstep: {' '.join(str(told.value).split())}\n"
    assert not (tmp_path / "run").exists()


def test_what_is_odd_but_fine(top: Path) -> None:
    own_folder(top, classes=5)
    for name in ("日本語", "emoji 🙂", "ünïcode"):
        for i in range(3):
            put(top / name / "inner" / f"{i} é.PNG", picture(i))
    put(top / "class 0" / ".hidden.png", b"x")
    put(top / "class 0" / "notes.txt", b"x")
    put(top / ".DS_Store", b"x")
    put(top / "class 1" / "grey.png", picture(3, (50, 20), mode="L"))
    put(top / "class 1" / "wide.jpg", picture(3, (200, 20), kind="JPEG"))
    (top / "linked").symlink_to(put(top.parent / "elsewhere" / "0.png", picture(4)).parent, target_is_directory=True)
    names: set[str] = set()
    for split in ("train", "validation", "test"):
        names |= set(load_image_folder(split, data=top, size=8).names)
    assert {"日本語", "emoji 🙂", "ünïcode", "linked"} < names
    assert len(names) == 9


def test_a_class_without_a_readable_picture_is_named(top: Path) -> None:
    own_folder(top, classes=5)
    for i in range(3):
        put(top / "class 0" / f"{i}.png", b"broken")
    listed = put(top.parent / "split.csv", b"class 0,train\n")
    with pytest.raises(InputError, match="the class 'class 0' has no readable pictures"):
        load_image_folder("train", data=top, size=8, split_file=listed, skip_unreadable=True)


def test_unreadable_pictures_are_named_and_left_out_on_request_only(
    top: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own_folder(top, classes=5, pictures=3)
    for name in range(5):
        put(top / f"class {name}" / "0.png", b"broken")
    table = load_image_folder("train", data=top, size=8, skip_unreadable=True)
    assert table.counts.tolist() == [2, 2, 2]
    assert all(value % 10 in (1, 2) for value in red(table))
    told = f"3 files cannot be read as pictures: {top}/{table.names[0]}/0.png (of no kind that is read"
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"left out: {told}")
    assert all(f"{top / name / '0.png'}" in line for name in table.names)
    with pytest.raises(InputError, match=re.escape(told)):
        load_image_folder("train", data=top, size=8)
