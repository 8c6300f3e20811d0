"""Own pictures from the command line: train, adapt to other classes, predict, compare, export."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn

from fewstep.classifier import Classifier, adapt_run
from fewstep.cli import main
from fewstep.commands import recipe_of, train_run
from fewstep.comparison import Difference
from fewstep.data.decode import Form, decoded_now
from fewstep.data.files import below
from fewstep.errors import InputError
from fewstep.export import export
from fewstep.heads import Head
from fewstep.predict import predict
from fewstep.recipes.pictures import _loaded
from fewstep.run import Run

QUICK = "--iterations 6 --check-every 2 --keep 2 --no-plan --ways 3 --queries 2 --test-queries 2 --size 16 --grey"
LESS = "--filters 8 --validation-episodes 20 --test-episodes 20 --test-steps 2 --inner-steps 1 --inner-lr 0.1"


def draw(path: Path, kind: int, number: int) -> None:
    """A picture of a class: a few bars whose places tell the class."""
    picture = Image.new("L", (24, 24), 255)
    pen = ImageDraw.Draw(picture)
    random = np.random.default_rng(kind)
    for _ in range(3):
        x, y = random.integers(2, 18, 2) + np.random.default_rng(number).integers(-1, 2, 2)
        pen.rectangle((x, y, x + 8 * int(random.integers(2)) + 2, y + 8), fill=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 20 classes, a trained run, and folders of examples of new classes."""
    top = tmp_path_factory.mktemp("own")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWSTEP_CACHE", str(top / "cache"))
        for kind in range(20):
            for number in range(5):
                draw(top / "pictures" / f"kind {kind}" / f"{number}.png", kind, number)
        for ways in (3, 4):
            for kind in range(ways):
                for number in range(1 + kind):
                    draw(top / f"support{ways}" / f"new {kind}" / f"{number}.png", 100 + kind, number)
        for kind in range(4):
            for number in range(10, 13):
                draw(top / "queries" / f"{kind}-{number}.png", 100 + kind, number)
        main(["train", "image-folder", "--data", str(top / "pictures"), *QUICK.split(), *LESS.split(),
              "--out", str(top / "run")])  # fmt: skip
    return top


def test_the_four_commands(world: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run, adapted = world / "run", world / "adapted"
    main(["evaluate", str(run), "--no-baselines"])
    assert json.loads((run / "evaluation.json").read_text())["protocol"]["ways"] == 3
    main(["adapt", str(run), "--support", str(world / "support4"), "--out", str(adapted)])
    assert "4 classes, 0 steps, head: prototypes" in capsys.readouterr().out
    main(["predict", str(adapted), str(world / "queries"), "--format", "json"])
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 12
    assert all(abs(sum(row["probabilities"].values()) - 1) < 1e-4 for row in rows)
    right = [row["class"] == f"new {Path(row['file']).name[0]}" for row in rows]
    assert sum(right) >= 9  # bars in other places are easy to tell apart
    main(["predict", str(adapted), str(world / "queries" / "0-10.png"), "--format", "csv"])
    (row,) = csv.DictReader(capsys.readouterr().out.splitlines())
    assert float(row["probability"]) == max(float(row[f"new {kind}"]) for kind in range(4))
    monkeypatch.chdir(world / "queries")
    main(["predict", str(adapted), "0-10.png"])
    assert "0-10.png" in capsys.readouterr().out


@pytest.mark.parametrize("head", ["trained", "prototypes", "zero"])
@pytest.mark.parametrize("normalisation", ["support", "batch"])
def test_what_is_saved_answers_as_before(world: Path, tmp_path: Path, head: str, normalisation: str) -> None:
    made = adapt_run(world / "run", world / "support3", head=head, normalisation=normalisation)  # type: ignore[arg-type]
    assert made.about["head"] == head
    made.save(tmp_path)
    again = Classifier.load(tmp_path)
    images, _ = decoded_now(below(world / "queries"), made.form)
    assert torch.equal(made.logits(images), again.logits(images))
    in_pairs = torch.cat([again.logits(pair) for pair in torch.split(images, 2)])
    alike = torch.allclose(in_pairs, again.logits(images), atol=1e-5)
    assert alike == (normalisation == "support")  # by the batch, answers depend on what else is asked


def test_adapting_equals_the_learner_in_code(world: Path) -> None:
    made = adapt_run(world / "run", world / "support3", steps=3)
    _, recipe = recipe_of(run := Run(world / "run"))
    learner = recipe.learner()
    run.restore("best.safetensors", learner)
    learner.normalisation = "support"
    images, _ = decoded_now(below(world / "support3"), Form(16, 1, crop=True))
    support = images.float() / 255, torch.tensor([0, 1, 1, 2, 2, 2])
    queries, _ = decoded_now(below(world / "queries"), Form(16, 1, crop=True))
    assert torch.equal(learner.adapt(support, 3)(queries.float() / 255), made.logits(queries))
    assert made.about["support"] == {"new 0": 1, "new 1": 2, "new 2": 3}


def test_without_inner_steps_only_prototypes_learn(world: Path) -> None:
    assert adapt_run(world / "run", world / "support3", head="prototypes", steps=0).about["steps"] == 0
    heads: tuple[Head, ...] = ("trained", "zero")
    for head in heads:
        with pytest.raises(InputError, match=f"but --head {head} came; take --head prototypes, or --steps 1 at least"):
            adapt_run(world / "run", world / "support3", head=head, steps=0)


def test_a_terminal_without_the_letters_of_the_answer(world: Path, tmp_path: Path) -> None:
    adapt_run(world / "run", world / "support3").save(tmp_path)
    shutil.copy(world / "queries" / "0-10.png", tmp_path / "\xe4pfel.png")
    command = [sys.executable, "-m", "fewstep", "predict", str(tmp_path), str(tmp_path / "\xe4pfel.png")]
    plain = {**os.environ, "PYTHONIOENCODING": "ascii:strict"}
    done = subprocess.run(command, env=plain, capture_output=True, text=True, check=True)
    assert "\\xe4pfel.png" in "".join(done.stdout.split())


def test_a_folder_that_was_changed_since_training(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures, run = shutil.copytree(world / "pictures", tmp_path / "pictures"), str(tmp_path / "run")
    train = ["train", "image-folder", "--data", str(pictures), *QUICK.split(), *LESS.split(), "--out", run]
    main(train)
    before = json.loads((tmp_path / "run" / "classes.json").read_text())
    assert [len(before[split]) for split in ("train", "validation", "test")] == [13, 3, 4]
    draw(pictures / "kind 0 too" / "0.png", 0, 0)
    _loaded.cache_clear()  # as in another process
    judge = ["evaluate", run, "--no-baselines", "--episodes", "2"]
    for command in (train, judge, ["compare", run, run]):
        told = fails(capsys, *command)
        assert re.search(r"was begun: 'kind .*' is (no more|new) in (train|validation|test), .*, perhaps more", told)
        assert "what was trained on must not be judged on" in told
    shutil.rmtree(pictures / "kind 0 too")
    _loaded.cache_clear()
    main(judge)


class Unsure(nn.Module):
    """Decides by the pictures what to compute."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1)[:, :4] if x.sum() > 0 else x.flatten(1)[:, 4:8]


def test_exports_answer_as_the_classifier(world: Path, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    made = adapt_run(world / "run", world / "support4")
    images, _ = decoded_now(below(world / "queries"), made.form)
    x = images.float() / 255
    expected = made.logits(images).softmax(1)
    program = torch.export.load(export(made, tmp_path / "deep" / "net.pt2")).module()
    session = onnxruntime.InferenceSession(export(made, tmp_path / "net.onnx"))
    for some in (x, x[:1], x[:5]):
        assert torch.allclose(program(some), expected[: len(some)], atol=1e-5)
        (answers,) = session.run(None, {"images": some.numpy()})
        assert np.allclose(answers, expected[: len(some)].numpy(), atol=1e-5)
    inverted = replace(made, form=replace(made.form, invert=True))  # as for characters
    dark, _ = decoded_now(below(world / "queries"), inverted.form)
    program = torch.export.load(export(inverted, tmp_path / "inverted.pt2")).module()
    assert torch.allclose(program(x), inverted.logits(dark).softmax(1), atol=1e-5)
    assert not torch.allclose(program(x), expected, atol=1e-2)
    with pytest.raises(InputError, match=r"torch.export cannot take this network for any number of pictures: "):
        export(replace(made, model=Unsure()), tmp_path / "unsure.pt2")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"net.pt2 cannot be written .*; choose another --out"):
        export(made, tmp_path / "file" / "net.pt2")
    with pytest.raises(InputError, match=r"must end in .pt2"):
        export(made, tmp_path / "net.h5")
    transductive = adapt_run(world / "run", world / "support4", normalisation="batch")
    with pytest.raises(InputError, match="adapt anew with --normalisation support"):
        export(transductive, tmp_path / "net.onnx")


def test_all_protocols_in_one_table(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = fails(capsys, "evaluate", str(world / "run"), "--all-protocols", "--normalisation", "support")
    assert "leave out --normalisation" in told
    main(["evaluate", str(world / "run"), "--all-protocols", "--episodes", "30"])
    out = capsys.readouterr().out
    content = json.loads((world / "run" / "protocols.json").read_text())
    assert len(content["protocols"]) == 7
    assert [entry["episodes"] for entry in content["protocols"]] == [30] * 7
    assert {entry["protocol"]["queries_per_class"] for entry in content["protocols"]} == {1, 4}
    (ensemble,) = (entry for entry in content["protocols"] if "checkpoints" in entry["protocol"])
    assert ensemble["protocol"]["checkpoints"] == "mean logits of the 2 best checkpoints"
    assert "checkpoints" in out
    kinds = [str(entry["protocol"]) for entry in content["protocols"]]
    assert len(set(kinds)) == 7
    main(["evaluate", str(world / "run"), "--all-protocols", "--episodes", "2", "--weights", "model"])
    assert "2 last checkpoints" in (world / "run" / "protocols.json").read_text()
    kept = sorted((world / "run" / "checkpoints").iterdir(), key=lambda path: int(path.stem))
    before = kept[-2].read_bytes()
    kept[-2].unlink()  # as in runs of before the last ones were kept
    main(["evaluate", str(world / "run"), "--all-protocols", "--episodes", "2", "--weights", "model"])
    assert "last checkpoints" not in (world / "run" / "protocols.json").read_text()
    kept[-2].write_bytes(before)


def test_other_test_tasks_than_in_training(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = world / "run"
    main(["evaluate", str(run), "--no-baselines"])
    before = (run / "evaluation.json").read_text()
    main(["evaluate", str(run), "--shots", "2", "--queries", "1", "--steps", "1", "--first-only", "--no-baselines"])
    assert (run / "evaluation.json").read_text() == before
    found = json.loads((run / "evaluation-shots-2-queries-1-steps-1.json").read_text())
    about = found["protocol"]
    assert (about["ways"], about["shots"], about["queries_per_class"], len(found["by_step"])) == (3, 2, 1, 2)
    assert "head" not in about
    main(["evaluate", str(run), "--ways", "4", "--first-only"])
    found = json.loads((run / "evaluation-ways-4.json").read_text())
    assert (found["protocol"]["ways"], found["protocol"]["head"], len(found["by_step"])) == (4, "prototypes", 1)
    about = found["protocol"]
    assert (about["trained_on_ways"], about["inner_lr"], found["baselines"]) == (3, None, {})
    (judged,) = found["by_step"]
    assert judged["mean"] > 0.35, "prototypes of features tell the classes apart"
    main(["evaluate", str(run), "--ways", "4", "--steps", "2", "--all-protocols", "--episodes", "4"])
    found = json.loads((run / "protocols-ways-4-steps-2.json").read_text())
    assert {(each["protocol"]["ways"], each["by_step"][-1]["step"]) for each in found["protocols"]} == {(4, 2)}
    assert "test: 5 ways asked of 4 classes" in fails(capsys, "evaluate", str(run), "--ways", "5")
    assert "--steps must be at least 0, but -1 came" in fails(capsys, "evaluate", str(run), "--steps", "-1")
    assert "test: 0 ways" in fails(capsys, "evaluate", str(run), "--ways", "0")
    main(["evaluate", str(run), "--shots", "3", "--all-protocols", "--episodes", "2"])  # leaves 2 of 5 pictures to ask
    found = json.loads((run / "protocols-shots-3.json").read_text())
    assert {each["protocol"]["queries_per_class"] for each in found["protocols"]} == {2}
    assert f"{run} is a run of training, not a classifier" in fails(capsys, "predict", str(run), str(run))
    assert "File name too long" in fails(capsys, "predict", "x" * 300, "y")
    told = fails(capsys, "evaluate", str(run), "--all-protocols", "--queries", "2")
    assert "leave out --normalisation, --first-only and --queries" in told
    assert "is a run of sinusoid, not of classification; leave out --shots" in fails(
        capsys, "evaluate", _sinusoid(tmp_path), "--shots", "5"
    )


def test_other_steps_change_no_baseline(tmp_path: Path) -> None:
    run = _sinusoid(tmp_path, "--no-ablations", "--pretrain-iterations", "2", "--test-episodes", "4")
    main(["evaluate", run, "--first-only"])
    files = {path: path.read_bytes() for path in sorted((Path(run) / "baselines").glob("*.*"))}
    assert files
    main(["evaluate", run, "--first-only", "--steps", "3"])
    assert all(path.read_bytes() == before for path, before in files.items()), "they are not trained anew"
    found = json.loads((Path(run) / "evaluation-steps-3.json").read_text())
    (pretrained,) = (line for name, line in found["baselines"].items() if "pre-trained" in name)
    assert [point["step"] for point in pretrained["by_step"]] == [0, 1, 2, 3]
    main(["evaluate", run, "--first-only", "--steps", "0"])
    assert json.loads((Path(run) / "evaluation-steps-0.json").read_text())["baselines"] == {}


def test_a_residual_net_warmed_up_on_augmented_pictures(world: Path, tmp_path: Path) -> None:
    more = "--network resnet12 --warm-up 3 --augment --iterations 1 --inner-lr 0.01"
    arguments = [
        "train",
        "image-folder",
        "--data",
        str(world / "pictures"),
        *QUICK.split(),
        *LESS.split(),
        *more.split(),
    ]
    main([*arguments, "--out", str(tmp_path)])
    warm = Run(tmp_path).load_weights("baselines/pre-trained-on-all-classes--fine-tuned.safetensors")
    now = Run(tmp_path).load_weights("model.safetensors")
    assert int(warm["blocks.0.norms.0.num_batches_tracked"]) == 3
    moved = [(now[f"model.{name}"] - value).abs().max() for name, value in warm.items() if name.endswith("weight")]
    assert 0 < max(moved) < 0.01  # one step of Adam away from where the warm-up ended
    main(["evaluate", str(tmp_path), "--all-protocols", "--episodes", "4"])
    kinds = [entry["protocol"] for entry in json.loads((tmp_path / "protocols.json").read_text())["protocols"]]
    assert kinds[-1]["augmentation"] == "the support set and 4 changed copies of it"


NETS = '''
from torch import nn

class Block(nn.Module):
    """As in torchvision: in-place ReLUs, a shortcut that is added in place."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += self.downsample(x)
        return self.relu(out)

def small(num_classes=1000):
    body = [Block(1, 4, 2), Block(4, 8, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1)]
    return nn.Sequential(*body, nn.Linear(8, num_classes))

def none(num_classes=1000):
    return num_classes
'''


def test_a_net_handed_in_goes_all_the_way(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nets_of_mine.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    train = ["train", "image-folder", "--data", str(world / "pictures"), *QUICK.split(), *LESS.split()]
    main([*train, "--network", "nets_of_mine:small", "--warm-up", "3", "--inner-lr", "0.01", "--out", "run"])
    warm = Run(Path("run")).load_weights("baselines/pre-trained-on-all-classes--fine-tuned.safetensors")
    assert int(warm["0.bn1.num_batches_tracked"]) == 3
    main(["evaluate", "run"])
    main(["adapt", "run", "--support", str(world / "support4"), "--out", "adapted"])
    capsys.readouterr()
    main(["predict", "adapted", str(world / "support4"), "--format", "json"])
    found = json.loads(capsys.readouterr().out)
    assert {len(row["probabilities"]) for row in found} == {4}
    for network, message in {
        "nets_of_mine:large": "there is no network 'nets_of_mine:large'",
        "nets_of_mine:none": "(TypeError: it gives a int, not a torch.nn.Module)",
        "nets_of_mine:Block": "Block(num_classes=3) is no net that tells 3 classes apart by pictures [1, 16, 16]",
        "resnet": "--network must be conv, mlp, resnet12 or MODULE:FUNCTION",
    }.items():
        assert message in fails(capsys, *train, "--network", network, "--out", "other")
        assert not Path("other").exists()


def test_too_few_classes_for_the_ways(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = fails(capsys, "train", "image-folder", "--data", str(world / "pictures"), "--ways", "7", "--queries", "2")
    assert "7 ways asked of" in told
    assert "or say in a --split-file which are for what" in told


def test_a_net_of_ones_own_is_not_saved_as_a_recipes(tmp_path: Path) -> None:
    own = Classifier(torch.nn.Flatten(), ("a", "b"), Form(8), {"normalisation": "support"})
    with pytest.raises(InputError, match="only a net of a recipe can be made again from a file"):
        own.save(tmp_path / "adapted")
    assert not (tmp_path / "adapted").exists()


def test_two_runs_on_the_same_tasks(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    many = ["--episodes", "30"]
    other = ["--data", str(world / "pictures"), *QUICK.split(), *LESS.split()]
    main(["train", "image-folder", *other, "--seed", "1", "--out", str(tmp_path / "other")])
    capsys.readouterr()
    main(["compare", str(world / "run"), str(tmp_path / "other"), *many])
    out = capsys.readouterr().out
    assert "difference" in out
    main(["train", "image-folder", *other, "--split-seed", "1", "--iterations", "2", "--out", str(tmp_path / "split")])
    assert "or their data differ" in fails(capsys, "compare", str(world / "run"), str(tmp_path / "split"))
    main(["compare", str(world / "run"), str(world / "run"), *many])
    assert "0.00 ± 0.00" in capsys.readouterr().out
    main(["train", "image-folder", *other, "--ways", "2", "--out", str(tmp_path / "two")])
    told = fails(capsys, "compare", str(world / "run"), str(tmp_path / "two"))
    assert "only runs on the same test tasks can be compared" in told
    main(["compare", str(world / "run"), str(tmp_path / "two"), "--ways", "2", *many])
    assert "2-way, 1-shot" in " ".join(capsys.readouterr().out.split())
    main(["train", "image-folder", *other, "--test-queries", "3", "--out", str(tmp_path / "three")])
    capsys.readouterr()
    main(["compare", str(world / "run"), str(tmp_path / "three"), *many])
    rows = [line for line in capsys.readouterr().out.splitlines() if "per class" in line]
    assert rows, "what both are judged on is compared"
    assert not any("3 queries" in row for row in rows)
    few = fails(capsys, "compare", str(world / "run"), str(tmp_path / "other"), "--episodes", "29")
    assert "a comparison needs at least 30 test tasks, but 29 came" in few


def test_methods_with_a_start_of_their_own_and_those_that_take_no_other_ways(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = ["--data", str(world / "pictures"), *QUICK.split(), *LESS.split(), "--iterations", "2"]
    for method in ("proto_maml", "unicorn_maml", "cavia", "meta_sgd"):
        main(["train", "image-folder", *other, "--algorithm", method, "--out", str(tmp_path / method)])
    made = adapt_run(tmp_path / "proto_maml", world / "support4")
    assert (made.about["head"], made.about["steps"]) == ("trained", 2)
    support = ("--support", str(world / "support4"))
    main(["adapt", str(tmp_path / "unicorn_maml"), *support, "--out", str(tmp_path / "adapted")])
    asked_of, _ = decoded_now(below(world / "queries"), made.form)
    unicorn = adapt_run(tmp_path / "unicorn_maml", world / "support4")
    assert torch.equal(Classifier.load(tmp_path / "adapted").logits(asked_of), unicorn.logits(asked_of))
    assert "takes no other number; 4 came" in fails(capsys, "adapt", str(tmp_path / "cavia"), *support)
    assert "meta_sgd cannot adapt to 4 classes by 2 steps" in fails(
        capsys, "adapt", str(tmp_path / "meta_sgd"), *support, "--head", "zero"
    )
    asked = ("--ways", "4", "--steps", "2")
    assert "meta_sgd cannot adapt to 4 classes by 2 steps" in fails(
        capsys, "evaluate", str(tmp_path / "meta_sgd"), *asked
    )
    main(["evaluate", str(tmp_path / "meta_sgd"), "--ways", "4", "--normalisation", "running"])
    assert adapt_run(tmp_path / "meta_sgd", world / "support4").about["steps"] == 0


def test_a_difference_is_that_of_pairs() -> None:
    shared = torch.randn(400, generator=torch.Generator().manual_seed(0)).double()
    found = Difference.of(shared + 0.1, shared)
    assert found.mean == pytest.approx(0.1)
    assert found.ci95 < 1e-9
    assert found.p < 1e-9
    apart = Difference.of(shared, torch.zeros(400, dtype=torch.float64))
    z = abs(float(shared.mean() / shared.std() * 20))
    assert apart.p == pytest.approx(2 - 2 * NormalDist().cdf(z))


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    return " ".join(capsys.readouterr().err.split())


def test_mistakes_are_told(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, support = str(world / "run"), str(world / "support4")
    assert "--data DIR" in fails(capsys, "train", "image-folder", "--out", str(tmp_path / "x"))
    assert "validation: 5 ways asked of 3 classes" in fails(
        capsys, "train", "image-folder", "--data", str(world / "pictures"), "--shots", "1", "--queries", "1",
        "--test-queries", "1", "--out", str(tmp_path / "x")
    )  # fmt: skip
    assert "trained for 3 classes, but 4 came" in fails(capsys, "adapt", run, "--support", support, "--head", "trained")
    assert "cannot be listed" in fails(capsys, "adapt", run, "--support", str(tmp_path / "none"))
    draw(tmp_path / "one" / "only" / "0.png", 1, 1)
    assert "2 or more classes, not 1" in fails(capsys, "adapt", run, "--support", str(tmp_path / "one"))
    assert "holds a run of training" in fails(capsys, "adapt", run, "--support", support, "--out", run)
    assert "adapted.json is not there" in fails(capsys, "predict", str(tmp_path), support)
    main(["adapt", run, "--support", support, "--out", str(tmp_path / "adapted")])
    adapted = str(tmp_path / "adapted")
    assert "none.png cannot be read" in fails(capsys, "predict", adapted, str(tmp_path / "none.png"))
    (tmp_path / "empty").mkdir()
    assert "no pictures in" in fails(capsys, "predict", adapted, str(tmp_path / "empty"))
    (tmp_path / "bad.png").write_bytes(b"no picture")
    assert "bad.png cannot be read as a picture" in fails(capsys, "predict", adapted, str(tmp_path / "bad.png"))
    found = predict(Classifier.load(Path(adapted)), [tmp_path / "bad.png", world / "queries"], "csv", skip=True)
    assert len(found.splitlines()) == 13
    assert "no run of picture classification" in fails(capsys, "adapt", _sinusoid(tmp_path), "--support", support)


def test_a_run_that_was_not_validated_yet(world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    shutil.copytree(world / "run", run)
    (run / "best.safetensors").unlink()
    adapt = ("adapt", str(run), "--support", str(world / "support3"), "--out", str(tmp_path / "adapted"))
    for command in (adapt, ("evaluate", str(run), "--no-baselines")):
        assert "has not been validated yet; train on, or use --weights model" in fails(capsys, *command)
    main([*adapt, "--weights", "model"])
    assert Classifier.load(tmp_path / "adapted").about["iterations"] == 6


def test_examples_that_cannot_be_read_are_named(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    support = tmp_path / "support"
    shutil.copytree(world / "support3", support)
    (support / "new 1" / "photo.heic").write_bytes(b"x")
    assert "photo.heic cannot be read as a picture" in fails(
        capsys, "adapt", str(world / "run"), "--support", str(support)
    )
    made = adapt_run(world / "run", support, skip=True)
    assert made.about["support"] == {"new 0": 1, "new 1": 2, "new 2": 3}
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"left out: {support}/new 1/photo.heic cannot be read as a picture (")


def test_the_table_cuts_no_name(world: Path, tmp_path: Path) -> None:
    path = tmp_path / ("long" * 20) / f"{'name' * 20}.png"
    draw(path, 100, 10)
    found = predict(adapt_run(world / "run", world / "support3"), [path])
    column = "".join(line.split("│")[1].strip() for line in found.splitlines() if "│" in line)
    assert column == str(path)


def test_the_users_own_folder(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(world))
    monkeypatch.chdir(tmp_path)
    more = ["--iterations", "1", "--out", "~/at home"]
    main(["train", "image-folder", "--data=~/pictures", *QUICK.split(), *LESS.split(), *more])
    assert Run(world / "at home").read_json("config.json")["data"] == str(world / "pictures")
    main(["evaluate", "~/at home", "--no-baselines", "--episodes", "4"])
    assert not [*tmp_path.iterdir()]
    recipe = replace(recipe_of(Run(world / "at home"))[1], data=Path("~/pictures"))  # type: ignore[call-arg]
    train_run("image-folder", recipe, world / "at home")  # goes on
    capsys.readouterr()
    assert "write the folder in full" in fails(capsys, "train", "image-folder", "--data=~nobody-here/x")


def _sinusoid(tmp_path: Path, *options: str) -> str:
    main(["train", "sinusoid", "--iterations", "2", "--no-plan", "--validation-episodes", "2", *options, "--out",
          str(tmp_path / "sinusoid")])  # fmt: skip
    return str(tmp_path / "sinusoid")
