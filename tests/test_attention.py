"""Fused attention: the math kernel where second derivatives are taken, announced once; else the fused one stays."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import fewstep
from fewstep import FallbackWarning, Task, maml
from fewstep.engine import Engine
from tests.reference import meta_gradient, naive_losses, relative_error

ENGINES = {"batched": Engine(), "looped": Engine(method="loop"), "chunked": Engine(chunk=2)}
announced = pytest.warns(FallbackWarning, match=r"attention runs by the math kernel: .*'finite_difference' and 'none'")
every_engine = pytest.mark.parametrize("engine", ENGINES)


class Functional(nn.Module):
    """`scaled_dot_product_attention` itself, by default causal. x [K, time, 8] -> [K, 3]"""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 3)
        self.options = options or {"is_causal": True}

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, **self.options)
        result: Tensor = self.out(mixed.transpose(1, 2).flatten(2).mean(1))
        return result


class SelfAttention(nn.Module):
    """PyTorch's own module, whose weights nobody asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.out = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.out(self.attention(x, x, x, need_weights=False)[0].mean(1))
        return result


class Encoder(nn.Module):
    """PyTorch's own layer, which in eval mode has a fused path of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.out(self.layer(x).mean(1))
        return result


MODELS: dict[str, Callable[[], nn.Module]] = {
    "causal": Functional,
    "masked": lambda: Functional(attn_mask=torch.ones(5, 5, dtype=torch.bool).tril(1)),
    "attention module": SelfAttention,
    "encoder layer": Encoder,
    "encoder layer in eval mode": lambda: Encoder().eval(),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().double()


@pytest.fixture
def tasks() -> Task:
    torch.manual_seed(1)
    x = torch.randn(2, 3, 6, 5, 8, dtype=torch.float64)
    y = torch.arange(6).remainder(3).expand(3, -1)
    return Task((x[0], y), (x[1], y))


class Fused(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the calls of fused attention."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += "flash_attention" in func.__name__
        return func(*args, **(kwargs or {}))


def naive_gradient(model: nn.Module, tasks: Task, **options: Any) -> Tensor:
    """By plain autograd, under the math kernel."""
    names = [name for name, _ in model.named_parameters()]
    with sdpa_kernel(SDPBackend.MATH):
        losses = naive_losses(model, functional.cross_entropy, tasks, lr=0.5, steps=2, adapted=names, **options)
        return meta_gradient(losses, list(model.parameters()))


@every_engine
@pytest.mark.parametrize("name", MODELS)
def test_exact_equals_the_naive_loop_under_the_math_kernel(name: str, engine: str, tasks: Task) -> None:
    model = build(name)
    learner = maml(model, functional.cross_entropy, lr=0.5, steps=2, engine=ENGINES[engine])
    with announced:
        losses = learner(tasks)
    ours = meta_gradient(losses, list(model.parameters()))
    assert relative_error(ours, naive_gradient(model, tasks)) < 1e-9


def test_compiled_equals_the_naive_loop_under_the_math_kernel(tasks: Task) -> None:
    model = build("causal")
    learner = maml(model, functional.cross_entropy, lr=0.5, steps=2, engine=Engine(compile="pieces"))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        ours = meta_gradient(learner(tasks), list(model.parameters()))
    said = [str(warning.message) for warning in found]
    assert sum("math kernel" in line for line in said) == 1
    assert not any("running without torch.compile" in line for line in said)
    assert relative_error(ours, naive_gradient(model, tasks)) < 1e-9


def test_it_is_announced_once(tasks: Task) -> None:
    learner = maml(build("encoder layer"), functional.cross_entropy, lr=0.5)
    with announced as found:
        for _ in range(2):
            learner(tasks).sum().backward()
            learner.path(tasks)
        learner.eval()(tasks)
        learner.adapt((tasks.support[0][0], tasks.support[1][0]))
    assert len(found) == 1


@every_engine
@pytest.mark.parametrize("name", MODELS)
def test_other_derivatives_keep_the_fused_kernel(name: str, engine: str, tasks: Task) -> None:
    model = build(name)
    truths = {"none": naive_gradient(model, tasks, first_order=True), "finite_difference": naive_gradient(model, tasks)}
    for derivative, truth in truths.items():
        options: dict[str, Any] = {"derivative": derivative, "engine": ENGINES[engine]}
        learner = maml(model, functional.cross_entropy, lr=0.5, steps=2, **options)
        with warnings.catch_warnings(), Fused() as fused:
            warnings.filterwarnings("ignore", "There is a performance drop")  # PyTorch's: vmap takes one by one here
            ours = meta_gradient(learner(tasks), list(model.parameters()))
        assert relative_error(ours, truth) < 1e-5
        # At least a forward and a backward pass for three gradients, after a look at one task.
        assert fused.calls >= 1 + 3 * (3 * 2 if engine == "looped" else 2), derivative


def test_a_look_in_another_mode_finds_it_too(tasks: Task) -> None:
    """With dropout the math kernel is PyTorch's own choice on a CPU; without it, in eval mode, the fused one is."""

    class Dropping(Functional):
        def forward(self, x: Tensor) -> Tensor:
            self.options = {"dropout_p": 0.1 if self.training else 0.0}
            return super().forward(x)

    torch.manual_seed(0)
    model = Dropping().double()
    learner = maml(model, functional.cross_entropy, lr=0.5, steps=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learner(tasks).sum().backward()
    with announced:
        losses = learner.eval()(tasks)
    assert relative_error(meta_gradient(losses, list(model.parameters())), naive_gradient(model, tasks)) < 1e-9


def test_who_chose_the_math_kernel_hears_nothing(tasks: Task) -> None:
    class Chosen(Functional):
        def forward(self, x: Tensor) -> Tensor:
            with sdpa_kernel(SDPBackend.MATH):
                return super().forward(x)

    learner = maml(Chosen().double(), functional.cross_entropy, lr=0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        learner(tasks).sum().backward()
    assert not learner.objective.math_attention


def test_all_outputs_agree(tasks: Task) -> None:
    """Forward, path and the adapted model, which runs on the fused kernel again."""
    learner = maml(build("causal"), functional.cross_entropy, lr=0.5, steps=2)
    with announced:
        losses = learner(tasks)
    point = learner.path(tasks)[-1]
    assert torch.equal(point.loss, losses)
    adapted = learner.adapt((tasks.support[0][1], tasks.support[1][1]))
    assert point.prediction is not None
    with Fused() as fused:
        torch.testing.assert_close(adapted(tasks.query[0][1]), point.prediction[1])
    assert fused.calls == 1


def test_models_without_attention_enter_no_context(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("the context costs time")

    monkeypatch.setattr(fewstep.functional, "sdpa_kernel", never)
    learner = maml(fewstep.models.mlp(), functional.mse_loss, lr=0.01)
    learner(fewstep.data.SinusoidEpisodes(tasks=2)[0]).sum().backward()
    assert all(parameter.grad is not None for parameter in learner.parameters())
