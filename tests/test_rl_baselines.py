"""What a meta-learned policy is compared with: trained as a run is, with a log, from a checkpoint, over processes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from fewstep import Learner, Task
from fewstep.baselines import trained_net
from fewstep.distributed import is_first, joined
from fewstep.judge import contenders_of
from fewstep.meta_step import MetaStep
from fewstep.recipes import RECIPES
from fewstep.recipes.policies import PolicyRecipe
from fewstep.rl import TRPO, Ascent, Explorer, TrustRegion
from fewstep.rl.environments import Navigation, Trials
from fewstep.rl.surrogates import Clipped, likelihood_ratio
from fewstep.run import Run
from fewstep.train import train
from fewstep.updates import SGD
from tests.reference import relative_error
from tests.test_distributed import on_ranks

PRETRAINED, TOLD, REMEMBERS, FIRST_ORDER = 0, 2, 3, 4  # among the baselines


def recipe_of(iterations: int = 3, **options: Any) -> PolicyRecipe:
    small: dict[str, Any] = {
        "meta_batch": 4, "trajectories": 5, "test_trajectories": 2, "horizon": 5, "stride": 3, "inner_stride": 3,
        "check_every": 1, "validation_episodes": 2, "test_episodes": 2,
    }  # fmt: skip
    counts = {"pretrain_iterations": iterations, "recurrent_iterations": iterations,
              "first_order_iterations": iterations}  # fmt: skip
    return dataclasses.replace(cast(PolicyRecipe, RECIPES["navigation"]), **{**small, **counts, **options})


def weights_of(number: int, folder: Path, **options: Any) -> torch.Tensor:
    """Of a trained baseline, in one row."""
    model, _ = trained_net(recipe_of(**options).baselines()[number], Run(folder))
    return torch.cat([value.detach().flatten() for value in model.parameters()])


def test_pre_training_is_trpo_on_all_tasks(tmp_path: Path, capsys: Any) -> None:
    recipe = recipe_of()
    learner = Learner(recipe.initial_model(), likelihood_ratio, SGD(1.0), steps=0, engine=recipe.engine, stream=True)
    region = TrustRegion(damping=0.01, stride=3)
    step = TRPO(recipe.explorer(learner, Navigation(5), 5), region)
    for number in range(3):
        step(recipe.episodes("train")[number])
    expected = torch.cat([value.detach().flatten() for value in learner.parameters()])
    assert torch.equal(weights_of(PRETRAINED, tmp_path), expected)
    own = tmp_path / "baselines" / "pre-trained-on-all-tasks--fine-tuned"
    assert f"training what to compare with: iteration 0 of 3, in {own}" in " ".join(capsys.readouterr().err.split())
    events = [json.loads(line) for line in (own / "metrics.jsonl").read_text().splitlines()]
    assert [event["step"] for event in events if "loss" in event] == [1, 2, 3]
    assert sum("validation_return" in event for event in events) == 3
    assert torch.equal(weights_of(PRETRAINED, tmp_path), expected)
    assert not capsys.readouterr().err, "trained already"


def test_a_memory_is_trained_along_whole_trials(tmp_path: Path) -> None:
    recipe = recipe_of()
    model = recipe.baselines()[REMEMBERS].build()
    learner = Learner(model, Clipped(), SGD(1.0), steps=0, engine=recipe.engine, stream=True)
    adam = MetaStep(learner, torch.optim.Adam(learner.parameters()))
    step = Ascent(recipe.explorer(learner, Trials(Navigation(5), 4), 2), adam, epochs=5)
    for number in range(3):
        step(recipe.episodes("train")[number], recipe.meta_lr)
    expected = torch.cat([value.detach().flatten() for value in learner.parameters()])
    assert torch.equal(weights_of(REMEMBERS, tmp_path), expected)


@pytest.mark.parametrize("options", [{}, {"outer": "adam", "algorithm": "meta_sgd", "schedule": "cosine"}], ids=str)
def test_first_order_maml_is_the_recipe_without_the_second(options: dict[str, Any], tmp_path: Path) -> None:
    recipe = recipe_of(**options)
    own = {"derivative": "none", "iterations": 3, "first_order_iterations": 0, "algorithm": "maml"}
    plain = dataclasses.replace(recipe, **own)  # type: ignore[arg-type]
    learner = plain.learner()
    train(learner, plain.episodes("train"), plain.training(), Run(tmp_path / "plain"), validate=plain.validate,
          step_of=plain.step_of)  # fmt: skip
    expected = torch.cat([value.detach().flatten() for value in learner.parameters()])
    assert torch.equal(weights_of(FIRST_ORDER, tmp_path / "run", **options), expected)
    (tuned,) = [c for c in contenders_of(recipe, Run(tmp_path / "run")) if c.baseline.name == "first-order MAML"]
    assert tuned.told({"inner_lr": 9.0, "later_rate": 0.5}) == {"inner_lr": recipe.inner_lr, "later_rate": 0.5}


@pytest.mark.parametrize("number", [PRETRAINED, TOLD, REMEMBERS, FIRST_ORDER])
def test_a_training_that_was_stopped_goes_on(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = weights_of(number, tmp_path / "whole")
    save = Run.save_state

    def killed(run: Run, state: dict[str, Any]) -> None:
        save(run, state)
        if state["step"] == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "save_state", killed)
    with pytest.raises(KeyboardInterrupt):
        weights_of(number, tmp_path / "parts")
    assert not list((tmp_path / "parts/baselines").glob("*.json"))
    assert torch.equal(weights_of(number, tmp_path / "parts"), whole), "it begins at the checkpoint, and saves no 2"
    fewer = weights_of(number, tmp_path / "parts", iterations=1)
    assert torch.equal(fewer, weights_of(number, tmp_path / "few", iterations=1)), "it begins anew"


def train_together(folder: str) -> None:
    """Two baselines on this rank's share; the first rank writes down where they led."""
    lived, sizes = Explorer.lived, []

    def counted(explorer: Explorer, tasks: Task, steps: int | None = None) -> Any:
        sizes.append(tasks.size)
        return lived(explorer, tasks, steps)

    with joined(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Explorer, "lived", counted)
        found = [weights_of(number, Path(folder) / "run", iterations=1) for number in (PRETRAINED, REMEMBERS)]
        assert max(sizes) == 2, "half of the tasks"
        if is_first():
            torch.save(found, Path(folder) / "found.pt")


def test_several_processes_train_the_same(tmp_path: Path) -> None:
    assert on_ranks(2, train_together, tmp_path) == 0
    for number, theirs in zip((PRETRAINED, REMEMBERS), torch.load(tmp_path / "found.pt"), strict=True):
        start = torch.cat([value.detach().flatten() for value in recipe_of().baselines()[number].build().parameters()])
        alone = weights_of(number, tmp_path / "alone", iterations=1)
        assert relative_error(theirs - start, alone - start) < 0.05, "rounding moves some steps of Adam"
