"""What only a CUDA GPU can show: training steps recorded as a graph. The first tests stand in for it on a CPU."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fewstep
from fewstep import DivergenceError, Engine, FallbackWarning, Learner, Task, maml
from fewstep.meta_step import MetaStep
from tests.cases import CASES, Case

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here")
ENGINES = [
    Engine(),
    Engine(method="loop"),
    Engine(chunk=2),
    Engine(compile="pieces"),
    Engine(compile="pieces", keep=True),
    Engine(compile="step"),
    Engine(compile="step", chunk=2),
    Engine(convolution="matmul"),
    Engine(method="loop", convolution="channels_last"),
]
QUICK = [engine for engine in ENGINES if engine.compile == "no"]
CONV, MLP = (next(case for case in CASES if case.name == name) for name in ("conv4 pooled", "mlp"))


class Replayed:
    """Stands in for a `Recording`: copies what is fresh into buffers of its own, and runs the function on those."""

    made = 0

    def __init__(self, function: Any, tensors: Sequence[Tensor], fresh: Sequence[int]) -> None:
        Replayed.made += 1
        self.function, self.fresh = function, fresh
        self.buffers = [tensor.clone() if i in fresh else tensor for i, tensor in enumerate(tensors)]

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        for i in self.fresh:
            self.buffers[i].copy_(tensors[i])
        results: tuple[Tensor, ...] = self.function(*self.buffers)
        return results


def batches(case: Case, device: str) -> list[Task]:
    tasks = case.tasks(4).to(device)
    return [tasks, Task(tasks.query, tasks.support), tasks]


def trained(case: Case, engine: Engine, device: str, clip: float | None = None, **options: Any) -> Learner:
    """After three training steps at different rates on different tasks."""
    model = case.build().to(device)
    learner = maml(model, case.loss, lr=case.lr, steps=2, adapt=case.adapt, engine=engine, **options)
    step = MetaStep(learner, torch.optim.Adam(learner.parameters()), clip)
    for rate, tasks in zip((0.1, 0.05, 0.2), batches(case, device), strict=True):
        step(tasks, rate)
    return learner


def assert_alike(one: Learner, other: Learner) -> None:
    for own, its in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(own, its, rtol=1e-7, atol=1e-7)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewstep.meta_step.Recording", Replayed)
    monkeypatch.setattr(MetaStep, "_is_recorded", lambda self: self.learner.engine.graph)


@pytest.mark.parametrize("engine", QUICK, ids=str)
@pytest.mark.parametrize("clip", [None, 0.01])
def test_a_step_of_buffers_is_the_step(engine: Engine, clip: float | None, recorded: None) -> None:
    before = Replayed.made
    graph = trained(CONV, Engine(**{**vars(engine), "graph": True}), "cpu", clip)
    assert Replayed.made == before + 1, "all three steps are one recording"
    assert all(value.grad is None for value in graph.parameters())
    assert_alike(graph, trained(CONV, engine, "cpu", clip))


def test_on_a_cpu_there_is_no_graph() -> None:
    assert_alike(trained(MLP, Engine(graph=True), "cpu"), trained(MLP, Engine(), "cpu"))


@needs_gpu
@pytest.mark.parametrize("engine", ENGINES, ids=str)
@pytest.mark.parametrize("case", [MLP, CONV], ids=lambda case: case.name)
def test_a_graph_trains_as_its_engine_does(case: Case, engine: Engine) -> None:
    graph = trained(case, Engine(**{**vars(engine), "graph": True}), "cuda", clip=0.01)
    assert graph.engine.graph, "it fell back"
    assert_alike(graph, trained(case, Engine(method="loop"), "cuda", clip=0.01))


@needs_gpu
def test_first_order_in_a_graph() -> None:
    engine = Engine(graph=True)
    assert_alike(trained(CONV, engine, "cuda", derivative="none"), trained(CONV, Engine(), "cuda", derivative="none"))


@needs_gpu
def test_the_cpu_gives_the_same() -> None:
    on_gpu = trained(CONV, Engine(graph=True), "cuda")
    for own, its in zip(on_gpu.parameters(), trained(CONV, Engine(), "cpu").parameters(), strict=True):
        torch.testing.assert_close(own.cpu(), its, rtol=1e-8, atol=1e-8)


@needs_gpu
def test_a_graph_follows_new_weights_and_flags() -> None:
    learners = [trained(MLP, Engine(graph=graph), "cuda") for graph in (True, False)]
    for learner in learners:
        step = MetaStep(learner, torch.optim.Adam(learner.parameters()))
        step(batches(MLP, "cuda")[0], 0.1)
        first = next(learner.model.parameters())
        first.data = 0.5 * first.data  # another tensor at another place
        step(batches(MLP, "cuda")[1], 0.1)
        first.requires_grad_(False)
        step(batches(MLP, "cuda")[0], 0.1)
        learner.load_state_dict(copy.deepcopy(learner.state_dict()))
        step(batches(MLP, "cuda")[1], 0.1)
    assert_alike(*learners)


@needs_gpu
def test_what_is_not_finite_moves_nothing_in_a_graph() -> None:
    learner = trained(MLP, Engine(graph=True), "cuda")
    before = [value.detach().clone() for value in learner.parameters()]
    tasks = batches(MLP, "cuda")[0]
    tasks.support[0][0, 0] = float("inf")
    step = MetaStep(learner, torch.optim.Adam(learner.parameters()))
    with pytest.raises(DivergenceError):
        step(tasks, 0.1)
    assert all(torch.equal(*pair) for pair in zip(before, learner.parameters(), strict=True))


@needs_gpu
def test_random_numbers_are_not_recorded() -> None:
    case = Case("dropout", lambda: nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 1)), (2,))
    with pytest.warns(FallbackWarning, match="without a CUDA graph, which failed: the model draws random numbers"):
        learner = trained(case, Engine(graph=True), "cuda")
    assert not learner.engine.graph


@needs_gpu
def test_what_asks_for_a_value_is_not_recorded() -> None:
    class Asks(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            torch.cuda.synchronize()
            return super().forward(x)

    with pytest.warns(FallbackWarning, match="without a CUDA graph"):
        learner = trained(Case("asks", lambda: Asks(2, 1), (2,)), Engine(graph=True), "cuda")
    assert not learner.engine.graph
    torch.cuda.synchronize()


@needs_gpu
@pytest.mark.parametrize("case", [MLP, CONV], ids=lambda case: case.name)
def test_the_plan_on_a_gpu_is_a_graph(case: Case) -> None:
    learner = maml(case.build().to("cuda"), case.loss, lr=case.lr, adapt=case.adapt)
    plan = fewstep.plan(learner, case.tasks(4).to("cuda"), seconds=20)
    assert plan.engine.graph
    assert plan.chosen.peak, "a graph takes memory"
