"""Metric learners and fine-tuned nets: each equals a plain loop over tasks, and goes where a learner goes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fewstep
from fewstep import DivergenceError, Engine, InputError, Task, maml
from fewstep.baselines import (
    MatchingNet,
    MetricLearner,
    NearestNeighbour,
    ProtoNet,
    features_of,
    fine_tune_all,
    fine_tune_head,
    linear_probe,
)
from fewstep.baselines.distance import squared_distances
from fewstep.data import ClassEpisodes
from fewstep.diagnose import where_not_finite
from fewstep.evaluate import StepResult, evaluate
from fewstep.meta_step import MetaStep
from fewstep.protocol import Protocol
from fewstep.run import Run
from fewstep.train import Training, train

KINDS = [ProtoNet, MatchingNet, NearestNeighbour]
EXACT: Any = {"rtol": 1e-10, "atol": 1e-10}
every_kind = pytest.mark.parametrize("kind", KINDS)


def embedding() -> nn.Module:
    """Batch norm by the batch at hand: a prediction depends on which examples are embedded together."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6, track_running_stats=False), nn.Tanh(), nn.Linear(6, 4))


def some_tasks(ways: int = 3, seed: int = 0, shape: tuple[int, ...] = (3,)) -> Task:
    """Five tasks of 7 support examples and 8 queries, classes of unequal size, in disorder."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 15, *shape, generator=generator, dtype=torch.float64)
    y = torch.stack([torch.arange(7)[torch.randperm(7, generator=generator)] % ways for _ in range(5)])
    return Task((x[:, :7], y), (x[:, 7:], torch.randint(ways, (5, 8), generator=generator)))


def logits_by_hand(kind: type[MetricLearner], support: Tensor, y: list[int], query: Tensor, ways: int) -> Tensor:
    rows = []
    for q in query:
        row = []
        for k in range(ways):
            own = [s for s, label in zip(support, y, strict=True) if label == k]
            if kind is ProtoNet:
                row.append(-(q - sum(own) / len(own)).square().sum())
            elif kind is NearestNeighbour:
                row.append(torch.stack([-(q - s).square().sum() for s in own]).max())
            else:
                cosines = [(q @ s / (q.norm() * s.norm())).exp() for s in support]
                mine = [c for c, label in zip(cosines, y, strict=True) if label == k]
                row.append((sum(mine) / sum(cosines)).log())
        rows.append(torch.stack(row))
    return torch.stack(rows)


@every_kind
def test_equals_a_loop_over_tasks_with_its_gradients(kind: type[MetricLearner]) -> None:
    learner, tasks = kind(embedding().double()), some_tasks()
    losses, logits = [], []
    for task in range(5):
        (support, y), (query, target) = (tuple(part[task] for part in batch) for batch in tasks)
        logits.append(logits_by_hand(kind, learner.embed(support), y.tolist(), learner.embed(query), 3))
        losses.append(functional.cross_entropy(logits[-1], target))
    expected = torch.stack(losses)
    weights = torch.arange(1.0, 6.0, dtype=torch.float64)
    parameters = list(learner.parameters())
    ours = torch.autograd.grad(learner(tasks) @ weights, parameters)
    torch.testing.assert_close(learner(tasks), expected, **EXACT)
    torch.testing.assert_close(ours, torch.autograd.grad(expected @ weights, parameters), **EXACT)
    [point] = learner.path(tasks)
    torch.testing.assert_close(point.prediction, torch.stack(logits).detach(), **EXACT)
    torch.testing.assert_close(point.loss, expected.detach(), **EXACT)


@every_kind
@pytest.mark.parametrize("pool", [False, True])
def test_batched_equals_one_task_at_a_time(kind: type[MetricLearner], pool: bool) -> None:
    torch.manual_seed(0)
    model = fewstep.models.conv4(2, size=16, filters=4, pool=pool).double()
    learner, tasks = kind(features_of(model)), some_tasks(ways=2, shape=(1, 16, 16))
    [point] = learner.path(tasks)
    assert point.prediction is not None
    trained = [value for name, value in learner.named_parameters() if "head" not in name]
    batched = torch.autograd.grad(learner(tasks).sum(), trained)
    total = [torch.zeros_like(value) for value in trained]
    for task in range(5):
        alone = tasks.select(slice(task, task + 1))
        torch.testing.assert_close(learner(alone)[0].detach(), point.loss[task], **EXACT)
        total = [a + b for a, b in zip(total, torch.autograd.grad(learner(alone).sum(), trained), strict=True)]
        classifier = learner.adapt((tasks.support[0][task], tasks.support[1][task]), steps=3)
        torch.testing.assert_close(classifier(tasks.query[0][task]).detach(), point.prediction[task], **EXACT)
    torch.testing.assert_close(list(batched), total, **EXACT)


@every_kind
def test_permuted_tasks_and_examples_give_the_same(kind: type[MetricLearner]) -> None:
    learner, tasks = kind(embedding().double()), some_tasks()
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(learner(tasks.select(order)), learner(tasks)[order], **EXACT)
    mixed = torch.tensor([6, 2, 0, 1, 5, 3, 4])
    support = (tasks.support[0][:, mixed], tasks.support[1][:, mixed])
    torch.testing.assert_close(learner(Task(support, tasks.query)), learner(tasks), **EXACT)


@every_kind
def test_ways_at_test_may_differ_from_training(kind: type[MetricLearner]) -> None:
    learner = kind(embedding().double())
    for ways in (2, 5):
        first, second = learner.path(some_tasks(ways=ways), steps=1)
        assert first.prediction is not None
        assert first.prediction.shape == (5, 8, ways)
        assert first is second


def test_a_prototype_of_a_linear_embedding_is_the_image_of_the_mean() -> None:
    embed = nn.Linear(2, 2, bias=False)
    embed.weight.data = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
    x, y = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 4.0]]), torch.tensor([0, 0, 1])  # to (2, 0) and (0, 4)
    logits = ProtoNet(embed).adapt((x, y))(torch.tensor([[1.0, 1.0]]))  # (2, 1)
    assert logits.tolist() == [[-1.0, -13.0]]


def test_distances_do_not_cancel() -> None:
    left, right = torch.randn(4, 3) + 1000, torch.randn(5, 3) + 1000
    exact = (left[:, None].double() - right.double()).square().sum(-1)
    torch.testing.assert_close(squared_distances(left, right).double(), exact, rtol=1e-4, atol=1e-4)


def test_matching_is_safe_where_features_are_zero_or_a_class_has_no_attention() -> None:
    learner = MatchingNet(nn.Linear(2, 2, bias=False), scale=1e4)
    learner.embed.weight.data = torch.eye(2)
    support = torch.tensor([[[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0]]]), torch.tensor([[0, 1, 2]])
    loss = learner(Task(support, (torch.tensor([[[1.0, 0.0]]]), torch.tensor([[1]]))))
    loss.sum().backward()
    assert loss.item() == pytest.approx(2e4)
    assert torch.isfinite(learner.embed.weight.grad).all()  # type: ignore[arg-type]


# Where a learner goes


def glyphs(queries: int = 2, ways: int = 3) -> ClassEpisodes:
    """Classes that a linear map tells apart: one bright pixel each, and noise."""
    noise = torch.randint(60, (4, 6, 1, 2, 2), generator=torch.Generator().manual_seed(0))
    for i in range(4):
        noise[i, :, 0, i // 2, i % 2] += 180
    return ClassEpisodes(images=noise.to(torch.uint8), ways=ways, shots=2, queries=queries, tasks=4)


@every_kind
def test_separable_tasks_are_solved_under_evaluate(kind: type[MetricLearner]) -> None:
    learner: Any = kind(nn.Flatten())
    result = evaluate(learner, glyphs(), metric="accuracy", steps=1, count=20)
    assert result.by_step == [StepResult(0, 1.0, 0.0), StepResult(1, 1.0, 0.0)]


@every_kind
def test_a_protocol_judges_it_and_says_how_it_normalised(kind: type[MetricLearner]) -> None:
    """With "batch", layers that keep running statistics do as those that do not."""
    keeping = nn.BatchNorm1d(4)
    learner: Any = kind(nn.Sequential(nn.Flatten(), keeping))
    plain: Any = kind(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4, track_running_stats=False)))
    with torch.no_grad():
        keeping.running_mean.fill_(99.0)  # type: ignore[union-attr]
    protocol = Protocol(name="test", tasks=glyphs(), about={}, episodes=20, steps=0, normalisation="batch")
    result = protocol.judge([learner], "loss")
    assert result.by_step == evaluate(plain, glyphs(), metric="loss", steps=0, count=20).by_step
    told = {"ways": 3, "shots": 2, "queries_per_class": 2, "normalisation": "batch statistics (transductive)"}
    assert result.protocol == told, "tasks tell of themselves, whatever `about` says"
    assert learner.normalisation is None
    with pytest.raises(InputError, match="'batch', but 'running' came"):
        replace(protocol, normalisation="running").judge([learner], "loss")


def test_evaluate_says_how_a_learner_normalised() -> None:
    learner = maml(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), functional.cross_entropy, lr=0.1)
    for policy, said in (
        (None, "as the model's layers do by themselves"),
        ("support", "support statistics (inductive)"),
    ):
        learner.normalisation = policy  # type: ignore[assignment]
        result = evaluate(learner, glyphs(), metric="accuracy", steps=1, count=8)
        assert result.protocol == {"normalisation": said}


@every_kind
def test_meta_steps_lower_the_loss(kind: type[MetricLearner]) -> None:
    torch.manual_seed(0)
    learner: Any = kind(nn.Sequential(nn.Flatten(), nn.Linear(4, 8)))
    step = MetaStep(learner, torch.optim.Adam(learner.parameters()))
    losses = [step(glyphs()[i], lr=0.03).item() for i in range(12)]
    assert losses[-1] < 0.8 * losses[0]


def test_trains_and_resumes_with_evaluate_as_validation(tmp_path: Path) -> None:
    def run(folder: str, iterations: int) -> tuple[Any, list[Any]]:
        torch.manual_seed(0)
        learner: Any = ProtoNet(nn.Sequential(nn.Flatten(), nn.Dropout(0.1), nn.Linear(4, 8)))
        events: list[Any] = []
        train(learner, glyphs(), Training(iterations=iterations, check_every=4, log_every=1), Run(tmp_path / folder),
              validate=lambda it: evaluate(it, glyphs(), metric="accuracy", steps=0, count=8),
              report=events.append)  # fmt: skip
        return learner, events

    whole, events = run("whole", 8)
    assert events[-1]["validation_accuracy"][0] > 0.9
    run("parts", 4)
    torch.testing.assert_close(run("parts", 8)[0].state_dict(), whole.state_dict(), rtol=0, atol=0)


@every_kind
def test_state_goes_round(kind: type[MetricLearner]) -> None:
    learner, other = kind(embedding().double()), kind(embedding().double())
    nn.init.ones_(other.embed[0].weight)  # type: ignore[index]
    assert not torch.equal(learner(some_tasks()), other(some_tasks()))
    other.load_state_dict(learner.state_dict())
    assert torch.equal(learner(some_tasks()), other(some_tasks()))


def test_an_adapted_classifier_is_a_copy_that_shares_what_is_frozen() -> None:
    learner, tasks = ProtoNet(embedding().double()), some_tasks()
    learner.embed[0].requires_grad_(False)  # type: ignore[index]
    classifier = learner.adapt((tasks.support[0][0], tasks.support[1][0]))
    before = classifier(tasks.query[0][0])
    nn.init.zeros_(learner.embed[3].weight)  # type: ignore[index]
    assert torch.equal(classifier(tasks.query[0][0]), before)
    assert learner.embed[0].weight is classifier.get_parameter("learner.embed.0.weight")  # type: ignore[index]


def test_what_is_not_finite_is_found() -> None:
    learner: Any = ProtoNet(nn.Sequential(nn.Flatten(), nn.Linear(4, 8)))
    nn.init.constant_(learner.embed[1].weight, 1e30)
    with pytest.raises(DivergenceError):
        MetaStep(learner, torch.optim.Adam(learner.parameters()))(glyphs()[0], lr=0.1)
    assert where_not_finite(learner, glyphs()[0]) == "the loss of task 0 is not finite"
    learner.embed[1].weight.data[0, 0] = torch.nan
    assert where_not_finite(learner, glyphs()[0]) == "the meta-parameter 'embed.1.weight' is not finite"


# What cannot work


def changed(support_y: Tensor | None = None, query_y: Tensor | None = None) -> Task:
    (x, y), (query_x, target) = some_tasks()
    return Task((x, y if support_y is None else support_y), (query_x, target if query_y is None else query_y))


LABELS = some_tasks().support[1]


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (changed(LABELS.double()), "support labels must be integers .* but torch.float64"),
        (changed(functional.one_hot(LABELS)), r"support labels must be integers .*\(5, 7, 3\) came"),
        (changed(query_y=torch.zeros(5, 8)), "query labels must be integers"),
        (changed(LABELS + 1), "task 0 has no example of class 0, though labels run up to 3"),
        (changed(torch.where(LABELS == 1, 2, LABELS)), "task 0 has no example of class 1"),
        (changed(LABELS - 1), r"must be 0\.\.ways-1, but -1 came"),
        (changed(LABELS + 600), "602 came among 7 examples"),
        (changed(query_y=torch.full((5, 8), 3)), r"query labels run from 3 to 3, but .* classes 0\.\.2"),
        (Task(torch.zeros(2, 3), torch.zeros(2, 3)), "needs batches \\(x, y\\)"),
        ("tasks", "expected fewstep.Task"),
    ],
)
def test_bad_tasks(tasks: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ProtoNet(embedding().double())(tasks)


def test_bad_values_are_named() -> None:
    tasks = some_tasks()
    tasks.query[0][2, 1] = torch.nan
    with pytest.raises(InputError, match="the query set of task 2 holds NaN"):
        ProtoNet(embedding().double())(tasks)


def test_bad_options() -> None:
    learner = ProtoNet(embedding())
    with pytest.raises(InputError, match="one way to compute"):
        learner.engine = Engine(method="loop")
    with pytest.raises(InputError, match="at least 0, but -1 came"):
        learner.path(some_tasks(), steps=-1)
    with pytest.raises(InputError, match="the embedding must be"):
        ProtoNet(torch.tanh)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="scale must be above 0"):
        MatchingNet(embedding(), scale=0.0)
    with pytest.raises(InputError, match=r"must give \[examples, features\], but gave \(21,\)"):
        ProtoNet(nn.Flatten(0))(some_tasks())


def test_running_statistics_are_refused_in_training_only() -> None:
    learner = ProtoNet(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)).double())
    with pytest.raises(InputError, match="BatchNorm1d '0' keeps running statistics"):
        learner(some_tasks())
    assert torch.isfinite(learner.eval()(some_tasks())).all()


# Trained networks


def test_features_are_what_goes_into_the_head() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), nn.Unflatten(1, (2, 1)))
    x = torch.randn(5, 3)
    assert torch.equal(features_of(model)(x), model[:2](x))
    assert torch.equal(features_of(model, "1")(x), model[0](x))
    assert torch.equal(features_of(model[0])(x), x)
    assert not model[2]._forward_pre_hooks


def test_heads_that_are_not_there() -> None:
    with pytest.raises(InputError, match="Flatten has no linear layer"):
        features_of(nn.Flatten())
    with pytest.raises(InputError, match="no submodule 'head'; there are: 0"):
        features_of(nn.Sequential(nn.Linear(1, 1)), "head")
    with pytest.raises(InputError, match="'0' names a ReLU"):
        fine_tune_head(nn.Sequential(nn.ReLU(), nn.Linear(1, 1)), functional.mse_loss, lr=0.1, head="0")
    model = fewstep.models.conv4(2)
    model.unused = nn.Linear(1, 1)
    with pytest.raises(InputError, match="did not call its head 'unused'"):
        features_of(model)(torch.zeros(2, 1, 28, 28))


def test_a_linear_probe_fits_a_new_head_to_frozen_features() -> None:
    model, tasks = embedding().double(), some_tasks()
    probe = linear_probe(model, functional.cross_entropy, ways=3, lr=0.5, steps=20)
    assert [name for name, value in probe.model.named_parameters() if value.requires_grad] == ["3.weight", "3.bias"]
    assert all(value.requires_grad for value in model.parameters())
    [start, *_, end] = probe.path(tasks)
    assert start.prediction is not None
    assert not start.prediction.any()
    x, y = (part[1] for part in tasks.support)
    weight, bias = torch.zeros(3, 6, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    features = model[:3](x).detach()  # type: ignore[index]
    for _ in range(20):
        error = ((features @ weight.T + bias).softmax(1) - functional.one_hot(y)) / len(y)
        weight, bias = weight - 0.5 * error.T @ features, bias - 0.5 * error.sum(0)
    by_hand = model[:3](tasks.query[0][1]).detach() @ weight.T + bias  # type: ignore[index]
    assert end.prediction is not None
    torch.testing.assert_close(end.prediction[1], by_hand, **EXACT)
    with pytest.raises(InputError, match="ways must be at least 1"):
        linear_probe(model, functional.cross_entropy, ways=0, lr=0.5)


def test_fine_tuning_is_first_order_on_the_head_or_on_all() -> None:
    tasks = some_tasks(ways=4)
    every = fine_tune_all(embedding().double(), functional.cross_entropy, lr=0.1, steps=2)
    alike = maml(embedding().double(), functional.cross_entropy, lr=0.1, steps=2)
    torch.testing.assert_close(every(tasks), alike(tasks), **EXACT)
    head = fine_tune_head(embedding().double(), functional.cross_entropy, lr=0.1, steps=2)
    alike = maml(embedding().double(), functional.cross_entropy, lr=0.1, steps=2, adapt="3.*")
    torch.testing.assert_close(head(tasks), alike(tasks), **EXACT)
    assert head.derivative == every.derivative == "none"
    for whole in (fine_tune_head(nn.Linear(3, 4), functional.cross_entropy, lr=0.1),
                  linear_probe(nn.Linear(3, 9), functional.cross_entropy, ways=4, lr=0.1)):  # fmt: skip
        assert len(whole.objective.adapted) == 2
