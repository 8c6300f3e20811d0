"""One iteration of training: Adam in the compiled call is PyTorch's, and what is not finite moves nothing."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fewstep import DivergenceError, Engine, FallbackWarning, InputError, Learner, Task, maml
from fewstep.functional import Tensors
from fewstep.meta_step import MetaStep

torch.manual_seed(0)
X, Y = torch.randn(4, 5, 2, dtype=torch.float64), torch.randn(4, 5, 1, dtype=torch.float64)
TASKS = Task((X, Y), (X + 1, Y))
RATES = [0.1, 0.05, 0.2]


def build(hidden: int = 4) -> Learner:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(2, hidden), nn.Tanh(), nn.Linear(hidden, 1)) if hidden else nn.Linear(2, 1)
    return maml(model.double(), functional.mse_loss, lr=0.1, steps=2 if hidden else 1, engine=Engine(compile="step"))


@pytest.fixture
def recorded_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would be compiled runs as it is."""

    def run(function: Callable[..., Any], tensors: Any) -> Callable[..., Any]:
        return torch.no_grad()(function)

    monkeypatch.setattr("fewstep.engine.compiled", run)


def by_pytorch(clip: float | None, hidden: int = 4, **options: Any) -> list[Tensor]:
    """The parameters after steps of `torch.optim.Adam` along the meta-gradient."""
    learner = build(hidden)
    learner.engine = Engine()
    optimizer = torch.optim.Adam(learner.parameters(), **options)
    for rate in RATES:
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        learner(TASKS).mean().backward()
        if clip is not None:
            torch.nn.utils.clip_grad_value_(learner.parameters(), clip)
        optimizer.step()
    return list(learner.parameters())


def assert_equal(learner: Learner, expected: list[Tensor]) -> None:
    for own, other in zip(learner.parameters(), expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("clip", [None, 0.05])
def test_adam_in_one_call_is_pytorchs(clip: float | None, recorded_only: None) -> None:
    learner = build()
    optimizer = torch.optim.Adam(learner.parameters())
    step = MetaStep(learner, optimizer, clip)
    losses = [step(TASKS, rate) for rate in RATES]
    assert len(set(map(float, losses))) == len(RATES)
    assert all(value.grad is None for value in learner.parameters()), "it was not one call"
    assert_equal(learner, by_pytorch(clip))


def test_adam_in_one_compiled_call_is_pytorchs() -> None:
    learner = build(hidden=0)
    step = MetaStep(learner, torch.optim.Adam(learner.parameters()), clip=0.05)
    for rate in RATES:
        step(TASKS, rate)
    assert learner.engine.compile == "step"
    assert_equal(learner, by_pytorch(0.05, hidden=0))


def test_adams_state_can_be_saved_and_taken_over_by_pytorchs_own(recorded_only: None) -> None:
    learner = build()
    optimizer = torch.optim.Adam(learner.parameters())
    MetaStep(learner, optimizer)(TASKS, RATES[0])
    other = build()
    other.load_state_dict(copy.deepcopy(learner.state_dict()))
    other.engine = Engine(chunk=3)
    theirs = torch.optim.Adam(other.parameters())
    theirs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step = MetaStep(other, theirs)
    for rate in RATES[1:]:
        step(TASKS, rate)
    assert_equal(other, by_pytorch(None))


@pytest.mark.parametrize("options", [{"weight_decay": 0.1}, {"amsgrad": True}, {"maximize": True}])
def test_another_adam_is_left_to_pytorch(options: dict[str, Any], recorded_only: None) -> None:
    learner = build()
    step = MetaStep(learner, torch.optim.Adam(learner.parameters(), **options))
    for rate in RATES:
        step(TASKS, rate)
    assert_equal(learner, by_pytorch(None, **options))


def test_several_processes_average_before_the_step(recorded_only: None) -> None:
    learner = build()
    seen = []

    def average(loss: Tensor, tasks: int) -> Tensor:
        seen.append(tasks)
        for value in learner.parameters():
            assert value.grad is not None
            value.grad.zero_()
        return loss

    before = [value.detach().clone() for value in learner.parameters()]
    MetaStep(learner, torch.optim.Adam(learner.parameters()), average=average)(TASKS, 0.1)
    assert seen == [4]
    assert_equal(learner, before)


@pytest.mark.parametrize("engine", [Engine(), Engine(compile="step"), Engine(compile="step", chunk=2)], ids=str)
def test_what_is_not_finite_moves_nothing(engine: Engine, recorded_only: None) -> None:
    learner = build()
    learner.engine = engine
    optimizer = torch.optim.Adam(learner.parameters())
    step = MetaStep(learner, optimizer)
    step(TASKS, 0.1)
    before, state = copy.deepcopy(learner.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])
    with pytest.raises(DivergenceError, match="the loss or the meta-gradient is not finite; lower"):
        step(Task(TASKS.support, (X, 1e200 * Y)), 0.1)
    assert all(torch.equal(before[name], value) for name, value in learner.state_dict().items())
    for number, moments in optimizer.state_dict()["state"].items():
        assert all(torch.equal(state[number][name], value) for name, value in moments.items())


class Rates(nn.Module):
    """An update rule with a rate that may be trained or not."""

    def __init__(self, trained: bool) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(0.1, dtype=torch.float64), requires_grad=trained)

    def forward(self, theta: Tensors, gradient: Tensors, state: Any, step: int) -> tuple[Tensors, Any]:
        return {name: value - self.rate * gradient[name] for name, value in theta.items()}, None


@pytest.mark.parametrize("chunk", [None, 2])
def test_what_is_frozen_stays_also_where_it_was_frozen_late(chunk: int | None, recorded_only: None) -> None:
    learners = []
    for engine in (Engine(), Engine(compile="step", chunk=chunk)):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
        learner = Learner(model, functional.mse_loss, Rates(trained=False), steps=1, engine=engine)
        step = MetaStep(learner, torch.optim.Adam(learner.parameters()))
        step(TASKS, 0.1)
        model[0].requires_grad_(False)
        frozen = copy.deepcopy(model[0].state_dict())
        step.optimizer.zero_grad()
        step(TASKS, 0.1)
        assert all(torch.equal(frozen[name], value) for name, value in model[0].state_dict().items())
        assert isinstance(learner.update, Rates)
        assert learner.update.rate.item() == 0.1
        learners.append(learner)
    assert_equal(learners[1], list(learners[0].parameters()))


def test_what_was_frozen_for_a_while_has_counted_its_own_steps(recorded_only: None) -> None:
    learners = []
    for engine in (Engine(), Engine(compile="step")):
        learner = build()
        learner.engine = engine
        step = MetaStep(learner, torch.optim.Adam(learner.parameters()))
        for number in range(8):
            learner.model[0].weight.requires_grad_(not 2 <= number < 5)  # type: ignore[index]
            step(TASKS, 0.1)
        learners.append(learner)
    assert_equal(learners[1], list(learners[0].parameters()))


def test_a_rate_that_the_rule_does_not_hold_is_refused_and_moves_where_it_can(recorded_only: None) -> None:
    rate = torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)

    def rule(theta: Tensors, gradient: Tensors, state: Any, step: int) -> tuple[Tensors, Any]:
        return {name: value - (rate.exp() if step else 0.1) * gradient[name] for name, value in theta.items()}, None

    learner = Learner(nn.Linear(2, 1).double(), functional.mse_loss, rule, steps=2, engine=Engine(compile="step"))
    with pytest.raises(InputError, match=r"the update rule depends on a parameter that it does not hold"):
        learner(TASKS)
    learner.engine = Engine(compile="pieces")
    MetaStep(learner, torch.optim.Adam([*learner.parameters(), rate]))(TASKS, 0.1)
    assert rate.item() == pytest.approx(-2.0, abs=0.11)
    assert rate.item() != -2.0


def test_rules_that_whole_steps_take_as_any_loop_does(recorded_only: None) -> None:
    rate = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)

    def later(theta: Tensors, gradient: Tensors, state: Any, step: int) -> tuple[Tensors, Any]:
        """Leaves the bias alone in the first step, and counts on its task axis in the next."""
        moved = {name: value - 0.1 * gradient[name] for name, value in theta.items()}
        assert step == 0 or len(theta["model.bias"]) == len(gradient["model.bias"])
        return ({**moved, "model.bias": theta["model.bias"]} if step == 0 else moved), state

    def outside(theta: Tensors, gradient: Tensors, state: Any, step: int) -> tuple[Tensors, Any]:
        return {name: value - rate * gradient[name] for name, value in theta.items()}, state

    def less(theta: Tensors, gradient: Tensors, state: Any, step: int) -> tuple[Tensors, Any]:
        return {"model.weight": theta["model.weight"]}, state

    torch.manual_seed(0)
    model = nn.Linear(2, 1).double()
    losses = [Learner(model, functional.mse_loss, later, steps=2, engine=engine)(TASKS)
              for engine in (Engine(), Engine(compile="step"))]  # fmt: skip
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=1e-12)
    to_adapt = Learner(model, functional.mse_loss, outside, steps=2, engine=Engine(compile="step"))
    assert not torch.equal(to_adapt.adapt((X[0], Y[0])).weight, model.weight)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"must return the tensors model.weight, model.bias"):
        Learner(model, functional.mse_loss, less, steps=2, engine=Engine(compile="step"))(TASKS)


def test_parameters_for_each_step_are_part_of_the_one_call(recorded_only: None) -> None:
    learners = []
    for engine in (Engine(), Engine(compile="step")):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
        learner = maml(model, functional.mse_loss, lr=0.1, steps=2, adapt="2.*", per_step="0.bias", engine=engine)
        step = MetaStep(learner, torch.optim.Adam(learner.parameters()))
        for rate in RATES:
            step(TASKS, rate)
        learners.append(learner)
    assert all(value.grad is None for value in learners[1].parameters()), "it was not one call"
    assert_equal(learners[1], list(learners[0].parameters()))


def test_a_parameter_beside_the_learners_keeps_the_step_from_being_one_call(recorded_only: None) -> None:
    learner, beside = build(), nn.Parameter(torch.ones(()))
    MetaStep(learner, torch.optim.Adam([*learner.parameters(), beside]))(TASKS, 0.1)
    assert all(value.grad is not None for value in learner.parameters())


def test_a_change_of_adams_constants_is_seen(recorded_only: None) -> None:
    results = []
    for engine in (Engine(), Engine(compile="step")):
        learner = build()
        learner.engine = engine
        optimizer = torch.optim.Adam(learner.parameters())
        step = MetaStep(learner, optimizer)
        for options in ({}, {"betas": (0.5, 0.9)}, {"eps": 0.1}, {"weight_decay": 0.1}):
            optimizer.param_groups[0].update(options)
            step(TASKS, 0.1)
        results.append(learner)
    assert_equal(results[1], list(results[0].parameters()))


def test_an_optimizer_of_a_part_trains_that_part_only(recorded_only: None) -> None:
    learner = build()
    names = dict(learner.named_parameters())
    own = [value for name, value in names.items() if name.endswith("bias")]
    before = {name: value.detach().clone() for name, value in names.items()}
    MetaStep(learner, torch.optim.Adam(own))(TASKS, 0.1)
    assert all(torch.equal(before[name], value) != name.endswith("bias") for name, value in names.items())


def test_where_compilation_fails_the_step_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(function: Any, tensors: Any) -> Any:
        raise RuntimeError("no compiler")

    monkeypatch.setattr("fewstep.engine.compiled", fails)
    learner = build()
    step = MetaStep(learner, torch.optim.Adam(learner.parameters()))
    with pytest.warns(FallbackWarning, match="no compiler"):
        step(TASKS, RATES[0])
    for rate in RATES[1:]:
        step(TASKS, rate)
    assert learner.engine == Engine()
    assert_equal(learner, by_pytorch(None))


class Sharing(nn.Module):
    """A rule whose rate is the model's own last bias."""

    def __init__(self, rate: nn.Parameter) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, theta: Tensors, gradient: Tensors, state: Any, step: int) -> tuple[Tensors, Any]:
        return {name: value - self.rate.mean() * gradient[name] for name, value in theta.items()}, None


def test_a_parameter_of_model_and_rule_has_both_gradients(recorded_only: None) -> None:
    learners = []
    for engine in (Engine(), Engine(compile="step")):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
        update = Sharing(nn.Module.get_parameter(model, "2.bias"))
        learner = Learner(model, functional.mse_loss, update, steps=1, adapt="~2.bias", engine=engine)
        step = MetaStep(learner, torch.optim.Adam(learner.parameters()))
        for rate in RATES:
            step(TASKS, rate)
        learners.append(learner)
    assert_equal(learners[1], list(learners[0].parameters()))
