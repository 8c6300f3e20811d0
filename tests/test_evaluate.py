"""Evaluation: the numbers, their interval, and that looking changes nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import fewstep
from fewstep import InputError, Task, maml
from fewstep.data import ClassEpisodes, SinusoidEpisodes
from fewstep.evaluate import Evaluation, Metric, StepResult, evaluate, mse
from fewstep.learner import Learner
from fewstep.task import Point


@pytest.fixture
def learner() -> Learner:
    torch.manual_seed(0)
    return maml(fewstep.models.mlp(init="xavier"), functional.mse_loss, lr=0.01)


def test_mean_and_interval_equal_those_by_hand(learner: Learner) -> None:
    episodes = SinusoidEpisodes(tasks=4, shots=5, queries=7)
    result = evaluate(learner, episodes, metric="mse", steps=2, count=10)
    values = []
    for task in range(10):
        x, y = (part[task % 4] for part in episodes[task // 4].support)
        query_x, query_y = (part[task % 4] for part in episodes[task // 4].query)
        values.append(functional.mse_loss(learner.adapt((x, y), steps=2)(query_x), query_y).item())
    by_hand = torch.tensor(values, dtype=torch.float64)
    assert result.by_step[2].mean == pytest.approx(by_hand.mean().item(), rel=1e-5)
    assert result.by_step[2].ci95 == pytest.approx(1.96 * by_hand.std().item() / 10**0.5, rel=1e-4)
    assert [point.step for point in result.by_step] == [0, 1, 2]
    assert result.episodes == 10


def test_a_perfect_and_a_blind_classifier() -> None:
    images = torch.zeros(3, 4, 1, 2, 2, dtype=torch.uint8)
    for i in range(3):
        images[i, :, 0, i // 2, i % 2] = 255
    episodes = ClassEpisodes(images=images, ways=3, shots=1, queries=2, tasks=5)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    for value in model.parameters():
        nn.init.zeros_(value)
    result = evaluate(maml(model, functional.cross_entropy, lr=1.0), episodes, metric="accuracy", steps=1, count=20)
    assert result.by_step[0].mean == pytest.approx(1 / 3)
    assert result.by_step[1] == StepResult(1, 1.0, 0.0)


def test_evaluation_turns_dropout_off_and_back_on() -> None:
    model = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    learner = maml(model, functional.mse_loss, lr=0.01)
    episodes = SinusoidEpisodes(tasks=4)
    first, second = (evaluate(learner, episodes, metric="mse", steps=1, count=4) for _ in range(2))
    assert first == second
    assert learner.training
    assert model[1].training


def test_a_metric_of_the_users_own_and_the_loss(learner: Learner) -> None:
    def absolute(point: Point, query: Any) -> torch.Tensor:
        assert point.prediction is not None
        return torch.mean((point.prediction - query[1]).abs(), dim=(1, 2))

    episodes = SinusoidEpisodes(tasks=4)
    mae = evaluate(learner, episodes, metric=Metric("mae", absolute), steps=1, count=4)
    assert mae.metric == "mae"
    assert mae.worth == -mae.last.mean
    loss, mse = (evaluate(learner, episodes, metric=name, steps=1, count=4) for name in ("loss", "mse"))
    assert loss.last.mean == pytest.approx(mse.last.mean, rel=1e-5)


@pytest.mark.parametrize(("higher", "sign"), [(True, 1), (False, -1)])
def test_gains_are_differences_within_episodes(higher: bool, sign: int) -> None:
    values = torch.tensor([[1.0, 50.0, 9.0], [2.0, 52.0, 9.0], [0.0, 53.0, 12.0]])
    points = [StepResult(step, 0.0, 0.0) for step in (0, 1, 5)]
    first, last = Evaluation("own", points, 3, higher_is_better=higher, values=values).gains
    assert (first.step, first.mean, last.step) == (1, sign * 1.0, 5)
    assert first.ci95 == pytest.approx(1.96 / 3**0.5)
    assert last.mean == pytest.approx(sign * 5 / 3)
    assert last.ci95 == pytest.approx(1.96 * torch.tensor([-1.0, 3.0, 3.0]).std().item() / 3**0.5)


def test_modules_that_stay_in_eval_mode_stay_so(learner: Learner) -> None:
    learner.get_submodule("model.1").eval()
    evaluate(learner, SinusoidEpisodes(tasks=4), metric="mse", steps=1, count=4)
    assert learner.training
    assert not learner.get_submodule("model.1").training


def test_a_diverged_mean_is_null_and_worth_least() -> None:
    values = torch.tensor([[0.9, 1.1], [float("nan")] * 2])
    diverged = Evaluation("mse", [StepResult(0, 1.0, 0.1), StepResult(1, float("nan"), float("nan"))], 2, values=values)
    content = json.loads(json.dumps(diverged.to_json(), allow_nan=False))
    assert content["by_step"][1] == content["gains"][0] == {"step": 1, "mean": None, "ci95": None}
    fine = Evaluation("mse", [StepResult(0, 1e9, 0.1)], 10)
    assert fine.worth > diverged.worth


def test_wrong_options(learner: Learner) -> None:
    episodes = SinusoidEpisodes(tasks=4)
    with pytest.raises(InputError, match="one of accuracy, mse, loss, return, but 'auc' came"):
        evaluate(learner, episodes, metric="auc", steps=1)
    with pytest.raises(InputError, match="at least 2 episodes, but 1 came"):
        evaluate(learner, episodes, metric="mse", steps=1, count=1)


def test_mse_does_not_broadcast() -> None:
    with pytest.raises(InputError, match=r"one shape, but \(2, 3, 1\) and \(2, 3\) came"):
        mse(torch.zeros(2, 3, 1), torch.zeros(2, 3))


# Episodes


def test_episodes_need_no_history() -> None:
    episodes = SinusoidEpisodes(tasks=3, seed=5)
    in_order = [tasks for tasks, _ in zip(episodes, range(3), strict=False)]
    torch.testing.assert_close(in_order[2], replace(episodes)[2], rtol=0, atol=0)
    assert not torch.equal(episodes[0].support[0], episodes[1].support[0])
    assert not torch.equal(episodes[0].support[0], replace(episodes, seed=6)[0].support[0])


def test_sinusoids_are_those_of_the_paper() -> None:
    (x, y), _ = SinusoidEpisodes(tasks=500, shots=10, oracle=True)[0]
    inputs, amplitude, phase = x.unbind(-1)
    torch.testing.assert_close(y[..., 0], amplitude * torch.sin(inputs - phase))
    assert 0.1 <= amplitude.min() < 0.2
    assert 4.9 < amplitude.max() <= 5
    assert 0 <= phase.min() < 0.05
    assert 3.1 < phase.max() <= 3.1416
    assert -5 <= inputs.min() < -4.9


def class_table() -> torch.Tensor:
    """Class c, example e has the value 10 c + e everywhere but in one corner, which is 255."""
    value = 10 * torch.arange(6)[:, None] + torch.arange(5)
    images = value[:, :, None, None, None].expand(6, 5, 1, 3, 3).to(torch.uint8).clone()
    images[..., 0, 0] = 255
    return images


def test_a_task_has_distinct_classes_and_distinct_examples() -> None:
    episodes = ClassEpisodes(images=class_table(), ways=4, shots=2, queries=3, tasks=50)
    (support_x, support_y), (query_x, query_y) = episodes[0]
    assert support_x.shape == (50, 8, 1, 3, 3)
    assert query_x.shape == (50, 12, 1, 3, 3)
    support, query = ((x[..., 2, 2].squeeze(-1) * 255).round().long() for x in (support_x, query_x))
    for task in range(50):
        assert len(set(support[task].tolist()) | set(query[task].tolist())) == 20
        classes = (support[task] // 10).reshape(4, 2)
        assert (classes == classes[:, :1]).all()
        assert classes[:, 0].unique().numel() == 4
        assert torch.equal(query[task] // 10, classes[query_y[task], 0])
    assert torch.equal(support_y[0], torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]))


def test_each_class_of_an_episode_is_turned_as_one() -> None:
    episodes = ClassEpisodes(images=class_table(), ways=4, shots=2, queries=3, tasks=50, rotate=True)
    (support_x, _), (query_x, _) = episodes[0]
    corners = torch.cat([x.unflatten(1, (4, -1)) for x in (support_x, query_x)], 2)[:, :, :, 0]
    marked = torch.stack([corners[..., i, j] == 1 for i, j in ((0, 0), (2, 0), (2, 2), (0, 2))], -1)
    assert (marked.sum(-1) == 1).all()
    assert (marked == marked[:, :, :1]).all()
    assert (marked[:, :, 0].float().mean((0, 1)) - 0.25).abs().max() < 0.12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ways": 7}, r"7 ways asked of 6 classes; choose 1\.\.6"),
        ({"shots": 3, "queries": 3}, "3 shots and 3 queries asked, but class 0 has 5 examples"),
        ({"shots": 0}, "at least 1"),
        ({"tasks": 0}, "tasks per batch must be at least 1"),
        ({"images": torch.zeros(3, 4)}, r"images must be uint8 \[classes, examples, channels, height, width\]"),
    ],
)
def test_impossible_episodes(options: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ClassEpisodes(**{"images": class_table(), "ways": 2, "shots": 1, "queries": 1, "tasks": 2, **options})  # type: ignore[arg-type]


def test_a_negative_episode_is_refused() -> None:
    with pytest.raises(InputError, match="numbered from 0"):
        SinusoidEpisodes(tasks=1)[-1]


def test_tasks_can_be_selected_and_moved() -> None:
    tasks = SinusoidEpisodes(tasks=5)[0]
    chosen = tasks.select(slice(1, 3)).to("cpu")
    assert isinstance(chosen, Task)
    assert chosen.size == 2
    assert torch.equal(chosen.query[1], tasks.query[1][1:3])
