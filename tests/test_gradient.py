"""Meta-gradients against the naive float64 loop, finite differences and closed forms."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn import functional

from fewstep import InputError, Learner, Task, maml
from fewstep.engine import Engine
from fewstep.errors import FallbackWarning
from fewstep.patterns import matching
from fewstep.updates import SGD
from tests.cases import CASES, Case
from tests.reference import meta_gradient, naive_losses, relative_error

ENGINES: dict[str, dict[str, Any]] = {
    "batched": {},
    "looped": {"engine": "loop"},
    "chunked": {"engine": Engine(chunk=2)},
    "by matrix products": {"engine": Engine(chunk=2, convolution="matmul")},
}
MLP = next(case for case in CASES if case.name == "mlp")
every_case = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
every_engine = pytest.mark.parametrize("engine", ENGINES)


def both_gradients(case: Case, way: str, steps: int, **options: Any) -> tuple[Tensor, Tensor]:
    """Ours and the naive one, by all parameters of the model."""
    if not case.batched and way != "looped":
        pytest.skip(f"vmap has no rule for {case.name}: the loop engine is for it")
    if case.name == "batch norm" and way == "by matrix products" and torch.get_default_device().type == "cuda":
        pytest.skip("under vmap PyTorch cannot bring images into the memory format that cuDNN's batch norm asks for")
    model, tasks = case.build(), case.tasks()
    options = {**ENGINES[way], **options}
    learner = maml(model, case.loss, lr=case.lr, steps=steps, adapt=case.adapt, **options)
    naive = naive_losses(
        model,
        case.loss,
        tasks,
        lr=case.lr,
        steps=steps,
        adapted=matching([name for name, _ in model.named_parameters()], case.adapt),
        first_order=options.get("derivative") == "none",
    )
    parameters = list(model.parameters())
    return meta_gradient(learner(tasks), parameters), meta_gradient(naive, parameters)


@every_engine
@pytest.mark.parametrize("steps", [0, 1, 3, 10])
@every_case
def test_exact_equals_the_naive_loop(case: Case, steps: int, engine: str) -> None:
    ours, naive = both_gradients(case, engine, steps)
    assert relative_error(ours, naive) < 1e-9


@every_engine
@every_case
def test_first_order_is_the_gradient_at_the_adapted_parameters(case: Case, engine: str) -> None:
    ours, naive = both_gradients(case, engine, 3, derivative="none")
    assert relative_error(ours, naive) < 1e-12


@every_engine
@every_case
def test_finite_difference_is_near_the_exact_gradient(case: Case, engine: str) -> None:
    ours, naive = both_gradients(case, engine, 3, derivative="finite_difference")
    assert relative_error(ours, naive) < 1e-5


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        ("mlp with norm", Engine(compile="pieces")),
        ("mlp with norm", Engine(compile="step", chunk=2)),
        ("attention", Engine(compile="step", method="loop")),
        ("conv4 strided", Engine(compile="step", convolution="matmul")),
    ],
    ids=str,
)
def test_compiled_equals_the_naive_loop(name: str, engine: Engine) -> None:
    case = next(case for case in CASES if case.name == name)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FallbackWarning)
        warnings.filterwarnings("ignore", "attention runs by the math kernel")
        ours, naive = both_gradients(case, "batched", 2, engine=engine)
    assert relative_error(ours, naive) < 1e-9


@pytest.mark.parametrize("case", [case for case in CASES if case.batched and case.loss is not functional.mse_loss],
                         ids=lambda case: case.name)  # fmt: skip
def test_forward_over_reverse_equals_the_naive_loop(case: Case) -> None:
    ours, naive = both_gradients(case, "batched", 3, engine=Engine(product="forward"))
    assert relative_error(ours, naive) < 1e-9


def test_forward_mode_fails_clearly_where_pytorch_has_none() -> None:
    """Under vmap and jvp, PyTorch writes the gradient of mse_loss into a tensor of zeros that has no storage."""
    with pytest.raises(InputError, match="use product='reverse'"):
        both_gradients(MLP, "batched", 1, engine=Engine(product="forward"))


@pytest.mark.parametrize("name", ["mlp with norm", "conv4 pooled"])
def test_first_order_unrolled_is_the_gradient_at_the_adapted_parameters(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    engine = Engine(compile="step")
    with mock.patch("fewstep.engine.compiled", lambda function, tensors: function):
        ours, naive = both_gradients(case, "batched", 3, derivative="none", engine=engine)
    assert relative_error(ours, naive) < 1e-12


@pytest.mark.parametrize("method", ["vmap", "loop"])
@every_case
def test_unrolled_equals_the_naive_loop(case: Case, method: Any) -> None:
    engine = Engine(compile="step", method=method)
    with mock.patch("fewstep.engine.compiled", lambda function, tensors: function):
        ours, naive = both_gradients(case, "looped" if method == "loop" else "batched", 3, engine=engine)
    assert relative_error(ours, naive) < 1e-9


@every_engine
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("first_order", [False, True])
def test_quadratics_have_the_closed_form(steps: int, first_order: bool, engine: str) -> None:
    """f_i(w) = (w - c_i)^T A_i (w - c_i) / 2: the meta-gradient is S A S (w - c), or A S (w - c) to first order."""
    torch.manual_seed(0)
    count, size, lr = 5, 4, 0.1
    root = torch.randn(count, size, size, dtype=torch.float64)
    a = root @ root.mT / size + torch.eye(size, dtype=torch.float64)
    c = torch.randn(count, size, dtype=torch.float64)

    def loss(model: nn.Linear, batch: dict[str, Tensor]) -> Tensor:
        away = model.weight[0] - batch["c"][0]
        return away @ batch["a"][0] @ away / 2

    model = nn.Linear(size, 1, bias=False).double()
    derivative: Any = "none" if first_order else "exact"
    learner = Learner(model, loss, SGD(lr), steps=steps, derivative=derivative, **ENGINES[engine])
    batch = {"a": a[:, None], "c": c[:, None]}
    ours = meta_gradient(learner(Task(batch, batch)), [model.weight])

    s = torch.linalg.matrix_power(torch.eye(size, dtype=torch.float64) - lr * a, steps)
    m = a @ s if first_order else s @ a @ s
    formula = torch.einsum("bij,bj->i", m, model.weight.detach() - c)
    assert relative_error(ours, formula) < 1e-12


def test_meta_objective_agrees_with_its_own_finite_difference() -> None:
    case = MLP
    model, tasks = case.build(), case.tasks()
    learner = maml(model, case.loss, lr=case.lr, steps=3)
    gradient = meta_gradient(learner(tasks), list(model.parameters()))
    assert relative_error(numeric_gradient(learner, tasks), gradient) < 1e-6


def numeric_gradient(learner: Learner, tasks: Task, step: float = 1e-6) -> Tensor:
    """The central difference of the summed query loss by each parameter of the model; the same random numbers."""
    slopes = []
    for value in learner.model.parameters():
        flat = value.data.view(-1)
        for i in range(flat.numel()):
            sides = []
            for sign in (1, -1):
                flat[i] += sign * step
                torch.manual_seed(7)
                sides.append(learner(tasks).sum().item())
                flat[i] -= sign * step
            slopes.append((sides[0] - sides[1]) / (2 * step))
    return torch.tensor(slopes, dtype=torch.float64)


@every_engine
def test_dropout_differs_by_task_and_the_recomputation_sees_the_same_mask(engine: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 1)).double()
    x, y = torch.randn(1, 5, 2, dtype=torch.float64), torch.randn(1, 5, 1, dtype=torch.float64)
    tasks = Task((x.expand(3, -1, -1), y.expand(3, -1, -1)), (x.expand(3, -1, -1), y.expand(3, -1, -1)))
    learner = maml(model, functional.mse_loss, lr=0.1, steps=2, **ENGINES[engine])
    torch.manual_seed(7)
    losses = learner(tasks)
    assert len(set(losses.tolist())) == 3
    torch.rand(5)  # whatever happens between forward and backward pass
    gradient = meta_gradient(losses, list(model.parameters()))
    assert relative_error(numeric_gradient(learner, tasks), gradient) < 1e-6


@pytest.mark.parametrize("derivative", ["exact", "finite_difference"])
def test_forward_mode_through_adaptation(derivative: Any) -> None:
    """J v against a finite difference of theta', and <u, J v> = <J^T u, v>."""
    case = next(case for case in CASES if case.name == "mlp with norm")
    model, tasks = case.build(), case.tasks()
    learner = maml(model, case.loss, lr=case.lr, steps=3, adapt=case.adapt, derivative=derivative)
    names = [name for name, _ in model.named_parameters()]
    own = list(model.parameters())
    v = [torch.randn_like(value) for value in own]

    def adapted() -> list[Tensor]:
        *_, theta = learner.inner_loop(tasks.support, 3)
        return list(theta.values())

    with forward_ad.dual_level():
        for name, value, tangent in zip(names, own, v, strict=True):
            module, _, last = name.rpartition(".")
            delattr(model.get_submodule(module), last)
            setattr(model.get_submodule(module), last, forward_ad.make_dual(value, tangent))  # type: ignore[no-untyped-call]
        jv = [forward_ad.unpack_dual(value).tangent for value in adapted()]  # type: ignore[no-untyped-call]
    for name, value in zip(names, own, strict=True):
        module, _, last = name.rpartition(".")
        setattr(model.get_submodule(module), last, value)

    def moved(sign: float) -> list[Tensor]:
        with torch.no_grad():
            for value, tangent in zip(own, v, strict=True):
                value.add_(tangent, alpha=sign * 1e-6)
            result = [value.clone() for value in adapted()]
            for value, tangent in zip(own, v, strict=True):
                value.sub_(tangent, alpha=sign * 1e-6)
        return result

    numeric = [(plus - minus) / 2e-6 for plus, minus in zip(moved(1), moved(-1), strict=True)]
    flat = torch.cat([part.flatten() for part in jv])
    assert relative_error(flat, torch.cat([part.flatten() for part in numeric])) < 1e-5

    u = [torch.randn_like(part) for part in jv]
    jtu = torch.autograd.grad(adapted(), own, u)
    left, right = inner(u, jv), inner(jtu, v)
    assert abs(left - right) < (1e-12 if derivative == "exact" else 1e-5) * abs(left)


def inner(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return sum(float((x * y).detach().sum()) for x, y in zip(a, b, strict=True))


def test_differentiating_twice_is_refused() -> None:
    case = MLP
    model = case.build()
    learner = maml(model, case.loss, lr=0.1, steps=2)
    with pytest.raises(InputError, match="differentiated once only; leave out create_graph"):
        torch.autograd.grad(learner(case.tasks()).sum(), list(model.parameters()), create_graph=True)


def test_gradients_reach_the_inputs() -> None:
    """A network in front of the learner, or learned data: the batch is differentiated too."""
    case = MLP
    model, tasks = case.build(), case.tasks()
    x = tasks.support[0].requires_grad_()
    ours = torch.autograd.grad(maml(model, case.loss, lr=0.1, steps=3)(tasks).sum(), x)[0]
    names = [name for name, _ in model.named_parameters()]
    naive = naive_losses(model, case.loss, tasks, lr=0.1, steps=3, adapted=names)
    assert relative_error(ours, torch.autograd.grad(naive.sum(), x)[0]) < 1e-9


def test_autocast_is_the_same_in_the_recomputation() -> None:
    case = MLP
    model, tasks = case.build().float(), Task(*((x.float(), y.float()) for x, y in case.tasks()))
    learner = maml(model, case.loss, lr=0.1, steps=2)
    with torch.autocast("cpu", torch.bfloat16):
        losses = learner(tasks)
        inside = torch.autograd.grad(losses.sum(), list(model.parameters()), retain_graph=True)
    outside = torch.autograd.grad(losses.sum(), list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


def test_tied_weights_adapt_as_one() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    model[2].weight = model[0].weight
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    ours = meta_gradient(
        maml(model, functional.mse_loss, lr=0.1, steps=2)(Task((x, x), (x, x))), list(model.parameters())
    )

    def tied(theta: dict[str, Tensor], inputs: Tensor) -> Tensor:
        hidden = functional.linear(inputs, theta["0.weight"], theta["0.bias"]).tanh()
        return functional.linear(hidden, theta["0.weight"], theta["2.bias"])

    losses = []
    for i in range(2):
        theta: dict[str, Tensor] = dict(model.named_parameters())
        for _ in range(2):
            loss = functional.mse_loss(tied(theta, x[i]), x[i])
            grads = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
            theta = {name: t - 0.1 * g for (name, t), g in zip(theta.items(), grads, strict=True)}
        losses.append(functional.mse_loss(tied(theta, x[i]), x[i]))
    assert relative_error(ours, meta_gradient(torch.stack(losses), list(model.parameters()))) < 1e-9


# PyTorch's own faults, pinned: a test that fails here says that one has been mended.


def test_pytorch_grad_of_vmap_of_grad_is_wrong_through_layer_norm() -> None:
    """pytorch/functorch#534: the pattern of PyTorch's tutorial; ours is exact on the same problem."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 1)).double()
    for value in model.parameters():
        value.data += 0.1 * torch.randn_like(value)
    x, y = torch.randn(2, 5, 3, dtype=torch.float64), torch.randn(2, 5, 1, dtype=torch.float64)
    theta = {name: value.detach() for name, value in model.named_parameters()}

    def loss(own: dict[str, Tensor], inputs: Tensor, target: Tensor) -> Tensor:
        return functional.mse_loss(functional_call(model, own, (inputs,)), target)

    def adapted_loss(own: dict[str, Tensor], inputs: Tensor, target: Tensor) -> Tensor:
        grads = torch.func.grad(loss)(own, inputs, target)
        return loss({name: own[name] - 0.5 * grads[name] for name in own}, inputs, target)

    def tutorial(own: dict[str, Tensor]) -> Tensor:
        return torch.func.vmap(adapted_loss, in_dims=(None, 0, 0))(own, x, y).sum()

    torchs = torch.cat([grad.flatten() for grad in torch.func.grad(tutorial)(theta).values()])
    naive = naive_losses(model, functional.mse_loss, Task((x, y), (x, y)), lr=0.5, steps=1, adapted=list(theta))
    truth = meta_gradient(naive, list(model.parameters()))
    assert relative_error(torchs, truth) > 1e-3
    ours = maml(model, functional.mse_loss, lr=0.5)(Task((x, y), (x, y)))
    assert relative_error(meta_gradient(ours, list(model.parameters())), truth) < 1e-9


def test_pytorch_batch_norm_without_scale_loses_the_derivative_of_the_offsets_gradient() -> None:
    """Why `OffsetNorm` adds its offset itself."""
    x = torch.randn(6, 4, dtype=torch.float64)
    offset = torch.randn(4, dtype=torch.float64, requires_grad=True)
    out = functional.batch_norm(x, None, None, None, offset, training=True).tanh().square().sum()
    (gradient,) = torch.autograd.grad(out, offset, create_graph=True)
    assert torch.autograd.grad(gradient.sum(), offset, allow_unused=True)[0] is None
