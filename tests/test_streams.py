"""Streams of support batches against a loop of plain autograd."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

import fewstep
from fewstep import Engine, InputError, Task
from fewstep.evaluate import evaluate
from fewstep.streams import AlongTheWay
from tests.reference import meta_gradient, relative_error

LR, STEPS = 0.1, 3
TOLERANCE = 1e-9


def mse_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """PyTorch's own has no forward mode under vmap."""
    return (prediction - target).square().mean()


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def draw(batches: int = STEPS) -> Task:
    torch.manual_seed(1)
    support = (torch.randn(3, batches, 5, size, dtype=torch.float64) for size in (2, 1))
    query = (torch.randn(3, 6, size, dtype=torch.float64) for size in (2, 1))
    return Task(tuple(support), tuple(query))


class SelfSupervised(nn.Module):
    """The loss of another head on the same features; it knows no targets."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.head = nn.Linear(1, 2).double()

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        result: Tensor = (self.head(prediction) - 1).square().mean()
        return result


def naive(model: nn.Module, tasks: Task, weight: float, inner_loss: Any = mse_loss) -> Tensor:
    losses = []
    for x, y, query, target in zip(*tasks.support, *tasks.query, strict=True):
        theta: dict[str, Tensor] = dict(model.named_parameters())
        way = []
        for k in range(STEPS):
            i = k % len(x)
            prediction = functional_call(model, theta, (x[i],))
            way.append(mse_loss(prediction, y[i]))
            grads = torch.autograd.grad(inner_loss(prediction, y[i]), list(theta.values()), create_graph=True)
            theta = {name: v - LR * g for (name, v), g in zip(theta.items(), grads, strict=True)}
        query_loss = mse_loss(functional_call(model, theta, (query,)), target)
        losses.append(query_loss + weight * sum(way) / STEPS)
    return torch.stack(losses)


ENGINES = {
    "batched": {"engine": Engine()},
    "chunked": {"engine": Engine(chunk=2)},
    "looped": {"engine": Engine(method="loop")},
    "forward": {"engine": Engine(product="forward")},
    "segments": {"segment": 2},
}


@pytest.mark.parametrize("options", ENGINES.values(), ids=ENGINES)
@pytest.mark.parametrize("weight", [1.0, 0.3, 0.0])
def test_every_batch_counts_before_it_is_learned_from(options: Any, weight: float) -> None:
    model, tasks = build(), draw()
    learner = fewstep.maml(model, mse_loss, lr=LR, steps=STEPS, stream=True, outer=AlongTheWay(weight), **options)
    own = list(model.parameters())
    mine, truth = learner(tasks), naive(model, tasks, weight)
    assert relative_error(mine, truth) < TOLERANCE
    assert relative_error(meta_gradient(mine, own), meta_gradient(truth, own)) < TOLERANCE


@pytest.mark.parametrize("method", ["vmap", "loop"])
def test_self_supervised_and_learned_inner_loss(method: Any) -> None:
    model, inner, tasks = build(), SelfSupervised(), draw()
    learner = fewstep.maml(
        model, mse_loss, lr=LR, steps=STEPS, stream=True, inner_loss=inner, outer=AlongTheWay(), engine=method
    )
    own = list(learner.parameters())
    assert len(own) == 6
    mine, truth = learner(tasks), naive(model, tasks, 1.0, inner)
    assert relative_error(mine, truth) < TOLERANCE
    assert relative_error(meta_gradient(mine, own), meta_gradient(truth, own)) < TOLERANCE


def test_compiled() -> None:
    tasks = draw()
    learners = [
        fewstep.maml(build(), mse_loss, lr=LR, steps=STEPS, stream=True, outer=AlongTheWay(0.5), engine=engine)
        for engine in (Engine(), Engine(compile="pieces"))
    ]
    slow, fast = (meta_gradient(learner(tasks), list(learner.parameters())) for learner in learners)
    assert relative_error(fast, slow) < TOLERANCE
    assert learners[1].engine.compile == "pieces"
    first = learners[1](tasks)
    outer: Any = learners[1].outer
    outer.weight = 2.0  # what is compiled knows nothing of it
    assert relative_error(learners[1](tasks), naive(learners[1].model, tasks, 2.0)) < TOLERANCE
    assert relative_error(first, learners[1](tasks)) > 0.1


@pytest.mark.parametrize("method", ["vmap", "loop"])
def test_a_stream_that_ends_begins_again(method: Any) -> None:
    model, tasks = build(), draw(batches=2)
    learner = fewstep.maml(model, mse_loss, lr=LR, steps=STEPS, stream=True, outer=AlongTheWay(), engine=method)
    assert relative_error(learner(tasks), naive(model, tasks, 1.0)) < TOLERANCE


def test_the_last_step_alone_and_what_else_a_learner_does_with_a_stream() -> None:
    model, tasks = build(), draw()
    plain = fewstep.maml(model, mse_loss, lr=LR, steps=STEPS, stream=True)
    truth = naive(model, tasks, 0.0)
    assert relative_error(plain(tasks), truth) < TOLERANCE
    points = plain.path(tasks)
    assert relative_error(points[-1].loss, truth) < TOLERANCE
    adapted = plain.adapt(tuple(part[1] for part in tasks.support))
    assert points[-1].prediction is not None
    assert relative_error(adapted(tasks.query[0][1]), points[-1].prediction[1]) < TOLERANCE
    problem, tensors = plain.unrolled(tasks)
    whole = problem.gradient(tensors, tuple(range(4)), total=True)
    own = list(model.parameters())
    assert relative_error(torch.cat([g.flatten() for g in whole[1:]]), meta_gradient(truth, own)) < TOLERANCE

    class Same:
        tasks = 3

        def __getitem__(self, index: int) -> Task:
            return tasks

    tasks = draw()
    result = evaluate(plain, Same(), metric="mse", steps=STEPS, count=3)  # type: ignore[arg-type]
    assert math.isclose(result.last.mean, truth.mean().item(), rel_tol=1e-6)


def test_one_batch_as_the_whole_support_set() -> None:
    model, tasks = build(), draw(batches=1)
    whole = Task(tuple(part[:, 0] for part in tasks.support), tasks.query)
    learner = fewstep.maml(model, mse_loss, lr=LR, steps=STEPS, outer=AlongTheWay())
    assert relative_error(learner(whole), naive(model, tasks, 1.0)) < TOLERANCE


@pytest.mark.parametrize("make", [fewstep.fomaml, fewstep.hf_maml])
def test_other_derivatives(make: Any) -> None:
    model, tasks = build(), draw()
    options: Any = {"lr": LR, "steps": STEPS, "stream": True, "outer": AlongTheWay()}
    exact, other = fewstep.maml(model, mse_loss, **options)(tasks), make(model, mse_loss, **options)(tasks)
    own = list(model.parameters())
    assert relative_error(other, exact) < TOLERANCE
    error = relative_error(meta_gradient(other, own), meta_gradient(exact, own))
    assert error < 1e-6 if make is fewstep.hf_maml else 1e-3 < error < 1


def test_errors() -> None:
    for weight in (-1.0, math.inf, math.nan):
        with pytest.raises(InputError, match="finite and at least 0"):
            AlongTheWay(weight)
    with pytest.raises(InputError, match="use compile='pieces'"):
        fewstep.maml(build(), mse_loss, lr=LR, stream=True, outer=AlongTheWay(), engine=Engine(compile="step"))
    x, y = draw().support
    with pytest.raises(InputError, match=r"model cannot take one task's support x \(5, 2\)"):
        fewstep.maml(nn.Linear(3, 1).double(), mse_loss, lr=LR, stream=True)(Task((x, y), (x[:, 0], y[:, 0])))
    alone = Task({"x": torch.ones(2)}, {"x": torch.ones(2)})
    with pytest.raises(InputError, match="need an axis of batches"):
        fewstep.maml(build(), lambda model, batch: batch["x"].sum(), lr=LR, stream=True)(alone)
