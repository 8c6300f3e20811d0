"""Padded tasks against a loop over single tasks without padding."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fewstep
from fewstep import Engine, InputError, Learner, Task
from fewstep.evaluate import METRICS, accuracy, evaluate, mse
from fewstep.ragged import masked, pad_tasks
from fewstep.task import one_task
from tests.reference import meta_gradient, relative_error

TOLERANCE = 1e-9
SIZES = [(3, 4), (5, 2), (1, 6), (4, 4)]
cross_entropy = partial(functional.cross_entropy, reduction="none")
squares = partial(functional.mse_loss, reduction="none")


def build(*, norm: nn.Module | None = None, outputs: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), norm or nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, outputs)).double()


def single(classes: bool) -> list[Task]:
    torch.manual_seed(1)

    def batch(size: int) -> tuple[Tensor, Tensor]:
        y = torch.randint(3, (size,)) if classes else torch.randn(size, 2, dtype=torch.float64)
        return torch.randn(size, 2, dtype=torch.float64), y

    return [Task(batch(shots), batch(queries)) for shots, queries in SIZES]


ENGINES = {
    "batched": Engine(),
    "chunked": Engine(chunk=3),
    "looped": Engine(method="loop"),
    "forward": Engine(product="forward"),
}


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
@pytest.mark.parametrize("classes", [True, False])
def test_padding_changes_nothing(classes: bool, engine: Engine) -> None:
    model, tasks = build(outputs=3 if classes else 2), single(classes)
    plain = functional.cross_entropy if classes else functional.mse_loss
    each = cross_entropy if classes else squares
    ragged = fewstep.maml(model, masked(each), lr=0.1, steps=2, engine=engine)
    alone = fewstep.maml(model, plain, lr=0.1, steps=2, engine="loop")
    losses = torch.cat([alone(one_task(task)) for task in tasks])
    mine, own = ragged(pad_tasks(tasks)), list(model.parameters())
    assert relative_error(mine, losses) < TOLERANCE
    assert relative_error(meta_gradient(mine, own), meta_gradient(losses, own)) < TOLERANCE


@pytest.mark.parametrize("method", [fewstep.proto_maml, fewstep.unicorn_maml])
def test_padding_changes_no_start_that_goes_by_labels(method: Callable[..., Learner]) -> None:
    model, tasks = build(), []
    for task, shots in zip(single(classes=True)[:2], (6, 4), strict=True):
        support = torch.randn(shots, 2, dtype=torch.float64), torch.arange(shots) % 3
        tasks.append(Task(support, task.query))
    ragged, alone = method(model, masked(cross_entropy), lr=0.1), method(model, functional.cross_entropy, lr=0.1)
    losses = torch.cat([alone(one_task(task)) for task in tasks])
    mine, own = ragged(pad_tasks(tasks)), list(model.parameters())
    assert relative_error(mine, losses) < TOLERANCE
    assert relative_error(meta_gradient(mine, own), meta_gradient(losses, own)) < TOLERANCE


@pytest.mark.parametrize(("metric", "of"), [("accuracy", accuracy), ("mse", mse), ("loss", None)])
def test_metrics_count_real_examples(metric: str, of: Any) -> None:
    classes = metric != "mse"
    model, tasks = build(outputs=3 if classes else 2), single(classes)
    each, plain = (cross_entropy, functional.cross_entropy) if classes else (squares, functional.mse_loss)
    alone = fewstep.maml(model, plain, lr=0.5, steps=2)
    each_task = [[METRICS[metric].of(p, one_task(t).query) for p in alone.path(one_task(t))] for t in tasks]
    expected = torch.stack([torch.cat(column) for column in zip(*each_task, strict=True)])

    class Padded:
        tasks = len(SIZES)

        def __getitem__(self, index: int) -> Task:
            return padded

    padded = pad_tasks(tasks)
    learner = fewstep.maml(model, masked(each), lr=0.5, steps=2)
    found = torch.stack([METRICS[metric].of(point, padded.query) for point in learner.path(padded)])
    assert relative_error(found.double(), expected.double()) < 1e-6
    result = evaluate(learner, Padded(), metric=metric, steps=2, count=4)  # type: ignore[arg-type]
    assert abs(result.last.mean - float(expected[-1].double().mean())) < 1e-6


def test_what_is_filled_in() -> None:
    tasks = single(classes=True)
    x, y, mask = pad_tasks(tasks).support
    assert x.shape == (4, 5, 2)
    assert y.shape == mask.shape == (4, 5)
    assert mask.sum(1).tolist() == [3, 5, 1, 4]
    for i, task in enumerate(tasks):
        assert torch.equal(x[i][mask[i]], task.support[0])
        assert torch.equal(y[i][mask[i]], task.support[1])
        assert (x[i][~mask[i]] == task.support[0][0]).all()
    assert pad_tasks(tasks).query[0].shape == (4, 6, 2)
    assert pad_tasks(tasks[:1]).support[2].all()


def test_adaptation_to_one_task_needs_no_padding_of_others() -> None:
    tasks = single(classes=True)
    learner = fewstep.maml(build(), masked(cross_entropy), lr=0.1, steps=2)
    alone = fewstep.maml(build(), functional.cross_entropy, lr=0.1, steps=2)
    padded = pad_tasks(tasks)
    for i, task in enumerate(tasks):
        adapted = learner.adapt(tuple(part[i] for part in padded.support))
        assert relative_error(adapted(task.query[0]), alone.adapt(task.support)(task.query[0])) < TOLERANCE


def test_infinite_padding_has_no_say() -> None:
    def strict(prediction: Tensor, target: Tensor) -> Tensor:
        return torch.where(target > 0, prediction.flatten(), torch.inf)

    batch = torch.ones(2, 1), torch.tensor([1.0, 0.0]), torch.tensor([True, False])
    assert masked(strict)(nn.Identity(), batch)[0] == 1


@pytest.mark.parametrize("policy", [None, "batch", "support"])
def test_batch_statistics_are_refused(policy: Any) -> None:
    padded = pad_tasks(single(classes=True))
    norm = nn.BatchNorm1d(4) if policy else fewstep.use_batch_statistics(nn.BatchNorm1d(4))
    learner = fewstep.maml(build(norm=norm), masked(cross_entropy), lr=0.1, normalisation=policy)
    told = r"mix padding into the statistics.*one at a time" if policy != "support" else "one at a time|support stat"
    with pytest.raises(InputError, match=told):
        learner(padded)


@pytest.mark.parametrize("policy", ["running", "per_step"])
def test_running_statistics_are_welcome(policy: Any) -> None:
    tasks = single(classes=True)
    norm = nn.BatchNorm1d(4)
    model = build(norm=norm)
    alone = fewstep.maml(model, functional.cross_entropy, lr=0.1, normalisation=policy)
    fewstep.calibrate(alone, [one_task(tasks[0])], batches=1)  # type: ignore[arg-type]
    learner = fewstep.maml(model, masked(cross_entropy), lr=0.1, normalisation=policy)
    learner.statistics.set([alone.statistics.of(0)])
    losses = torch.cat([alone(one_task(task)) for task in tasks])
    assert relative_error(learner(pad_tasks(tasks)), losses) < TOLERANCE
    frozen = fewstep.maml(model.eval(), masked(cross_entropy), lr=0.1)
    assert frozen(pad_tasks(tasks)).isfinite().all()


def test_errors() -> None:
    task = single(classes=True)[0]
    x, y = task.support
    with pytest.raises(InputError, match="no tasks to pad"):
        pad_tasks([])
    with pytest.raises(InputError, match=r"a support set with \[\(3, 2\), \(2,\)\] came"):
        pad_tasks([Task((x, y[:2]), task.query)])
    with pytest.raises(InputError, match=r"at least one example.* a query set"):
        pad_tasks([Task(task.support, (x[:0], y[:0]))])
    with pytest.raises(InputError, match="a support set with dict came"):
        pad_tasks([Task({"x": x}, task.query)])
    with pytest.raises(InputError, match="support sets must have one form"):
        pad_tasks([task, Task((x[:, :1], y), task.query)])
    padded = pad_tasks([task])
    with pytest.raises(InputError, match="value for each of 3 examples"):
        fewstep.maml(build(), masked(functional.cross_entropy), lr=0.1)(padded)
    with pytest.raises(InputError, match=r"\(x, y, mask\) batches"):
        masked(cross_entropy)(build(), task.support)
