"""Long inner loops: segments and offload change what is kept, and not one bit of the result."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.functional import mse_loss

from fewstep import FewstepError, InputError, Learner, Task, long_loop
from fewstep.engine import Engine
from fewstep.functional import Tensors
from fewstep.task import map_tensors
from fewstep.updates import SGD, Update

WAYS = [{"segment": 1}, {"segment": 3}, {"segment": 20}, {"segment": "sqrt"}, {"offload": True},
        {"segment": 3, "offload": True}]  # fmt: skip
ENGINES: list[dict[str, Any]] = [{"engine": engine} for engine in ("vmap", "loop", Engine(chunk=2))]


class Momentum(nn.Module):
    """theta' = theta - r (m v + g) with a learned rate r for each tensor, in a state of several kinds."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.rates = nn.ParameterList(torch.tensor(0.05) for _ in range(count))

    def forward(self, theta: Tensors, gradient: Tensors, state: Any, step: int) -> Any:
        state = state or {"seen": 0, "velocity": {name: torch.zeros_like(part) for name, part in gradient.items()}}
        velocity = {name: 0.9 * state["velocity"][name] + part for name, part in gradient.items()}
        rates = dict(zip(theta, self.rates, strict=True))
        scale = 1 / (1 + 0.1 * state["seen"])
        moved = {name: part - scale * rates[name] * velocity[name] for name, part in theta.items()}
        return moved, {"seen": state["seen"] + 1, "velocity": velocity}


def build(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 1)).to(dtype)


def draw(dtype: torch.dtype = torch.float64) -> Task:
    torch.manual_seed(1)
    tasks = Task(*[(torch.randn(3, 6, 2), torch.randn(3, 6, 1)) for _ in range(2)])
    result: Task = map_tensors(lambda leaf: leaf.to(dtype), tasks)
    return result


def results(learner: Learner, tasks: Task) -> list[Tensor]:
    """The query losses and the meta-gradient."""
    torch.manual_seed(2)
    losses = learner(tasks)
    return [losses.detach(), *torch.autograd.grad(losses.sum(), list(learner.parameters()))]


def assert_identical(left: list[Tensor], right: list[Tensor]) -> None:
    assert len(left) == len(right)
    assert all(map(torch.equal, left, right))


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("engine", ENGINES, ids=str)
@pytest.mark.parametrize("rule", [lambda: SGD(0.05), lambda: Momentum(4)], ids=["sgd", "momentum, learned rates"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_identical_to_the_bit(
    way: dict[str, Any], engine: dict[str, Any], rule: Callable[[], Any], dtype: torch.dtype
) -> None:
    model, tasks = build(dtype), draw(dtype)
    plain = Learner(model, mse_loss, rule(), steps=10, **engine).to(dtype)
    other = Learner(model, mse_loss, rule(), steps=10, **engine, **way).to(dtype)
    assert_identical(results(other, tasks), results(plain, tasks))


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("derivative", ["none", "finite_difference"])
@pytest.mark.parametrize("adapt", ["*", "3.*"])
def test_identical_for_every_derivative_and_with_shared_parameters(
    way: dict[str, Any], derivative: Any, adapt: str
) -> None:
    model, tasks = build(), draw()
    rule = Momentum(4 if adapt == "*" else 2).double()
    plain = Learner(model, mse_loss, rule, steps=7, derivative=derivative, adapt=adapt)
    other = Learner(model, mse_loss, rule, steps=7, derivative=derivative, adapt=adapt, **way)
    assert_identical(results(other, tasks), results(plain, tasks))


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_identical_in_forward_mode(way: dict[str, Any]) -> None:
    def tangents(**options: Any) -> list[Tensor]:
        model = build()
        learner = Learner(model, mse_loss, SGD(0.05), steps=5, **options)
        torch.manual_seed(3)
        with forward_ad.dual_level():
            for module in (model[0], model[3]):  # type: ignore[index]
                weight = module.weight
                del module.weight
                module.weight = forward_ad.make_dual(weight, torch.randn_like(weight))  # type: ignore[no-untyped-call]
            *_, theta = learner.inner_loop(draw().support, 5)
            return [forward_ad.unpack_dual(part).tangent for part in theta.values()]  # type: ignore[no-untyped-call]

    assert_identical(tangents(**way), tangents())


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_every_step_of_the_path_can_be_differentiated(way: dict[str, Any]) -> None:
    """For objectives over all steps, and for the inputs. Losses between the steps change the order of summation."""

    def gradients(**options: Any) -> list[Tensor]:
        tasks = map_tensors(lambda leaf: leaf.requires_grad_(), draw())
        learner = Learner(build().eval(), mse_loss, SGD(0.05), steps=6, **options)
        losses = [learner.query_loss(theta, 6, tasks) for theta in learner.inner_loop(tasks.support, 6)]
        inputs = [*learner.parameters(), *tasks.support, *tasks.query]
        return list(torch.autograd.grad(torch.stack(losses).sum(), inputs))

    for got, expected in zip(gradients(**way), gradients(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_graph_can_be_gone_through_again(way: dict[str, Any]) -> None:
    learner, tasks = Learner(build(), mse_loss, SGD(0.05), steps=7, **way), draw()
    losses, own = learner(tasks), list(learner.parameters())
    first = torch.autograd.grad(losses.sum(), own, retain_graph=True)
    torch.rand(5)  # the generator moves on in between
    assert_identical(list(torch.autograd.grad(losses.sum(), own)), list(first))


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_random_numbers_go_on_as_without(way: dict[str, Any]) -> None:
    def after(**options: Any) -> Tensor:
        results(Learner(build(), mse_loss, SGD(0.05), steps=7, **options), draw())
        return torch.rand(3)

    assert torch.equal(after(**way), after())


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_adapting_without_a_graph_is_the_same(way: dict[str, Any]) -> None:
    tasks = draw()
    plain, other = (Learner(build().eval(), mse_loss, SGD(0.05), steps=7, **options) for options in ({}, way))
    assert_identical([point.loss for point in other.path(tasks)], [point.loss for point in plain.path(tasks)])
    x, y = (part[0] for part in tasks.support)
    assert_identical(list(other.adapt((x, y)).parameters()), list(plain.adapt((x, y)).parameters()))


class Counting:
    """Gradient descent that counts how many of its results are held at a time, in the backward pass as well."""

    def __init__(self) -> None:
        self.held: list[StorageWeakRef] = []
        self.peak = 0

    def __call__(self, theta: Tensors, gradient: Tensors, state: Any, step: int) -> Any:
        theta, state = SGD(0.01)(theta, gradient, None, step)
        first = next(iter(theta.values()))
        self.held = [part for part in self.held if not part.expired()]  # type: ignore[no-untyped-call]
        self.held.append(StorageWeakRef(first.untyped_storage()))  # type: ignore[no-untyped-call]
        self.peak = max(self.peak, len(self.held))
        return theta, state


@pytest.mark.parametrize(
    ("way", "steps", "least", "most"),
    [
        ({}, 144, 144, 145),
        ({"segment": "sqrt"}, 144, 22, 28),  # 12 ends of segments, 12 steps of the segment at hand
        ({"segment": "sqrt"}, 576, 46, 52),  # four times the steps, twice the tensors
        ({"segment": 36}, 144, 38, 44),
        ({"offload": True}, 144, 1, 4),
        ({"offload": True, "segment": "sqrt"}, 144, 12, 17),
    ],
)
def test_how_many_steps_are_kept(way: dict[str, Any], steps: int, least: int, most: int) -> None:
    update = Counting()
    learner = Learner(nn.Linear(2, 1), mse_loss, update, steps=steps, **way)
    learner(draw(torch.float32)).sum().backward()
    assert least <= update.peak <= most
    gc.collect()
    assert sum(not part.expired() for part in update.held) <= 1  # type: ignore[no-untyped-call]


def test_each_step_keeps_theta_once_and_no_random_state() -> None:
    """What autograd keeps of a step is theta; the parameters and the batch are references."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    tasks = draw()
    learner = Learner(build(), mse_loss, SGD(0.01), steps=50)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        *_, theta = learner.inner_loop(tasks.support, 50)
    fixed = {tensor.data_ptr() for tensor in (*learner.parameters(), *tasks.support)}
    kept = {tensor.data_ptr(): tensor.numel() for tensor in saved if tensor.data_ptr() not in fixed}
    assert sum(kept.values()) == 49 * sum(part.numel() for part in theta.values())

    node: Any = next(iter(theta.values())).grad_fn
    inner = next(parent for parent, _ in node.next_functions if hasattr(parent, "moment"))
    assert inner.moment.cpu is not None  # dropout draws
    quiet = Learner(build().eval(), mse_loss, SGD(0.01), steps=1)
    *_, theta = quiet.inner_loop(tasks.support, 1)
    node = next(iter(theta.values())).grad_fn
    inner = next(parent for parent, _ in node.next_functions if hasattr(parent, "moment"))
    assert inner.moment.cpu is None


def test_what_is_offloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """theta of each step goes to the host once; the meta-parameters, the shared parameters and the batch stay."""
    moved: list[Tensor] = []
    copy = long_loop.to_host

    def counted(tensor: Tensor) -> Tensor:
        moved.append(copy(tensor))
        assert moved[-1].data_ptr() != tensor.data_ptr()
        return moved[-1]

    monkeypatch.setattr(long_loop, "to_host", counted)
    learner = Learner(build(), mse_loss, SGD(0.05), steps=5, adapt="3.*", offload=True)
    learner(draw()).sum().backward()
    assert [tuple(part.shape) for part in moved] == [(3, 1, 8), (3, 1)] * 4
    moved.clear()
    learner = Learner(build(), mse_loss, SGD(0.05), steps=5, adapt="3.*", offload=True, segment=2)
    learner(draw()).sum().backward()
    assert [tuple(part.shape) for part in moved] == [(3, 1, 8), (3, 1)] * 2


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_a_copy_on_the_host_is_equal(form: torch.memory_format) -> None:
    tensor = torch.randn(2, 3, 4, 5, requires_grad=True).contiguous(memory_format=form)
    copy = long_loop.to_host(tensor)
    assert torch.equal(copy, tensor)
    assert copy.stride() == tensor.stride()
    assert not copy.requires_grad


@pytest.mark.parametrize("hooks", [save_on_cpu, lambda: saved_tensors_hooks(Tensor.clone, Tensor.clone)])
@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_hooks_of_the_user_may_be_around(hooks: Callable[[], Any], engine: dict[str, Any]) -> None:
    learner, tasks = Learner(build(), mse_loss, SGD(0.05), steps=5, **engine), draw()
    expected = results(learner, tasks)
    with hooks():
        assert_identical(results(learner, tasks), expected)


class Quadratic(nn.Module):
    """L = a (w - c)^2 / 2, so that K steps of gradient descent give w' - c = (1 - alpha a)^K (w - c)."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, -2.0], dtype=torch.float64))

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return (0.5 * batch["a"] * (self.w - batch["c"]).square()).sum()


@pytest.mark.parametrize("way", [{}, {"segment": "sqrt"}, {"offload": True}], ids=str)
def test_a_thousand_steps_reach_the_closed_form(way: dict[str, Any]) -> None:
    a = torch.tensor([[1.0, 0.3], [0.7, 0.1]], dtype=torch.float64)
    c = torch.tensor([[0.5, 1.0], [-1.0, 2.0]], dtype=torch.float64)
    batch, alpha, steps = {"a": a, "c": c}, 1e-3, 1000
    model = Quadratic()
    learner = Learner(model, lambda model, batch: model(batch), SGD(alpha), steps=steps, **way)
    losses = learner(Task(batch, batch))
    gap = (1 - alpha * a) ** steps * (model.w.detach() - c)
    torch.testing.assert_close(losses.detach(), (0.5 * a * gap.square()).sum(1), rtol=1e-11, atol=0)
    losses.sum().backward()
    expected = ((1 - alpha * a) ** steps * a * gap).sum(0)
    torch.testing.assert_close(model.w.grad, expected, rtol=1e-11, atol=0)


@pytest.mark.parametrize("way", [{}, {"segment": 1}, {"offload": True, "segment": 1}], ids=str)
def test_a_long_graph_can_be_dropped(way: dict[str, Any]) -> None:
    """Thousands of nodes that own each other are let go of without a stack overflow."""
    batch = {"a": torch.ones(1, 2).double(), "c": torch.zeros(1, 2).double()}
    learner = Learner(Quadratic(), lambda model, batch: model(batch), SGD(1e-3), steps=3000, **way)
    losses = learner(Task(batch, batch))
    assert losses.requires_grad
    del losses


# What would be wrong is refused.


class Hidden:
    """Momentum that keeps its velocity in itself."""

    def __call__(self, theta: Tensors, gradient: Tensors, state: Any, step: int) -> Any:
        old = self.velocity if step else dict.fromkeys(theta, 0.0)
        self.velocity: Any = {name: 0.9 * old[name] + part.detach() for name, part in gradient.items()}
        return {name: part - 0.1 * self.velocity[name] for name, part in theta.items()}, None


def in_place(theta: Tensors, gradient: Tensors, state: Any, step: int) -> Any:
    """Momentum that writes to its state."""
    state = state or {name: torch.zeros_like(part) for name, part in gradient.items()}
    for name, part in gradient.items():
        state[name].mul_(0.9).add_(part.detach())
    return {name: part - 0.1 * state[name] for name, part in theta.items()}, state


class Tiring:
    """A rate that falls with each call."""

    calls = 0

    def __call__(self, theta: Tensors, gradient: Tensors, state: Any, step: int) -> Any:
        self.calls += 1
        return {name: part - 0.1 / self.calls * gradient[name] for name, part in theta.items()}, None


@pytest.mark.parametrize("update", [Hidden(), in_place, Tiring()], ids=["hidden", "in place", "tiring"])
def test_a_rule_with_a_memory_of_its_own_is_refused(update: Update) -> None:
    results(Learner(build(), mse_loss, update, steps=4), draw())
    with pytest.raises(InputError, match="the update rule gave different results"):
        Learner(build(), mse_loss, update, steps=4, segment=2)(draw())


def test_a_rule_that_draws_random_numbers_is_repeated() -> None:
    def noisy(theta: Tensors, gradient: Tensors, state: Any, step: int) -> Any:
        return {name: part - 0.1 * torch.rand(()) * gradient[name] for name, part in theta.items()}, state

    plain = Learner(build(), mse_loss, noisy, steps=9)
    other = Learner(build(), mse_loss, noisy, steps=9, segment=4)
    expected = results(plain, draw())
    assert_identical(results(other, draw()), expected)


def test_a_rate_outside_the_rule_gets_its_gradient() -> None:
    """Autograd finds it, also where the rule does not own it."""
    rate = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)

    def rule(theta: Tensors, gradient: Tensors, state: Any, step: int) -> Any:
        return {name: part - rate.exp() * gradient[name] for name, part in theta.items()}, state

    found = []
    ways: list[dict[str, Any]] = [{}, {"segment": 2}, {"offload": True}]
    for way in ways:
        losses = Learner(build().eval(), mse_loss, rule, steps=5, **way)(draw())
        found.append(torch.autograd.grad(losses.sum(), rate)[0])
    assert found[0] != 0
    assert torch.equal(found[1], found[0])
    assert torch.equal(found[2], found[0])


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("what", ["shared", "batch"])
def test_writing_between_forward_and_backward_is_refused(way: dict[str, Any], what: str) -> None:
    learner, tasks = Learner(build(), mse_loss, SGD(0.05), steps=4, adapt="3.*", **way), draw()
    losses = learner(tasks)
    with torch.no_grad():
        (learner.model[0].weight if what == "shared" else tasks.support[0]).mul_(2)  # type: ignore[index]
    with pytest.raises((RuntimeError, InputError), match=r"modified by an inplace operation|was written in place"):
        losses.sum().backward()


def test_replacing_a_parameter_between_forward_and_backward_is_refused() -> None:
    learner = Learner(build(), mse_loss, SGD(0.05), steps=4, adapt="3.*", segment=2)
    own = {name: value.detach().clone().requires_grad_() for name, value in learner.named_parameters()}
    losses = torch.func.functional_call(learner, own, (draw(),))
    with pytest.raises(InputError, match="was replaced between forward and backward"):
        losses.sum().backward()


@pytest.mark.parametrize("derivative", ["exact", "none"])
def test_another_mode_in_the_backward_pass_is_refused(derivative: Any) -> None:
    learner = Learner(build(), mse_loss, Momentum(4).double(), steps=4, segment=2, derivative=derivative)
    losses = learner(draw())
    learner.eval()
    with pytest.raises(InputError, match="from train to eval mode"):
        losses.sum().backward()


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_second_derivative_is_refused(way: dict[str, Any]) -> None:
    losses = Learner(build(), mse_loss, SGD(0.05), steps=4, **way)(draw())
    with pytest.raises(InputError, match="differentiated once only"):
        losses.sum().backward(create_graph=True)


@pytest.mark.parametrize("way", [{"segment": 0}, {"segment": "root"}, {"segment": 2.0}, {"segment": True},
                                 {"offload": 1}])  # fmt: skip
def test_other_options_are_refused(way: dict[str, Any]) -> None:
    with pytest.raises(FewstepError, match=f"{next(iter(way))} must be"):
        Learner(build(), mse_loss, SGD(0.05), steps=4, **way)
