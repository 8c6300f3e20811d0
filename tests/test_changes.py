"""What changes under a learner's feet, and what hides from a derivative: right, or an error that says so."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep import Task
from fewstep.engine import Engine
from fewstep.errors import FallbackWarning, InputError
from tests.reference import relative_error
from tests.small import LOOP, Net, draw, gradient, learned, naive_gradient, pruned


@pytest.mark.parametrize("engine", [Engine(), LOOP, Engine(method="loop", compile="pieces")], ids=str)
def test_inference_mode_is_refused_and_leaves_nothing_behind(engine: Engine) -> None:
    """There enable_grad has no effect: a plain loop would take every gradient for zero."""
    learner, tasks = learned(Net(), engine), draw()
    with torch.inference_mode():
        inside = draw()
        for call in (learner, learner.path, lambda t: learner.adapt((t.support[0][0], t.support[1][0]))):
            with pytest.raises(InputError, match=r"use torch.no_grad\(\)"):
                call(tasks)
    with pytest.raises(InputError, match="clone it"):
        learner(inside)
    assert relative_error(gradient(learner), gradient(learned(Net()))) < 1e-12


CHANGES: dict[str, Callable[[Any], Any]] = {
    "attribute": lambda model: setattr(model, "use_other", True),
    "buffer written": lambda model: model.mask.mul_(0.5),
    "buffer replaced": lambda model: setattr(model, "mask", torch.zeros(6, dtype=torch.float64)),
    "frozen parameter written": lambda model: model.offset.add_(1.0),
    "hook": lambda model: model.a.register_forward_hook(lambda module, inputs, output: 2 * output),
}


@pytest.mark.parametrize("engine", [Engine(), LOOP, Engine(chunk=1), Engine(product="forward")], ids=str)
@pytest.mark.parametrize("change", CHANGES.values(), ids=list(CHANGES))
def test_what_changes_before_the_backward_pass_is_refused(change: Callable[[Any], Any], engine: Engine) -> None:
    """The backward pass computes the inner gradients again."""
    model = Net()
    losses = learned(model, engine)(draw())
    change(model)
    with pytest.raises(InputError, match="between forward and backward pass"):
        losses.sum().backward()


class Busy(Net):
    """Counts, keeps its features, and keeps a table that grows: none of it decides the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.options, self.table = 0, {"p": 0.0}, torch.zeros(0)
        self.features: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.options = {"p": 0.0}
        self.features = self.a(x).tanh()
        if len(self.table) < len(x):
            self.table = torch.arange(len(x), dtype=x.dtype).unsqueeze(1)
        return self.head(self.features + self.table[: len(x)])


def test_what_forward_passes_change_themselves_may_change() -> None:
    one, more = draw(), draw(2)
    wider = Task(support=one.support, query=tuple(torch.cat([part, part], 1) for part in more.query))
    learner, alone = learned(Busy(), LOOP), learned(Busy(), LOOP)
    own, others = ([value for value in part.parameters() if value.requires_grad] for part in (learner, alone))
    got = torch.autograd.grad(learner(one).sum() + learner(wider).sum(), own, allow_unused=True)
    each = [torch.autograd.grad(alone(tasks).sum(), others, allow_unused=True) for tasks in (one, wider)]
    for both, first, second in zip(got, *each, strict=True):
        assert (both is None and first is None) or torch.allclose(both, first + second, rtol=1e-12)
    x, y = one.support
    assert learner.adapt((x[0], y[0]))(x[0]).shape == (5, 2)  # the features of another forward pass are no obstacle


class Straight(Net):
    """Straight-through rounding, as it used to be written."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.head((h + ((2 * h).round() / 2 - h).data).tanh())


@pytest.mark.parametrize("engine", [Engine(), Engine(chunk=1), Engine(compile="pieces")], ids=str)
def test_data_hides_from_all_derivatives(engine: Engine) -> None:
    """Under torch.func, PyTorch's own `x.data` hides x from the innermost one only."""
    x = torch.tensor(3.0)
    assert torch.func.grad(torch.func.grad(lambda v: v * v.data * v))(x) != torch.func.grad(
        torch.func.grad(lambda v: v * v.detach() * v)
    )(x)  # should PyTorch mend it, the replacement can go
    assert relative_error(gradient(learned(Straight(), engine)), gradient(learned(Straight(), LOOP))) < 1e-12


def test_what_hides_from_some_derivatives_is_refused_where_it_does() -> None:
    class InPlace(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x).tanh()
            k = 1 * h
            k.detach_()
            return self.head(h + k**2)

    class Without(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x).tanh()
            with torch.no_grad():
                mean = self.a(x).mean(0)
            return self.head(h - mean)

    class Reversed(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x).tanh()
            if h.requires_grad:
                h.register_hook(lambda gradient: -0.5 * gradient)
            return self.head(h)

    with pytest.raises(InputError, match="a hook that the model puts on a tensor"):
        learned(Reversed())(draw())
    model, tasks = Reversed(), draw()
    truth = naive_gradient(model, tasks, ["a.weight", "a.bias", "b.weight", "b.bias"])
    assert relative_error(gradient(learned(model, LOOP), tasks), truth) < 1e-12
    with pytest.raises(InputError, match=r"write x = x.detach\(\)"):
        learned(InPlace())(draw())
    assert gradient(learned(InPlace(), LOOP)).isfinite().all()
    with pytest.raises(InputError, match="use product='reverse'"):
        learned(Without(), Engine(product="forward"))(draw())
    assert relative_error(gradient(learned(Without())), gradient(learned(Without(), LOOP))) < 1e-12


class Asking(Net):
    def __init__(self, how: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(2.0, dtype=torch.float64))
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.a(x).tanh()) / (1 + self.how(self.get_buffer("scale")))
        return result


@pytest.mark.parametrize("compile_", ["pieces", "step"])
@pytest.mark.parametrize("how", [Tensor.item, Tensor.tolist, float, bool], ids=["item", "tolist", "float", "bool"])
def test_the_value_of_a_buffer_is_no_constant(how: Callable[[Tensor], Any], compile_: Any) -> None:
    model = Asking(how)
    learner = learned(model, Engine(compile=compile_))
    with pytest.warns(FallbackWarning, match="asks for the value of a tensor that it holds"):
        gradient(learner)
    model.load_state_dict({**model.state_dict(), "scale": torch.tensor(0.0, dtype=torch.float64)})
    assert relative_error(gradient(learner), gradient(learned(model))) < 1e-12


def tied() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 2)).double()
    model[2].weight = model[0].weight
    return model


def untie(model: Any) -> None:
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)


LATE: dict[str, tuple[Callable[[], nn.Module], Callable[[Any], Any], str]] = {
    "unfrozen": (Net, lambda model: model.offset.requires_grad_(True), "'offset' was frozen"),
    "pruned": (Net, pruned, "came or went"),
    "bias removed": (Net, lambda model: setattr(model.a, "bias", None), "came or went"),
    "untied": (tied, untie, "are tied no more"),
    "tied": (Net, lambda model: setattr(model.other, "weight", model.b.weight), "were tied"),
}


@pytest.mark.parametrize(("build", "change", "said"), LATE.values(), ids=list(LATE))
def test_a_structure_that_changes_is_refused(build: Any, change: Any, said: str) -> None:
    model = build()
    learner = learned(model)
    gradient(learner)
    change(model)
    with pytest.raises(InputError, match=f"{said}.*build the learner again"):
        learner(draw())


@pytest.mark.parametrize("name", ["model", "loss", "inner_loss"])
def test_what_a_learner_was_built_on_is_not_replaced(name: str) -> None:
    learner = learned(Net())
    with pytest.raises(InputError, match=re.escape(f"built on its {name}")):
        setattr(learner, name, Net())
