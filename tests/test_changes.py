"""What changes under a learner's feet, and what hides from a derivative: right, or an error that says so."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import prune

from fewstep import Learner, Task, anil, maml
from fewstep.engine import Engine
from fewstep.errors import FallbackWarning, InputError
from fewstep.functional import Tensors
from tests.reference import descended, forward_of, meta_gradient, one_by_one, relative_error, value_of

LOOP = Engine(method="loop")


def draw(seed: int = 1) -> Task:
    torch.manual_seed(seed)
    x, y = torch.randn(2, 3, 5, 4, dtype=torch.float64), torch.randn(2, 3, 5, 2, dtype=torch.float64)
    return Task(support=(x[0], y[0]), query=(x[1], y[1]))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.other = nn.Linear(4, 6).double(), nn.Linear(6, 2).double(), nn.Linear(6, 2).double()
        self.register_buffer("mask", torch.ones(6, dtype=torch.float64))
        self.offset = nn.Parameter(torch.zeros(6, dtype=torch.float64), requires_grad=False)
        self.use_other = False

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.a(x).tanh() * self.mask + self.offset)

    def head(self, hidden: Tensor) -> Tensor:
        result: Tensor = (self.other if self.use_other else self.b)(hidden)
        return result


def learned(model: nn.Module, engine: Engine | None = None, **options: Any) -> Learner:
    return maml(model, functional.mse_loss, lr=0.1, steps=2, engine=engine or Engine(), **options)


def gradient(learner: Learner, tasks: Task | None = None) -> Tensor:
    own = [value for value in learner.parameters() if value.requires_grad]
    return meta_gradient(learner(tasks or draw()), own)


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


def pruned(model: Net) -> Net:
    prune.l1_unstructured(model.a, "weight", 0.4)  # type: ignore[no-untyped-call]
    return model


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


class Force(nn.Module):
    """A force field: the slope of an energy."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.energy = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1, bias=False)).double()

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0][:, :2]


def test_a_model_may_take_derivatives_itself() -> None:
    """A leaf that a forward pass makes is no parameter that would be lost."""
    model, tasks = Force(), draw()
    value = value_of(forward_of(model), functional.mse_loss)
    total = torch.zeros((), dtype=torch.float64)
    for task in one_by_one(tasks):
        theta: Tensors = dict(model.named_parameters())
        for _ in range(2):
            theta = descended(value, theta, [*theta], task.support, 0.1)
        total = total + value(theta, task.query)
    expected = meta_gradient(total, list(model.parameters()))
    assert relative_error(gradient(learned(model, LOOP)), expected) < 1e-12


def test_parts_of_different_precision() -> None:
    class Mixed(Net):
        def forward(self, x: Tensor) -> Tensor:
            hidden: Tensor = self.a(x.float()).tanh()
            return self.head(hidden.double())

    mixed = Mixed()
    mixed.a.float()
    got = gradient(learned(mixed, adapt="b.*"))
    assert relative_error(got.double(), gradient(learned(Net(), adapt="b.*"))) < 1e-5


@pytest.mark.filterwarnings("ignore::fewstep.FallbackWarning")
def test_transformer_layers_in_eval_mode() -> None:
    """Where only the head adapts, nothing tells PyTorch under vmap that their fused path has no second derivative."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).double()
            self.out = nn.Linear(4, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.out(self.layer(x).mean(1))
            return result

    tasks = draw()
    x = torch.randn(3, 5, 6, 4, dtype=torch.float64)
    tasks = Task(support=(x, tasks.support[1]), query=(x.flip(1), tasks.query[1]))
    grads = [gradient(learned(Encoder().eval(), engine, adapt="out.*"), tasks) for engine in (Engine(), LOOP)]
    assert relative_error(*grads) < 1e-12


def test_clear_words_for_models_and_rates_that_do_not_go() -> None:
    with pytest.raises(InputError, match=r"fewstep\.meta_sgd"):
        maml(Net(), functional.mse_loss, lr=torch.tensor(0.1))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"torch.jit.*hand in the module"):
        maml(torch.jit.script(nn.Sequential(nn.Linear(4, 2))), functional.mse_loss, lr=0.1)
    model = nn.Module()
    model.embedding, model.head = nn.Embedding(7, 4), nn.Linear(4, 7)
    model.head.weight = model.embedding.weight
    with pytest.raises(InputError, match=r"'head\.weight' of the head is a parameter of the body as well"):
        anil(model, functional.cross_entropy, lr=0.1)
    with pytest.raises(
        InputError, match=r"'head\.weight' is the same parameter as 'embedding\.weight', which does not"
    ):
        maml(model, functional.cross_entropy, lr=0.1, adapt="head.*")


def test_a_pruned_model_adapts() -> None:
    model = pruned(Net())
    learner, tasks = learned(model), draw()
    assert gradient(learner).isfinite().all()
    x, y = tasks.support
    adapted = learner.adapt((x[0], y[0]))
    expected = learner.path(Task(tasks.support, tasks.support))[-1].prediction
    assert expected is not None
    assert torch.allclose(adapted(x[0]), expected[0])
