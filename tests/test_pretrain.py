"""Training a classifier of all classes: it goes on from where it was stopped."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.baselines import pretrain_on_classes, trained_net
from fewstep.errors import InputError
from fewstep.recipes import RECIPES
from fewstep.recipes.classification import ClassificationRecipe
from fewstep.run import Run
from tests.reference import relative_error


class Counted(nn.Module):
    """A classifier that counts its batches, and may be stopped at one of them."""

    def __init__(self, stop_at: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.BatchNorm1d(3))
        self.stop_at, self.batches = stop_at, 0

    def forward(self, x: Tensor) -> Tensor:
        self.batches += 1
        if self.batches == self.stop_at:
            raise KeyboardInterrupt
        out: Tensor = self.net(x)
        return out


def train(model: nn.Module, run: Run | None = None, **options: Any) -> nn.Module:
    images = (torch.arange(3 * 5 * 16) % 251).to(torch.uint8).view(3, 5, 1, 4, 4)
    pretrain_on_classes(model, images, **{"iterations": 7, "seed": 0, "batch": 4, **options}, run=run, save_every=2)
    return model


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_what_is_stopped_goes_on_to_the_same_net(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, run = train(Counted()), Run(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        train(Counted(stop_at=6), run)
    again = Counted()
    assert same(train(again, run), whole)
    assert again.batches == 3, "the four that were saved are not taken again"
    assert '{"step": 6, "seconds": ' in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [{"seed": 1}, {"rotate": True}, {"lr": 0.1}, {"batch": 5}, {"iterations": 5}, {"precision": "bfloat16"}],
    ids=str,
)
def test_other_settings_start_anew(options: dict[str, Any], tmp_path: Path) -> None:
    train(Counted(), Run(tmp_path))
    other = Counted()
    assert same(train(other, Run(tmp_path), **options), train(Counted(), **options))
    assert other.batches == options.get("iterations", 7)


def test_bfloat16_is_for_the_features_and_leaves_weights_in_float32() -> None:
    full, half = train(Counted()), train(Counted(), precision="bfloat16")
    weights, wanted = half.get_parameter("net.1.weight"), full.get_parameter("net.1.weight")
    assert weights.dtype == torch.float32
    assert 1e-6 < relative_error(weights, wanted) < 3e-2


def test_a_recipe_trains_its_baseline_in_the_precision_that_is_asked_for(tmp_path: Path) -> None:
    named = RECIPES["glyphs-5way-1shot"]
    assert isinstance(named, ClassificationRecipe)
    recipe = replace(named, pretrain_iterations=2)
    half = replace(recipe, pretrain_precision="bfloat16")
    nets = [trained_net(one.baselines()[0], Run(tmp_path))[0] for one in (recipe, half, half, recipe)]
    assert [same(nets[0], net) for net in nets] == [True, False, False, True], "the net of other settings is not taken"
    assert same(nets[1], nets[2])


def test_other_pictures_or_another_net_start_anew(tmp_path: Path) -> None:
    run, images = Run(tmp_path), torch.zeros(3, 5, 1, 4, 4, dtype=torch.uint8)
    train(Counted(), run)
    found = []
    for place in (run, None):
        model = Counted()
        pretrain_on_classes(model, images, iterations=7, seed=0, batch=4, run=place)
        found.append(model)
    assert same(*found)
    wider = Counted()
    wider.net[1], wider.net[2] = nn.Linear(16, 4), nn.BatchNorm1d(4)
    train(wider, run)
    assert wider.batches == 7


def test_the_last_layer_goes_by_directions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    train(model)
    x = torch.rand(5, 1, 4, 4)
    assert torch.allclose(model(1000 * x), model(x), atol=1e-5)
    assert model(x).abs().max() <= 10


def test_the_folder_of_another_training_is_left_alone(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.save_state({"step": 3, "learner": {}})
    with pytest.raises(InputError, match="holds the checkpoint of another kind of training; give another folder"):
        train(Counted(), run)


def test_the_rate_rises_for_a_tenth_and_falls_to_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: rates.append(self.param_groups[0]["lr"]))
    train(Counted(), iterations=19, lr=1.0)
    halves = [(1 + math.cos(math.pi * step / 20)) / 2 for step in range(1, 20)]
    assert rates == pytest.approx([halves[0] / 2, *halves[1:]])
