"""Omniglot: what it decodes to, its splits, where it is found, how it is downloaded, what goes wrong."""

from __future__ import annotations

import hashlib
import threading
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fewstep.data import omniglot as module
from fewstep.data.cache import Arrays, cache_folder, cached_arrays, data_folders, fetch
from fewstep.data.omniglot import decode, find_halves, load_omniglot, open_files
from fewstep.errors import InputError

SPLITS: tuple[Literal["train", "validation", "test"], ...] = ("train", "validation", "test")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One cache for the tests with the real data, so that they are decoded once."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("FEWSTEP_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="module")
def nearest(omniglot_root: Path, cache: Path) -> Arrays:
    """All pictures, as `omniglot` leaves them in the cache."""
    load_omniglot("train", root=omniglot_root)
    (path,) = cache.glob("omniglot-nearest-*.npz")
    with np.load(path) as table:
        return dict(table)


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, no data anywhere, no server."""
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("FEWSTEP_OMNIGLOT_URL", "http://127.0.0.1:9")
    monkeypatch.delenv("FEWSTEP_DATA", raising=False)
    return tmp_path


def drawing(number: int) -> bytes:
    pixels = np.random.default_rng(number).random((105, 105)) > 0.2
    file = BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def tiny(folder: Path, drawers: int = 20) -> Path:
    """A data folder with two characters in each half, as zips."""
    folder.mkdir(parents=True, exist_ok=True)
    for half, alphabet in (("images_background", "Latin"), ("images_evaluation", "Angelic")):
        with zipfile.ZipFile(folder / f"{half}.zip", "w") as archive:
            for character in (1, 2):
                for drawer in range(1, drawers + 1):
                    name = f"{half}/{alphabet}/character{character:02}/{character:04}_{drawer:02}.png"
                    archive.writestr(name, drawing(100 * character + drawer + len(alphabet)))
            archive.writestr(f"__MACOSX/{half}/{alphabet}/character01/._0001_01.png", b"no picture")
    return folder


def table(root: Path | None, download: bool = False, variant: str = "nearest") -> Arrays:
    with open_files(find_halves(root, download)) as files:
        return decode(files, variant, characters=4)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A server of the tiny data, and its folder."""
    folder = tiny(tmp_path / "served")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as http:
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}", folder
        http.shutdown()
        thread.join()


def md5(path: Path) -> str:
    return "md5:" + hashlib.md5(path.read_bytes()).hexdigest()


def test_nearest_is_what_the_authors_feed(nearest: Arrays, omniglot_root: Path) -> None:
    with np.load(omniglot_root / "omniglot28_nearest_bits.npz") as reference:
        bits = np.unpackbits(reference["images_packed"], axis=-1).reshape(1623, 20, 28, 28)
        row = {str(name): i for i, name in enumerate(reference["names"])}
    expected = bits[[row[str(name)] for name in nearest["names"]]] * 255
    assert np.array_equal(nearest["images"], expected)
    assert list(nearest["names"]) == sorted(row)


def test_authors_splits(omniglot_root: Path, nearest: Arrays) -> None:
    parts = {split: load_omniglot(split, root=omniglot_root) for split in SPLITS}
    assert [tuple(part.shape) for part in parts.values()] == [(n, 20, 1, 28, 28) for n in (1100, 100, 423)]
    assert all(part.dtype == torch.uint8 for part in parts.values())
    digests = [{picture.numpy().tobytes() for picture in part} for part in parts.values()]
    assert len(set.union(*digests)) == 1623  # distinct pictures, so distinct characters: no split shares one
    assert set.union(*digests) == {picture.tobytes() for picture in nearest["images"]}
    assert not torch.equal(parts["validation"], load_omniglot("validation", root=omniglot_root, split_seed=2))


def test_vinyals_splits(omniglot_root: Path, nearest: Arrays) -> None:
    parts = [load_omniglot(split, splits="vinyals", root=omniglot_root) for split in SPLITS]
    assert [len(part) for part in parts] == [4 * 1028, 4 * 172, 4 * 423]
    upright = [{picture.numpy().tobytes() for picture in part[::4]} for part in parts]
    assert set.union(*upright) == {picture.tobytes() for picture in nearest["images"]}
    part: Tensor = parts[1]
    for quarter in range(4):
        turned = np.asarray(Image.fromarray(part[8, 3, 0].numpy()).rotate(90 * quarter))
        assert np.array_equal(part[8 + quarter, 3, 0].numpy(), turned)


def test_antialias_is_graded(omniglot_root: Path, nearest: Arrays) -> None:
    with open_files(find_halves(omniglot_root, download=False)) as files:
        some = {name: value for name, value in files.items() if name.startswith(("Greek/", "Tibetan/"))}
        table = decode(some, "antialias", characters=24 + 42)
        drawn = Image.open(BytesIO(some["Greek/character05/0398_03.png"].read())).convert("L")
    sharp = nearest["images"][np.isin(nearest["names"], table["names"])]
    expected = 255 - np.asarray(drawn.resize((28, 28), Image.Resampling.LANCZOS))
    assert np.array_equal(table["images"][4, 2], expected)
    assert np.unique(sharp).tolist() == [0, 255]
    assert len(np.unique(table["images"])) > 100
    agree = ((table["images"] > 127) == (sharp > 127)).mean()  # the same drawings, stroke bright in both
    assert 0.9 < agree < 1


def test_decoded_once(omniglot_root: Path, cache: Path, nearest: Arrays, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = load_omniglot("test", root=omniglot_root)
    monkeypatch.setattr(module, "decode", lambda *_: pytest.fail("decoded again"))
    assert torch.equal(load_omniglot("test", root=omniglot_root), expected)
    assert not list(cache.glob("*.part"))


def test_folder_reads_as_zip(bare: Path) -> None:
    zips, folders = tiny(bare / "zips"), bare / "folders"
    for path in zips.glob("*.zip"):
        with zipfile.ZipFile(path) as archive:
            archive.extractall(folders)
    for variant in ("nearest", "antialias"):
        one, other = table(zips, variant=variant), table(folders, variant=variant)
        assert np.array_equal(one["images"], other["images"])
        assert list(one["names"]) == list(other["names"])
        assert list(one["names"]) == [f"{a}/character0{n}" for a in ("Angelic", "Latin") for n in (1, 2)]


@pytest.mark.parametrize("inner", ["omniglot", "."])
def test_environment_names_the_folder(bare: Path, monkeypatch: pytest.MonkeyPatch, inner: str) -> None:
    monkeypatch.setenv("FEWSTEP_DATA", str(bare / "data"))
    folder = tiny(bare / "data" / inner)
    assert [half.parent.resolve() for half in find_halves(None, download=False)] == [folder.resolve()] * 2


def test_download(bare: Path, server: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    url, folder = server
    monkeypatch.setenv("FEWSTEP_OMNIGLOT_URL", url + "/")
    monkeypatch.setattr(module, "HALVES", {name: md5(folder / f"{name}.zip") for name in module.HALVES})
    assert np.array_equal(table(None, download=True)["images"], table(folder)["images"])
    monkeypatch.setenv("FEWSTEP_OMNIGLOT_URL", "http://127.0.0.1:9")
    assert len(table(None, download=True)["images"]) == 4  # not downloaded again
    assert sorted(path.name for path in (cache_folder() / "omniglot").iterdir()) == [
        "images_background.zip",
        "images_evaluation.zip",
    ]
    with pytest.raises(InputError, match="expected 1623 characters of 20 drawings, got 4 characters"):
        load_omniglot("train")


def test_download_of_the_vinyals_lists(bare: Path, server: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    url, folder = server
    listed = folder / "splits_vinyals" / "val.txt"
    listed.parent.mkdir()
    listed.write_text("Latin/character02/rot090\nAngelic/character01/rot000\n", encoding="utf-8")
    monkeypatch.setenv("FEWSTEP_OMNIGLOT_URL", url)
    monkeypatch.setattr(module, "VINYALS", {"val": "sha256:" + hashlib.sha256(listed.read_bytes()).hexdigest()})
    monkeypatch.setattr(module, "decode", partial(decode, characters=4))
    root = tiny(bare / "mine")
    images = torch.from_numpy(table(root)["images"])[:, :, None]
    found = load_omniglot("validation", splits="vinyals", root=root)
    assert torch.equal(found, torch.stack([torch.rot90(images[3], 1, (-2, -1)), images[0]]))
    with pytest.raises(InputError, match=r"no splits_vinyals/train\.txt in .*; put it there"):
        load_omniglot("train", splits="vinyals", root=root, download=False)


def test_wrong_hash(bare: Path, server: tuple[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_OMNIGLOT_URL", server[0])
    with pytest.raises(InputError, match=r"images_background\.zip could not be downloaded .*hash") as raised:
        load_omniglot("train")
    assert "\n" not in str(raised.value)
    assert not list((cache_folder() / "omniglot").iterdir())


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "nonsense://host", None])
def test_no_server(bare: Path, server: tuple[str, Path], url: str | None) -> None:
    with pytest.raises(InputError, match=r"could not be downloaded .* FEWSTEP_DATA") as raised:
        fetch(f"{url or server[0]}/absent.zip", "md5:0", bare / "down")
    assert "\n" not in str(raised.value)


def test_missing(bare: Path) -> None:
    with pytest.raises(InputError, match=r"no Omniglot in .*cache/omniglot; .*FEWSTEP_DATA.*http://127.0.0.1:9"):
        load_omniglot("train", download=False)
    with pytest.raises(InputError, match="no Omniglot in"):  # a folder was named: nothing is downloaded instead
        load_omniglot("train", root=bare)
    with pytest.raises(InputError, match=r"root names .*absent, which is no folder"):
        load_omniglot("train", root=bare / "absent")
    (tiny(bare / "half") / "images_evaluation.zip").unlink()
    with pytest.raises(InputError, match=r"holds images_background\.zip alone"):
        load_omniglot("train", root=bare / "half")


def test_environment_names_no_folder(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEWSTEP_DATA", str(bare / "absent"))
    with pytest.raises(InputError, match=r"\$FEWSTEP_DATA names .*absent, which is no folder"):
        data_folders("omniglot")


@pytest.mark.parametrize("damage", ["cut", "byte"])
def test_damaged_zip(bare: Path, damage: str) -> None:
    path = tiny(bare / "mine") / "images_evaluation.zip"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 255
    path.write_bytes(content[:-100] if damage == "cut" else content)
    with pytest.raises(InputError, match=r"images_evaluation\.zip is damaged .*; delete it, or download it again"):
        table(path.parent)


def test_damaged_picture(bare: Path) -> None:
    folder = bare / "mine"
    for path in tiny(bare / "zips").glob("*.zip"):
        with zipfile.ZipFile(path) as archive:
            archive.extractall(folder)
    picture = folder / "images_evaluation" / "Angelic" / "character02" / "0002_07.png"
    picture.write_bytes(picture.read_bytes()[:100])
    with pytest.raises(InputError, match=r"0002_07\.png is damaged"):
        table(folder)


def test_incomplete(bare: Path) -> None:
    with pytest.raises(InputError, match="expected 1623 characters of 20 drawings, got 4 characters"):
        load_omniglot("train", root=tiny(bare / "few"))
    with pytest.raises(InputError, match="got 19 drawings of Angelic/character01"):
        table(tiny(bare / "fewer", drawers=19))


@pytest.mark.parametrize("option", ["split", "variant", "splits"])
def test_unknown_option(option: str) -> None:
    options: dict[str, Any] = {"split": "train", option: "other"}
    with pytest.raises(InputError, match=f"{option} must be '.*' or '.*', but 'other' came"):
        load_omniglot(**options)


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut", None])
def test_unreadable_cache_is_built_again(bare: Path, content: bytes | None) -> None:
    def build() -> Arrays:
        built.append(1)
        return {"a": np.arange(5000), "b": np.ones(3)}

    built: list[int] = []
    for _ in range(2):
        assert np.array_equal(cached_arrays("some", ("a", "b"), "recipe", build)["a"], np.arange(5000))
    (path,) = cache_folder().iterdir()
    assert len(built) == 1
    path.write_bytes(path.read_bytes()[:-200] if content is None else content)
    for _ in range(2):
        assert np.array_equal(cached_arrays("some", ("a", "b"), "recipe", build)["b"], np.ones(3))
    assert len(built) == 2
    cached_arrays("some", ("a", "b"), "another recipe", build)
    assert len(built) == 3
    assert len(list(cache_folder().iterdir())) == 2  # and nothing half-written


def test_two_may_build_at_once(bare: Path) -> None:
    both = threading.Barrier(2, timeout=10)

    def build() -> Arrays:
        both.wait()
        return {"a": np.arange(100_000)}

    with ThreadPoolExecutor(2) as pool:
        tables = list(pool.map(lambda _: cached_arrays("some", ("a",), 0, build)["a"], range(2)))
    assert np.array_equal(tables[0], tables[1])
    (path,) = cache_folder().iterdir()
    with np.load(path) as archive:
        assert np.array_equal(archive["a"], tables[0])


def test_cache_that_cannot_be_written(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (bare / "file").write_text("")
    monkeypatch.setenv("FEWSTEP_CACHE", str(bare / "file"))
    with pytest.warns(UserWarning, match="cannot be written .* set FEWSTEP_CACHE"):
        assert cached_arrays("some", ("a",), 0, lambda: {"a": np.ones(2)})["a"].sum() == 2


def test_nothing_is_left_of_a_failed_write(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez_compressed", fail)
    with pytest.warns(UserWarning, match="disk full"):
        cached_arrays("some", ("a",), 0, lambda: {"a": np.ones(2)})
    assert not list(cache_folder().iterdir())
