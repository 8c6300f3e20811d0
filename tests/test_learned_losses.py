"""Meta-parameters beyond the start: learned inner losses, and weights of training examples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

import fewstep
from fewstep import Engine, Task
from tests.reference import meta_gradient, relative_error

LR, STEPS, TOLERANCE = 0.1, 2, 1e-9
ENGINES = {
    "batched": Engine(),
    "chunked": Engine(chunk=2),
    "looped": Engine(method="loop"),
    "forward": Engine(product="forward"),
}


class LearnedLoss(nn.Module):
    """A small net of prediction and target (ML3; Bechtle et al. 2021, arXiv 1906.05374)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1), nn.Softplus())

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        result: Tensor = self.net(torch.cat([prediction, target], -1)).mean()
        return result


class Weighted(nn.Module):
    """One weight for each training example (Ren et al. 2018, arXiv 1803.09050); a batch tells which it holds."""

    def __init__(self, examples: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.linspace(-1, 1, examples))

    def forward(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        each = (model(batch["x"]) - batch["y"]).square().flatten(1).mean(1)
        result: Tensor = (self.weights[batch["index"]].sigmoid() * each).mean()
        return result


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def batch(seed: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.randn(3, 5, 2, dtype=torch.float64), torch.randn(3, 5, 1, dtype=torch.float64)


def naive(model: nn.Module, tasks: Task, inner: Any) -> Tensor:
    """`inner(theta, support)` of one task is differentiated by plain autograd."""
    losses = []
    for i in range(3):
        theta: dict[str, Tensor] = dict(model.named_parameters())
        for _ in range(STEPS):
            grads = torch.autograd.grad(inner(theta, i), list(theta.values()), create_graph=True)
            theta = {name: v - LR * g for (name, v), g in zip(theta.items(), grads, strict=True)}
        x, y = tasks.query
        losses.append(functional.mse_loss(functional_call(model, theta, (x[i],)), y[i]))
    return torch.stack(losses)


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
def test_a_learned_inner_loss(engine: Engine) -> None:
    model, loss, tasks = build(), LearnedLoss().double(), Task(batch(1), batch(2))
    learner = fewstep.maml(model, functional.mse_loss, lr=LR, steps=STEPS, inner_loss=loss, engine=engine)
    own = [*model.parameters(), *loss.parameters()]
    assert {id(value) for value in learner.parameters()} == {id(value) for value in own}
    assert all(name.startswith("model.") for name in learner.objective.adapted)

    def inner(theta: dict[str, Tensor], i: int) -> Tensor:
        result: Tensor = loss(functional_call(model, theta, (tasks.support[0][i],)), tasks.support[1][i])
        return result

    truth, mine = naive(model, tasks, inner), learner(tasks)
    assert relative_error(mine, truth) < TOLERANCE
    assert relative_error(meta_gradient(mine, own), meta_gradient(truth, own)) < TOLERANCE
    learned = list(loss.parameters())
    assert meta_gradient(learner(tasks), learned).norm() > 1e-6
    assert (
        relative_error(meta_gradient(learner(tasks), learned), meta_gradient(naive(model, tasks, inner), learned))
        < TOLERANCE
    )
    at_start = learner.path(tasks)[0].loss  # the query set is judged by the plain loss
    prediction = model(tasks.query[0])
    assert relative_error(at_start, (prediction - tasks.query[1]).square().flatten(1).mean(1)) < TOLERANCE


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
def test_weights_of_training_examples(engine: Engine) -> None:
    model, loss = build(), Weighted(20).double()
    (x, y), query = batch(1), batch(2)
    index = torch.stack([torch.randperm(20)[:5] for _ in range(3)])
    tasks = Task({"x": x, "y": y, "index": index}, query)
    learner = fewstep.maml(model, functional.mse_loss, lr=LR, steps=STEPS, inner_loss=loss, engine=engine)

    def inner(theta: dict[str, Tensor], i: int) -> Tensor:
        each = (functional_call(model, theta, (x[i],)) - y[i]).square().mean(1)
        result: Tensor = (loss.weights[index[i]].sigmoid() * each).mean()
        return result

    own = [*model.parameters(), loss.weights]
    truth, mine = naive(model, tasks, inner), learner(tasks)
    assert relative_error(mine, truth) < TOLERANCE
    assert relative_error(meta_gradient(mine, own), meta_gradient(truth, own)) < TOLERANCE
    learner(tasks).sum().backward()
    assert loss.weights.grad is not None
    unused = torch.ones(20, dtype=torch.bool)
    unused[index.flatten()] = False
    assert unused.any()
    assert (loss.weights.grad[unused] == 0).all()
    assert (loss.weights.grad[~unused] != 0).all()


def test_first_order_gives_a_learned_loss_no_gradient() -> None:
    loss, tasks = LearnedLoss().double(), Task(batch(1), batch(2))
    learner = fewstep.fomaml(build(), functional.mse_loss, lr=LR, inner_loss=loss)
    learner(tasks).sum().backward()
    assert all(value.grad is None or not value.grad.any() for value in loss.parameters())


def test_noisy_examples_lose_their_weight() -> None:
    """One half of the training examples has wrong targets: their weights fall."""
    torch.manual_seed(0)
    x = torch.randn(20, 2, dtype=torch.float64)
    true = x.sum(1, keepdim=True)
    y = torch.where(torch.arange(20)[:, None] < 10, true, -true)
    model, loss = nn.Linear(2, 1).double(), Weighted(20).double()
    nn.init.zeros_(loss.weights)
    learner = fewstep.maml(model, functional.mse_loss, lr=LR, inner_loss=loss)
    optimizer = torch.optim.Adam([loss.weights], lr=0.1)
    for _ in range(60):
        index = torch.randint(20, (4, 10))
        clean = torch.randn(4, 10, 2, dtype=torch.float64)
        tasks = Task({"x": x[index], "y": y[index], "index": index}, (clean, clean.sum(-1, keepdim=True)))
        optimizer.zero_grad()
        learner(tasks).mean().backward()
        optimizer.step()
    assert loss.weights[:10].mean() > loss.weights[10:].mean() + 1


def test_a_compiled_learner_sees_another_number_in_the_inner_loss() -> None:
    scale = 1.0

    def scaled(prediction: Tensor, target: Tensor) -> Tensor:
        return scale * functional.mse_loss(prediction, target)

    tasks = Task(batch(1), batch(2))
    slow, fast = (
        fewstep.maml(build(), functional.mse_loss, lr=LR, inner_loss=scaled, engine=Engine(compile=how))
        for how in ("no", "pieces")
    )
    before = fast(tasks)
    scale = 3.0
    assert relative_error(fast(tasks), slow(tasks)) < TOLERANCE
    assert relative_error(fast(tasks), before) > 1e-3
