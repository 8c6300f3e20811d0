"""Training that begins with the weights of another run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fewstep.cli import main
from fewstep.run import Run

OPTIONS = """
    --no-plan --iterations 1 --meta-batch 2 --filters 4 --validation-episodes 4 --test-episodes 4 --test-steps 1
"""


def trained(out: Path, *more: str) -> dict[str, Tensor]:
    main(["train", "glyphs-5way-1shot", *OPTIONS.split(), *more, "--out", str(out)])
    return Run(out).load_weights("model.safetensors")


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("first") / "run"
    trained(out, "--algorithm", "meta_sgd", "--meta-lr", "0.1")
    return out


def test_it_begins_with_the_last_weights_of_a_run(first: Path, tmp_path: Path) -> None:
    begun = Run(first).load_weights("model.safetensors")
    for source, folder in ((first, "run"), (first / "model.safetensors", "file")):
        now = trained(tmp_path / folder, "--algorithm", "meta_sgd", "--meta-lr", "1e-6", "--init-from", str(source))
        assert now.keys() == begun.keys(), "the learned rates too"
        assert any(not name.startswith("model.") for name in now)
        assert max((now[name] - begun[name]).abs().max() for name in now) < 1e-5  # one step of Adam away
    new = trained(tmp_path / "new", "--algorithm", "meta_sgd", "--meta-lr", "1e-6")
    assert max((new[name] - begun[name]).abs().max() for name in new) > 0.05


def test_a_head_of_other_ways_and_a_method_with_nothing_learned(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    now = trained(tmp_path / "run", "--ways", "3", "--meta-lr", "1e-6", "--init-from", str(first))
    assert now["model.head.weight"].shape[0] == 3
    begun = Run(first).load_weights("model.safetensors")
    body = [name for name in now if "head" not in name]
    assert body
    assert all(torch.allclose(now[name], begun[name], atol=1e-5) for name in body)
    assert "but for model.head.weight, model.head.bias" in capsys.readouterr().err


def test_weights_of_a_net_alone(first: Path, tmp_path: Path) -> None:
    begun = Run(first).load_weights("model.safetensors")
    net = {name.removeprefix("model."): value for name, value in begun.items() if name.startswith("model.")}
    Run(tmp_path).save_weights("net.safetensors", net)
    now = trained(tmp_path / "run", "--meta-lr", "1e-6", "--init-from", str(tmp_path / "net.safetensors"))
    assert max((now[f"model.{name}"] - net[name]).abs().max() for name in net) < 1e-5


def test_weights_are_kept_whatever_their_layout_in_memory(tmp_path: Path) -> None:
    weights = {"turned": torch.arange(6.0).view(2, 3).T, "conv": torch.rand(2, 3, 4, 4)}
    weights["conv"] = weights["conv"].to(memory_format=torch.channels_last)
    Run(tmp_path).save_weights("net.safetensors", weights)
    kept = Run(tmp_path).load_weights("net.safetensors")
    assert all(torch.equal(kept[name], value) for name, value in weights.items())


def test_what_goes_on_needs_the_other_run_no_more(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "source.safetensors"
    source.write_bytes((first / "model.safetensors").read_bytes())
    trained(tmp_path / "run", "--init-from", str(source))
    source.unlink()
    before = Run(tmp_path / "run").load_weights("model.safetensors")
    after = trained(tmp_path / "run", "--init-from", str(source), "--iterations", "2")
    assert 0 < max((after[name] - before[name]).abs().max() for name in after) < 0.01
    main(["evaluate", str(tmp_path / "run"), "--no-baselines"])
    assert Run(tmp_path / "run").read_json("evaluation.json")["begun"] == f"begun with {source}"
    assert "begun with" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("source", "more", "error"),
    [
        ("nowhere", [], "is not there"),
        ("config.json", [], "is damaged"),
        ("", ["--filters", "8"], "of another net: 'model.blocks.0.conv.weight' must be of shape [8, 1, 3, 3], but"),
        ("", ["--network", "mlp"], "must be of shape [256, 784], but it is missing; train the same net"),
    ],
)
def test_weights_of_another_net(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str, more: list[str], error: str
) -> None:
    with pytest.raises(SystemExit):
        trained(tmp_path / "run", *more, "--init-from", str(first / source))
    assert error in capsys.readouterr().err
    assert not (tmp_path / "run").exists(), "nothing is half written"


def test_what_adapts_is_an_option(first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    method = ["--algorithm", "unicorn_maml", "--meta-lr", "1e-3"]
    head = trained(tmp_path / "head", *method, "--adapt", "head.*")
    whole = trained(tmp_path / "whole", *method)
    more = trained(tmp_path / "more", *method, "--inner-steps", "2", "--adapt", "head.*")
    body = [name for name in head if name.endswith("conv.weight")]
    assert all(torch.allclose(head[name], whole[name], atol=1e-6) for name in body), (
        "one step: tests/test_methods_single"
    )
    assert not all(torch.allclose(more[name], whole[name], atol=1e-6) for name in body)
    with pytest.raises(SystemExit):
        trained(tmp_path / "wrong", "--adapt", "tail.*")
    assert "the pattern 'tail.*' matches no trainable parameter; there are: blocks.0" in capsys.readouterr().err
    assert not (tmp_path / "wrong").exists()


def test_one_way_to_begin(first: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "miniimagenet-5way-1shot", "--warm-up", "3", "--init-from", str(first), "--out", "unused"])
    assert "give one" in capsys.readouterr().err
