"""Engines: wrong choices, what a compiled function notices, convolutions by other means, precision."""

from __future__ import annotations

import copy
import functools
import random
import warnings
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional
from torch.nn.modules.module import register_module_forward_hook

import fewstep
from fewstep import InputError, Learner, Task, maml
from fewstep.channels_last import conv2d_channels_last
from fewstep.convolution import conv2d_by_matmul
from fewstep.engine import Engine
from fewstep.errors import FallbackWarning
from fewstep.pooling import max_pool2d_by_comparison
from fewstep.reach import is_holder, within
from fewstep.updates import SGD, Clipped
from fewstep.watch import Watch
from tests.reference import meta_gradient, relative_error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "map"}, "method must be one of"),
        ({"chunk": 0}, "chunk must be at least 1 task, but 0 came"),
        ({"chunk": 2.0}, "chunk must be at least 1 task, but 2.0 came"),
        ({"compile": True}, "compile must be one of"),
        ({"convolution": "fft"}, "convolution must be one of"),
        ({"precision": "half"}, "precision must be one of"),
        ({"method": "loop", "product": "forward"}, "needs the method 'vmap'"),
        ({"compile": "step", "product": "forward"}, "has no part in a whole step"),
        ({"method": "loop", "chunk": 4}, "takes one task at a time, but chunk=4 came"),
        ({"convolution": "channels_last"}, "use 'loop' or 'matmul'"),
        ({"keep": "yes"}, "keep must be one of"),
        ({"keep": True}, "needs compile='pieces' and product='reverse', but compile='no' and product='reverse' came"),
    ],
)
def test_wrong_engines(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Engine(**options)


@pytest.mark.parametrize(
    ("options", "engine"),
    [
        ({"derivative": "finite_difference"}, Engine(compile="step")),
        ({"segment": "sqrt"}, Engine(compile="step")),
        ({"derivative": "finite_difference"}, Engine(precision="bfloat16")),
    ],
)
def test_engines_that_do_not_fit_the_learner(options: dict[str, Any], engine: Engine) -> None:
    with pytest.raises(InputError, match="use"):
        maml(fewstep.models.mlp(), functional.mse_loss, lr=0.1, engine=engine, **options)


def test_engines_may_be_words_and_nothing_else() -> None:
    learner = maml(fewstep.models.mlp(), functional.mse_loss, lr=0.1)
    learner.engine = "loop"
    assert learner.engine == Engine(method="loop")
    with pytest.raises(InputError, match="method must be one of"):
        learner.engine = "fast"  # type: ignore[assignment]


def test_bfloat16_where_it_is_of_no_use(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(precision="bfloat16")
    with pytest.raises(InputError, match="autocast leaves float64 as it is"):
        maml(fewstep.models.mlp().double(), functional.mse_loss, lr=0.1, engine=engine)
    for units in (False, True):
        monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": units, "amx_bf16": False})  # noqa: B023
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            maml(fewstep.models.mlp(), functional.mse_loss, lr=0.1, engine=engine)
        assert ["no units for bfloat16" in str(each.message) for each in told] == ([] if units else [True])


def ones(*shape: int) -> Task:
    x = torch.ones(2, *shape, dtype=torch.float64)
    return Task((x, 2 * x), (x, 2 * x))


class Scaled(nn.Linear):
    """A model with a plain attribute and a buffer that decide what it computes."""

    def __init__(self) -> None:
        super().__init__(1, 1)
        self.double()
        nn.init.ones_(self.weight)
        self.scale = 1.0
        self.bias.requires_grad_(False)
        self.shift = nn.Buffer(torch.zeros(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale + self.shift


def test_what_is_compiled_follows_attributes_buffers_and_weights() -> None:
    model = Scaled()
    compiled = maml(model, functional.mse_loss, lr=0.1, engine=Engine(compile="step"))
    eager = maml(model, functional.mse_loss, lr=0.1)
    tasks = ones(3, 1)
    assert torch.allclose(compiled(tasks), eager(tasks), atol=1e-12)
    model.scale = 3.0
    assert torch.allclose(compiled(tasks), eager(tasks), atol=1e-12)
    model.shift.fill_(0.5)
    assert torch.allclose(compiled(tasks), eager(tasks), atol=1e-12)
    model.shift = nn.Buffer(torch.full((1,), -0.5, dtype=torch.float64))
    model.weight.data.fill_(2.0)
    model.bias.data = torch.full((1,), 0.25, dtype=torch.float64)
    assert torch.allclose(compiled(tasks), eager(tasks), atol=1e-12)
    assert compiled.engine.compile == "step"


@pytest.mark.parametrize("compile", ["pieces", "step"])
def test_another_rule_is_not_taken_for_the_old_one(compile: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewstep.engine.compiled", lambda function, tensors: function)
    model, tasks = nn.Linear(1, 1).double(), ones(3, 1)
    learner = maml(model, functional.mse_loss, lr=0.1, engine=Engine(compile=compile))
    learner(tasks)
    learner.update = SGD(0.01)
    assert torch.allclose(learner(tasks), maml(model, functional.mse_loss, lr=0.01)(tasks), atol=1e-12)


def test_a_function_in_the_place_of_a_dead_one_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewstep.engine.compiled", lambda function, tensors: function)
    model: Any = nn.Linear(1, 1).double()
    learner = maml(model, functional.mse_loss, lr=0.1, engine=Engine(compile="step"))
    known = set()
    for number in range(20):
        model.activation = eval(f"lambda x: x + {number}")  # each may be put where the last one was
        learner(ones(3, 1))
        known.add(learner.runner._world)
    assert len(known) == 20


def test_a_derivative_that_is_set_later_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewstep.engine.compiled", lambda function, tensors: function)

    class Normed(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return functional.batch_norm(super().forward(x), None, None, None, self.bias, training=True)

    learner = maml(Normed(1, 1), functional.mse_loss, lr=0.1, derivative="none", engine=Engine(compile="pieces"))
    tasks = Task(*[(torch.randn(2, 3, 1), torch.randn(2, 3, 1)) for _ in range(2)])
    learner(tasks)
    learner.derivative = "exact"
    with pytest.raises(InputError, match="loses second derivatives"):
        learner(tasks)
    learner.derivative, learner.engine = "exact", Engine(compile="step")
    learner.derivative = "finite_difference"
    with pytest.raises(InputError, match="work step by step"):
        learner(tasks)


def test_a_frozen_start_passes_on_all_derivatives() -> None:
    """What adapts is frozen after the learner was built: the inner gradient still depends on what is shared."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    tasks = Task(*[(torch.randn(2, 4, 2).double(), torch.randn(2, 4, 1).double()) for _ in range(2)])
    gradients = []
    for engine in (Engine(method="loop"), Engine(method="loop", compile="step"), Engine(compile="step")):
        model.requires_grad_(True)
        learner = maml(model, functional.mse_loss, lr=0.1, adapt="2.*", engine=engine)
        model[2].requires_grad_(False)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("fewstep.engine.compiled", lambda function, tensors: function)
            gradients.append(torch.autograd.grad(learner(tasks).sum(), list(model[0].parameters())))
    for other in gradients[1:]:
        for mine, own in zip(other, gradients[0], strict=True):
            torch.testing.assert_close(mine, own, rtol=1e-10, atol=1e-12)


def test_a_frozen_tensor_of_another_type_is_refused_once_compiled() -> None:
    model = Scaled()
    learner = maml(model, functional.mse_loss, lr=0.1, engine=Engine(compile="step"))
    learner(ones(3, 1))
    model.bias.data = model.bias.data.float()
    with pytest.raises(InputError, match="another type, shape or device than when this was compiled"):
        learner(ones(3, 1))


class Random(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (1 + 0 * random.random())


class Deciding(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2.0 if float(self.weight.detach().sum()) > 1e9 else 1.0)


@pytest.mark.parametrize(
    ("kind", "method", "reason"), [(Random, "vmap", "Python's or NumPy's random"), (Deciding, "loop", "which failed")]
)
def test_what_cannot_be_recorded_is_announced_once_and_runs_eagerly(kind: Any, method: Any, reason: str) -> None:
    model, tasks = kind(1, 1).double(), ones(3, 1)
    learner = maml(model, functional.mse_loss, lr=0.1, engine=Engine(compile="step", method=method))
    with pytest.warns(FallbackWarning, match=f"running without compilation.*{reason}"):
        loss = learner(tasks)
    assert torch.equal(loss, maml(model, functional.mse_loss, lr=0.1, engine=method)(tasks))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learner(tasks)
    assert learner.engine == Engine(method=method)


FACTOR = 2.0


def test_watch_sees_closures_globals_partials_and_replaced_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    factor = 1.0

    def loss(prediction: Tensor, target: Tensor) -> Tensor:
        return (prediction * factor * FACTOR - target).square().mean()

    layer = nn.BatchNorm1d(2)
    watch = Watch([layer, loss])
    seen = [watch.values()]
    assert watch.values() == seen[0]
    factor = 3.0
    seen.append(watch.values())
    monkeypatch.setitem(globals(), "FACTOR", 5.0)
    seen.append(watch.values())
    layer.eval()
    seen.append(watch.values())
    layer.running_mean = torch.ones(2)
    seen.append(watch.values())
    layer.extra = 1  # type: ignore[assignment]
    seen.append(watch.values())
    del layer.eps
    seen.append(watch.values())
    layer.sizes = [1, 2]  # type: ignore[assignment]
    seen.append(watch.values())
    layer.sizes = [1, 2]  # type: ignore[assignment]
    seen.append(watch.values())
    assert all(a != b for i, a in enumerate(seen) for b in seen[:i])


def test_watch_sees_hooks_of_forward_passes() -> None:
    """What was compiled has no hook in it that came later, which PyTorch calls without being told."""
    factor = 2.0

    def scaled(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return factor * output

    layer = nn.Linear(1, 1)
    watch = Watch([nn.Sequential(layer)])
    seen = [watch.values()]
    hooks = [layer.register_forward_hook(scaled)]
    seen.append(watch.values())
    factor = 3.0
    seen.append(watch.values())
    hooks.append(layer.register_forward_pre_hook(lambda module, inputs: None))
    seen.append(watch.values())
    hooks.append(register_module_forward_hook(scaled))  # type: ignore[arg-type]
    seen.append(watch.values())
    assert all(a != b for i, a in enumerate(seen) for b in seen[:i])
    assert watch.values() == seen[-1]
    for hook in hooks:
        hook.remove()
    assert watch.values() != seen[-1]


@pytest.mark.parametrize("compiled", ["pieces", "step"])
def test_a_hook_that_came_after_compiling_runs(compiled: Any) -> None:
    model, tasks = nn.Sequential(nn.Linear(1, 1)).double(), ones(3, 1)
    learner = maml(model, functional.mse_loss, lr=0.1, engine=Engine(compile=compiled))
    before = learner(tasks)
    model[0].register_forward_hook(lambda module, inputs, output: 3 * output)
    after = learner(tasks)
    assert not torch.allclose(after, before)
    assert torch.allclose(after, maml(model, functional.mse_loss, lr=0.1)(tasks), rtol=1e-12)


SETTINGS: dict[str, Any] = {"scale": 1.0, "deep": SimpleNamespace(scale=1.0)}
SHIFT, TURN, out = 1.0, 1.0, 0.0


class Fixed:
    gain = 1.0


@functools.wraps(functional.mse_loss)
def shifted(x: Tensor) -> Tensor:
    return torch.stack([row + SHIFT for row in x]) * Fixed.gain


class Configured(nn.Module):
    """A model that reads numbers wherever people keep them."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(1, 1)
        self.config: Any = SimpleNamespace(scale=1.0, more={"scale": 1.0}, losses=[0.0], act=torch.relu)
        self.log: dict[str, float] = {}

    @property
    def scale(self) -> Any:
        return self.config.scale * TURN

    def forward(self, x: Tensor) -> Any:
        return self.config.act(self.scale * self.scaled(self.out(x)) + 1)

    def scaled(self, x: Tensor) -> Any:
        return shifted(x) * self.config.more["scale"] * SETTINGS["scale"] * SETTINGS["deep"].scale


def _set(name: str, value: float) -> Callable[[Any], object]:
    return lambda model: globals().__setitem__(name, value)


@pytest.mark.parametrize("change", [
    lambda model: setattr(model.config, "scale", 3.0),
    lambda model: model.config.more.update(scale=3.0),
    lambda model: SETTINGS.update(scale=3.0),
    lambda model: setattr(SETTINGS["deep"], "scale", 3.0),
    _set("SHIFT", 3.0),
    _set("TURN", 3.0),
    lambda model: setattr(model.config, "act", torch.tanh),
    lambda model: setattr(Fixed, "gain", 3.0),
])  # fmt: skip
def test_a_compiled_model_follows_its_configuration(change: Callable[[Any], object],
                                                    monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    for name, value in (("SETTINGS", copy.deepcopy(SETTINGS)), ("SHIFT", 1.0), ("TURN", 1.0)):
        monkeypatch.setitem(globals(), name, value)
    monkeypatch.setattr(Fixed, "gain", 1.0)
    compilations: list[Any] = []

    def recorded(function: Any, examples: Any) -> Any:
        compilations.append(make_fx(function)(*examples))
        return compilations[-1]

    monkeypatch.setattr("fewstep.engine.compiled", recorded)
    model, tasks = Configured().double(), ones(3, 1)
    learner = maml(model, functional.mse_loss, lr=0.1, engine=Engine(compile="step"))
    for step in range(3):  # what goes by the name of a part, or is written down, is nothing that the model reads
        before = learner(tasks)
        globals()["out"] = before.mean()
        model.log["loss"] = float(step)
        globals()["out"].backward()
        model.config.losses.append(float(step))
    assert len(compilations) == 1
    change(model)
    after = learner(tasks)
    assert len(compilations) == 2
    assert not torch.allclose(after, before)
    torch.testing.assert_close(after, maml(model, functional.mse_loss, lr=0.1)(tasks), rtol=1e-12, atol=1e-12)


class Remembering(nn.Module):
    """A model that writes down what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.seen, self.scale = nn.Linear(1, 1), dict[Any, float](), 1.0

    def forward(self, x: Tensor) -> Any:
        self.seen.setdefault(tuple(x.shape), 0.0)
        return self.scale * self.layer(x)


class Odd:
    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError(f"it has no {name}")


class OddDict(dict[str, Any]):
    def items(self) -> Any:
        raise RuntimeError("it has no items")


def test_objects_that_cannot_be_looked_into() -> None:
    gone: Any = weakref.proxy(Fixed())
    assert [is_holder(item) for item in (gone, Odd(), torch.ones(1), torch, nn.Linear(1, 1))] == [False] * 5
    assert within(OddDict(scale=1.0)) == []
    endless: dict[str, Any] = {"scale": 1.0}
    endless["again"] = endless
    assert within(endless) == ["scale", 1.0, "again"]
    assert len(within({str(i): {str(j): 0.0 for j in range(100)} for i in range(100)})) < 1000


def test_what_a_forward_pass_writes_down_hides_no_change() -> None:
    model = Remembering()
    x, more = torch.ones(2, 3, 1), torch.ones(2, 4, 1)
    loss = maml(model, functional.mse_loss, lr=0.1)(Task((x, x), (more, more))).mean()
    model.scale = 2.0
    with pytest.raises(InputError, match="changed between forward and backward pass"):
        loss.backward()


class Slotted:
    """A loss whose plain numbers are in slots, and in its class."""

    __slots__ = ("factor", "more")
    power = 2

    def __init__(self) -> None:
        self.factor = 1.0

    def __call__(self, prediction: Tensor, target: Tensor) -> Tensor:
        return self.factor * (prediction - target).abs().pow(self.power).mean()


def test_watch_sees_slots_and_what_classes_have(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = Slotted()
    layer = nn.Linear(1, 1)
    layer.held = loss  # type: ignore[assignment]
    for watched in (loss, layer, functools.partial(loss)):
        watch = Watch([watched])
        seen = [watch.values()]
        assert watch.values() == seen[0]
        loss.factor += 1
        seen.append(watch.values())
        monkeypatch.setattr(Slotted, "power", Slotted.power + 1)
        seen.append(watch.values())
        loss.more = len(seen)  # type: ignore[attr-defined]
        seen.append(watch.values())
        assert all(a != b for i, a in enumerate(seen) for b in seen[:i])
        del loss.more  # type: ignore[attr-defined]


def test_a_copy_of_a_learner_watches_its_own_model() -> None:
    learner = maml(nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.5)), functional.mse_loss, lr=0.1)
    copied = copy.deepcopy(learner)
    seen = learner._watch.values(), copied._watch.values()
    copied.model[1].p = 0.1  # type: ignore[index]
    assert learner._watch.values() == seen[0]
    assert copied._watch.values() != seen[1]


SHAPES = [
    {"stride": 2},
    {"padding": 1, "stride": (2, 1)},
    {"dilation": 2, "padding": (2, 1)},
    {"padding": "same"},
    {"groups": 2},
]


@pytest.mark.parametrize("options", SHAPES, ids=str)
@pytest.mark.parametrize("conv2d", [conv2d_by_matmul, conv2d_channels_last])
def test_convolutions_equal_pytorchs(conv2d: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, 9, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 4 // options.get("groups", 1), 3, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64)
    ours, theirs = conv2d(x, weight, bias, **options), torch.conv2d(x, weight, bias, **options)
    assert torch.allclose(ours, theirs, atol=1e-12)
    up = torch.randn_like(theirs)
    for mine, own in zip(torch.autograd.grad(ours, (x, weight), up), torch.autograd.grad(theirs, (x, weight), up),
                         strict=True):  # fmt: skip
        assert torch.allclose(mine, own, atol=1e-11)


@pytest.mark.parametrize("options", SHAPES, ids=str)
@pytest.mark.parametrize("biased", [True, False])
def test_every_derivative_of_a_channels_last_convolution(biased: bool, options: dict[str, Any]) -> None:
    """The gradient, its gradient, and that one's."""
    torch.manual_seed(0)
    x = torch.randn(2, 2, 6, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 2 // options.get("groups", 1), 3, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(2, dtype=torch.float64, requires_grad=True) if biased else None

    conv2d: Any = conv2d_channels_last

    def cubic(*tensors: Tensor) -> Any:
        return conv2d(*tensors, **options) ** 3

    inputs = (x, weight, bias) if bias is not None else (x, weight)
    assert torch.autograd.gradcheck(cubic, inputs)
    assert torch.autograd.gradgradcheck(cubic, inputs)

    def slope(*tensors: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(cubic(*tensors).sum(), tensors, create_graph=True)

    assert torch.autograd.gradgradcheck(slope, inputs)


@pytest.mark.parametrize("conv2d", [conv2d_by_matmul, conv2d_channels_last])
def test_a_convolution_under_autocast_is_pytorchs(conv2d: Any) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(*shape, requires_grad=True) for shape in ((2, 3, 6, 6), (4, 3, 3, 3), (4,))]
    results = []
    theirs: Any = torch.conv2d
    for function in (conv2d, theirs):
        with torch.autocast("cpu", torch.bfloat16):
            y = function(*tensors)
        grads = torch.autograd.grad((y.float() ** 2).sum(), tensors)
        results.append([y.float(), *grads])
        assert (y.dtype, grads[1].dtype) == (torch.bfloat16, torch.float32)
    for mine, own in zip(*results, strict=True):
        assert (mine - own).norm() < 2e-2 * own.norm()


@pytest.mark.parametrize("conv2d", [conv2d_by_matmul, conv2d_channels_last])
def test_a_convolution_that_does_not_fit_fails_as_pytorchs(conv2d: Any) -> None:
    with pytest.raises(RuntimeError, match="Kernel size can't be greater"):
        conv2d(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 3, 3))


POOLS: list[dict[str, Any]] = [
    {"kernel_size": 2},
    {"kernel_size": (2, 3), "stride": (2, 3)},
    {"kernel_size": 1},
    {"kernel_size": 3, "stride": 2},
    {"kernel_size": 2, "padding": 1},
    {"kernel_size": 2, "dilation": 2},
    {"kernel_size": 2, "ceil_mode": True},
    {"kernel_size": 2, "return_indices": True},
]


@pytest.mark.parametrize("options", POOLS, ids=str)
def test_pooling_equals_pytorchs_and_takes_the_first_of_equal_ones(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    x = torch.randint(0, 3, (2, 3, 7, 9)).double().requires_grad_()
    ours, theirs = max_pool2d_by_comparison(x, **options), functional.max_pool2d(x, **options)
    if isinstance(theirs, tuple):
        assert torch.equal(ours[1], theirs[1])
        ours, theirs = ours[0], theirs[0]
    assert torch.equal(ours, theirs)
    up = torch.randn_like(theirs)
    assert torch.equal(*[torch.autograd.grad(pooled, x, up)[0] for pooled in (ours, theirs)])


def test_pooling_keeps_what_is_not_a_number_wherever_it_stands() -> None:
    windows = torch.eye(4).reshape(4, 1, 2, 2)
    windows[windows == 1] = torch.nan
    assert max_pool2d_by_comparison(windows, 2).isnan().all()


class Pooled(nn.Sequential):
    """A small network with pooling, called as a function or as a module, by its keyword or not."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Conv2d(1, 2, 3, padding=1), nn.MaxPool2d(2), nn.Tanh(), nn.Flatten(1), nn.Linear(18, 2))

    def forward(self, x: Tensor) -> Tensor:
        conv, pool, *rest = self
        x = functional.max_pool2d(pool(conv(x)), kernel_size=1)
        for layer in rest:
            x = layer(x)
        return x


@pytest.mark.parametrize(
    "engine",
    [Engine(compile="pieces", chunk=2), Engine(compile="pieces", method="loop", convolution="channels_last")],
    ids=str,
)
def test_pieces_are_compiled_once_for_all_inner_steps(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient, its derivative and the query gradient: the first step, where tasks still share theta, too."""
    model, calls = Pooled().double(), []

    def compiled(function: Any, _: Any) -> Any:
        calls.append(function)
        return function

    monkeypatch.setattr("fewstep.engine.compiled", compiled)
    x, y = torch.randn(4, 5, 1, 6, 6, dtype=torch.float64), torch.randint(0, 2, (4, 5))
    tasks = Task((x[:, :3], y[:, :3]), (x, y))
    learner = maml(model, functional.cross_entropy, lr=0.1, steps=3, engine=engine)
    plain = maml(model, functional.cross_entropy, lr=0.1, steps=3, engine="loop")
    ours, truth = (meta_gradient(each(tasks), list(model.parameters())) for each in (learner, plain))
    assert relative_error(ours, truth) < 1e-12
    assert len(calls) == 3


def smooth(precision: Any, engine: str = "vmap") -> tuple[Learner, Task]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 3))
    x, y = torch.randn(4, 12, 8), torch.randint(0, 3, (4, 12))
    method: Any = engine
    learner = maml(model, functional.cross_entropy, lr=0.1, steps=2, engine=Engine(method=method, precision=precision))
    return learner, Task((x, y), (x, y))


@pytest.mark.parametrize("method", ["vmap", "loop"])
def test_bfloat16_is_near_and_keeps_float32_where_it_matters(method: str) -> None:
    learner, tasks = smooth("bfloat16", method)
    exact, _ = smooth("full", method)
    half = meta_gradient(learner(tasks), list(learner.parameters()))
    full = meta_gradient(exact(tasks), list(exact.parameters()))
    assert 1e-5 < relative_error(half, full) < 0.03
    assert half.dtype == torch.float32
    *_, theta = learner.inner_loop(tasks.support, 2)
    assert {value.dtype for value in theta.values()} == {torch.float32}
    assert learner(tasks).dtype == torch.float32


def test_a_rule_that_changes_inside_another_is_compiled_again() -> None:
    class Rule:
        def __init__(self) -> None:
            self.lr = 0.1

        def __call__(self, theta: Any, gradient: Any, state: Any, step: int) -> tuple[Any, Any]:
            return {name: value - self.lr * gradient[name] for name, value in theta.items()}, state

    rule = Rule()
    learner = Learner(nn.Linear(1, 1), functional.mse_loss, Clipped(rule, norm=1e9), steps=1,
                      engine=Engine(compile="step"))  # fmt: skip
    batch = torch.randn(3, 4, 1), torch.randn(3, 4, 1)
    learner(Task(batch, batch))
    rule.lr = 0.5
    compiled = learner(Task(batch, batch))
    learner.engine = Engine()
    assert torch.allclose(compiled, learner(Task(batch, batch)))
