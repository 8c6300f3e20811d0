"""CAVIA, T-net, WarpGrad, iMAML, BMG and MAML++ against their papers' equations, written out with plain autograd."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

import fewstep
from fewstep import Engine, InputError, Learner, Task, models
from fewstep.functional import Tensors
from fewstep.implicit import Solve
from fewstep.models.context import context_of
from fewstep.starts import Prototypes
from fewstep.task import map_tensors
from tests.reference import meta_gradient, naive_losses, relative_error

TASKS, LR, STEPS = 3, 0.2, 3
Function = Callable[[Tensors, Tensor], Tensor]
"""prediction = function(tensors by name, x)"""


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()


def conv4() -> nn.Module:
    torch.manual_seed(0)
    model = models.conv4(2, filters=3, size=16, pool=True).double()
    for value in model.parameters():
        value.data += 0.1 * torch.randn_like(value)
    return model


def normed() -> nn.Module:
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(4, track_running_stats=False)
    return nn.Sequential(nn.Linear(3, 4), norm, nn.Tanh(), nn.Linear(4, 2)).double()


BUILD = {"mlp": mlp, "conv4": conv4}
every_model = pytest.mark.parametrize("name", BUILD)


def tasks_of(name: str = "mlp") -> Task:
    torch.manual_seed(1)
    x = (1, 16, 16) if name == "conv4" else (3,)

    def batch() -> tuple[Tensor, Tensor]:
        scale = torch.tensor([1.0, 0.3, 2.0]).reshape(-1, 1, *[1 for _ in x])
        inputs = scale * torch.randn(TASKS, 6, *x, dtype=torch.float64)
        return inputs, torch.arange(6).remainder(2).expand(TASKS, -1).clone()

    return Task(batch(), batch())


def one_by_one(tasks: Task) -> list[Task]:
    return [map_tensors(lambda leaf, i=i: leaf[i], tasks) for i in range(tasks.size)]  # type: ignore[misc]


def moved(learner: Learner) -> Learner:
    """All parameters away from special points such as identities and zeros."""
    torch.manual_seed(2)
    with torch.no_grad():
        for value in learner.parameters():
            value.add_(0.1 * torch.randn_like(value))
    return learner


def loss_of(function: Function, tensors: Tensors, batch: Any) -> Tensor:
    return functional.cross_entropy(function(tensors, batch[0]), batch[1])


def descended(function: Function, tensors: Tensors, adapted: list[str], batch: Any, lr: float = LR) -> Tensors:
    """One step of gradient descent on the adapted tensors; differentiable."""
    value = loss_of(function, tensors, batch)
    grads = torch.autograd.grad(value, [tensors[name] for name in adapted], create_graph=True)
    return {**tensors, **{n: tensors[n] - lr * g for n, g in zip(adapted, grads, strict=True)}}


def assert_equal(learner: Learner, tasks: Task, truth: Tensor, values: Tensor | None = None) -> None:
    """Losses and meta-gradients by every parameter of the learner, batched and one task after another."""
    wanted = list(learner.parameters())
    gradient = meta_gradient(truth, wanted)
    for engine in (Engine(), Engine(method="loop"), Engine(chunk=2)):
        learner.engine = engine
        losses = learner(tasks)
        torch.testing.assert_close(losses, truth if values is None else values, rtol=1e-9, atol=1e-9)
        assert relative_error(meta_gradient(losses, wanted), gradient) < 1e-9


# Context parameters.


def with_context(name: str, plain: nn.Module) -> Function:
    """The plain model, with the context put in by hand."""

    def concat(tensors: Tensors, x: Tensor) -> Tensor:
        weight = torch.cat([tensors["0.base.weight"], tensors["0.columns"]], 1)
        joined = torch.cat([x, tensors["0.context"].expand(len(x), -1)], 1)
        hidden = functional.linear(joined, weight, tensors["0.base.bias"]).tanh()
        hidden = functional.linear(hidden, tensors["2.weight"], tensors["2.bias"]).tanh()
        return functional.linear(hidden, tensors["4.weight"], tensors["4.bias"])

    def film(tensors: Tensors, x: Tensor) -> Tensor:
        maps = tensors["blocks.0.norm.film.weight"] @ tensors["blocks.0.norm.context"]
        gamma, beta = (maps + tensors["blocks.0.norm.film.bias"]).reshape(2, 1, -1, 1, 1)

        def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
            result: Tensor = (1 + gamma) * out + beta
            return result

        own = {n.replace(".base", ""): v for n, v in tensors.items() if "film" not in n and "context" not in n}
        handle = plain.get_submodule("blocks.0.norm").register_forward_hook(hook)
        try:
            result: Tensor = functional_call(plain, own, (x,))
            return result
        finally:
            handle.remove()

    return concat if name == "mlp" else film


@every_model
def test_cavia(name: str) -> None:
    plain, tasks = BUILD[name](), tasks_of(name)
    learner = moved(fewstep.cavia(copy.deepcopy(plain), functional.cross_entropy, lr=LR, steps=STEPS, context=3))
    function, context = with_context(name, plain), context_of(learner.model)
    assert context is not None
    assert learner.objective.adapted == [f"model.{context}"]
    truth = []
    for task in one_by_one(tasks):
        tensors: Tensors = dict(learner.model.named_parameters())
        tensors[context] = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        for _ in range(STEPS):
            tensors = descended(function, tensors, [context], task.support)
        truth.append(loss_of(function, tensors, task.query))
    assert_equal(learner, tasks, torch.stack(truth))


@every_model
@pytest.mark.parametrize("kind", [None, "film"])
def test_a_context_of_zero_changes_nothing_and_another_one_does(name: str, kind: Any) -> None:
    plain, x = BUILD[name](), tasks_of(name).query[0][0]
    model = models.add_context(copy.deepcopy(plain), 3, kind=kind)
    torch.testing.assert_close(model(x), plain(x), rtol=0, atol=1e-14)
    own = context_of(model)
    assert own is not None
    model.get_parameter(own).data.fill_(1.0)
    assert (model(x) - plain(x)).abs().max() > 1e-3


def test_where_a_context_goes() -> None:
    def place(model: nn.Module, **options: Any) -> str | None:
        return context_of(models.add_context(model, 2, **options))

    assert place(models.mlp()) == "1.context"
    assert place(models.conv4(3)) == "blocks.0.norm.context"
    assert place(models.conv4(3), layer="blocks.2.norm") == "blocks.2.norm.context"
    assert place(models.conv4(3), kind="concat") == "head.context"
    assert place(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2))) == "0.context"
    assert (
        place(nn.Sequential(nn.TransformerEncoderLayer(4, 1, 4))) == "0.linear1.context"
    )  # attention reads the weight of its last layer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "at least 1 number"),
        ({"size": 2, "kind": "sum"}, "kind of a context"),
        ({"size": 2, "layer": "none"}, "has no layer 'none'"),
        ({"size": 2, "layer": "blocks.0.norm", "kind": "concat"}, "needs a linear layer"),
        ({"size": 2, "layer": "blocks"}, "'film' needs"),
    ],
)
def test_contexts_that_cannot_be(options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        models.add_context(models.conv4(3), **options)


def test_more_contexts_that_cannot_be() -> None:
    model = models.add_context(mlp(), 2)
    with pytest.raises(InputError, match=r"has a context already, '0\.context'"):
        models.add_context(model, 2)
    with pytest.raises(InputError, match=r"only the context '0\.context' adapts"):
        fewstep.cavia(model, functional.cross_entropy, lr=LR, adapt="4.*")
    with pytest.raises(InputError, match="no layer that could take"):
        models.add_context(nn.Sequential(nn.Tanh()), 2)


# Warp layers.


def with_warps(plain: nn.Module) -> Function:
    """The plain model, each layer's weight and bias multiplied by T."""

    def function(tensors: Tensors, x: Tensor) -> Tensor:
        own = {name.replace(".base", ""): value for name, value in tensors.items()}
        warps = {name.removesuffix("warp"): own.pop(name) for name in list(own) if name.endswith(".warp")}
        for layer, warp in warps.items():
            for name in (f"{layer}weight", f"{layer}bias"):
                own[name] = torch.tensordot(warp, own[name], dims=([1], [0]))
        result: Tensor = functional_call(plain, own, (x,))
        return result

    return function


@every_model
def test_t_net(name: str) -> None:
    plain, tasks = BUILD[name](), tasks_of(name)
    learner = moved(fewstep.t_net(copy.deepcopy(plain), functional.cross_entropy, lr=LR, steps=STEPS, adapt="~*.bias"))
    function = with_warps(plain)
    names = [n for n, _ in learner.model.named_parameters()]
    adapted = [n for n in names if not n.endswith((".warp", ".bias"))]
    assert learner.objective.adapted == [f"model.{n}" for n in adapted]
    assert len([n for n in names if n.endswith(".warp")]) == (4 if name == "conv4" else 2)
    truth = []
    for task in one_by_one(tasks):
        tensors: Tensors = dict(learner.model.named_parameters())
        for _ in range(STEPS):
            tensors = descended(function, tensors, adapted, task.support)
        truth.append(loss_of(function, tensors, task.query))
    assert_equal(learner, tasks, torch.stack(truth))


@every_model
def test_warps_start_as_the_identity_and_take_part(name: str) -> None:
    plain, x = BUILD[name](), tasks_of(name).query[0][0]
    model = models.add_warp(copy.deepcopy(plain))
    assert torch.equal(model(x), plain(x))
    warps = [value for n, value in model.named_parameters() if n.endswith(".warp")]
    grads = torch.autograd.grad(model(x).square().sum(), warps)
    assert all(grad.abs().max() > 1e-6 for grad in grads)
    with pytest.raises(InputError, match="warp layers already"):
        models.add_warp(model)
    with pytest.raises(InputError, match="no layer to warp"):
        models.add_warp(nn.Sequential(nn.Linear(2, 1)))


def naive_warp_maml(learner: Learner, function: Function, tasks: Task, steps: int) -> tuple[Tensor, Tensor]:
    """The values, and a sum whose gradient is that of Warp-MAML."""
    parameters: Tensors = dict(learner.model.named_parameters())
    warps = [n for n in parameters if n.endswith(".warp")]
    adapted = [n for n in parameters if n not in warps]
    values, truth = [], []
    for task in one_by_one(tasks):
        tensors = {n: value.detach() if n in warps else value for n, value in parameters.items()}
        path = [tensors]
        for _ in range(steps):
            path.append(descended(function, path[-1], adapted, task.support))
        last = loss_of(function, path[-1], task.query)
        along = torch.zeros(())
        for theta in path[:-1]:
            here = {n: parameters[n] if n in warps else theta[n].detach().requires_grad_() for n in theta}
            along = along + loss_of(function, descended(function, here, adapted, task.support), task.query) / steps
        values.append(last)
        truth.append(last + along)
    return torch.stack(values), torch.stack(truth)


@every_model
@pytest.mark.parametrize("segment", [None, 2])
def test_warp_grad(name: str, segment: Any) -> None:
    plain, tasks = BUILD[name](), tasks_of(name)
    learner = moved(fewstep.warp_grad(copy.deepcopy(plain), functional.cross_entropy, lr=LR, steps=STEPS,
                                      segment=segment))  # fmt: skip
    values, truth = naive_warp_maml(learner, with_warps(plain), tasks, STEPS)
    assert_equal(learner, tasks, truth, values)


def test_warp_grad_by_one_step_is_t_net_and_by_none_is_refused() -> None:
    tasks, loss = tasks_of(), functional.cross_entropy
    one, other = (moved(method(mlp(), loss, lr=LR)) for method in (fewstep.warp_grad, fewstep.t_net))
    gradients = [meta_gradient(learner(tasks), list(learner.parameters())) for learner in (one, other)]
    assert relative_error(*gradients) < 1e-12
    with pytest.raises(InputError, match="steps must be at least 1"):
        fewstep.warp_grad(mlp(), loss, lr=LR, steps=0)


# Implicit gradients.


@pytest.mark.parametrize("options", [{"strength": 3.0, "iterations": 40},
                                     {"strength": 30.0, "iterations": 40, "solver": "neumann"}])  # fmt: skip
@pytest.mark.parametrize("adapt", ["*", "4.*"])
def test_imaml(options: dict[str, Any], adapt: str) -> None:
    """At the point that the inner loop has reached: dense Hessians, solved directly."""
    model, tasks = mlp(), tasks_of()
    parameters: Tensors = dict(model.named_parameters())
    adapted = [name for name in parameters if adapt == "*" or name.startswith("4.")]
    strength, lr = options["strength"], 0.02
    learner = fewstep.imaml(model, functional.cross_entropy, lr=lr, steps=STEPS, adapt=adapt, **options)

    def function(tensors: Tensors, x: Tensor) -> Tensor:
        result: Tensor = functional_call(model, tensors, (x,))
        return result

    values, total = [], {name: torch.zeros_like(value) for name, value in parameters.items()}
    for task in one_by_one(tasks):
        theta = {n: v.detach().requires_grad_() for n, v in parameters.items()}
        for _ in range(STEPS):
            step = descended(function, theta, adapted, task.support, lr)
            pull = {n: lr * strength * (theta[n] - parameters[n]) for n in adapted}
            theta = {n: (step[n] - pull[n] if n in pull else step[n]).detach().requires_grad_() for n in theta}
        names = list(theta)
        query = loss_of(function, theta, task.query)
        g = dict(zip(names, torch.autograd.grad(query, [theta[n] for n in names]), strict=True))
        inner = torch.autograd.grad(
            loss_of(function, theta, task.support), [theta[n] for n in adapted], create_graph=True
        )
        flat = torch.cat([part.flatten() for part in inner])
        rows = [torch.autograd.grad(entry, [theta[n] for n in names], retain_graph=True) for entry in flat]
        jacobian = {n: torch.stack([row[i].flatten() for row in rows]) for i, n in enumerate(names)}
        hessian = torch.cat([jacobian[n] for n in adapted], 1)
        v = torch.linalg.solve(torch.eye(len(flat)) + hessian / strength, torch.cat([g[n].flatten() for n in adapted]))
        for n, part in zip(adapted, v.split([theta[n].numel() for n in adapted]), strict=True):
            total[n] += part.reshape(theta[n].shape)
        for n in set(names) - set(adapted):
            total[n] += g[n] - (v @ jacobian[n]).reshape(theta[n].shape) / strength
        values.append(query.detach())
    expected = torch.cat([total[name].flatten() for name in parameters])
    for engine in (Engine(), Engine(method="loop"), Engine(chunk=2)):
        learner.engine = engine
        losses = learner(tasks)
        torch.testing.assert_close(losses.detach(), torch.stack(values), rtol=1e-9, atol=1e-9)
        assert relative_error(meta_gradient(losses, list(model.parameters())), expected) < 1e-9
        assert isinstance(residual := learner.outer.residual, Tensor)  # type: ignore[attr-defined]
        assert residual.shape == (TASKS,)
        assert residual.max() < 1e-9
    learner.derivative = "finite_difference"
    assert relative_error(meta_gradient(learner(tasks), list(model.parameters())), expected) < 1e-5


class Point(nn.Module):
    """A point in space."""

    def __init__(self, size: int = 4) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(size, dtype=torch.float64))


def quadratic(model: Point, batch: dict[str, Tensor]) -> Tensor:
    away = model.w - batch["c"]
    return away @ batch["a"] @ away / 2


@pytest.mark.parametrize("solver", ["cg", "neumann"])
def test_imaml_on_quadratics_has_the_closed_form(solver: Any) -> None:
    """theta* - c = P (w - c), P = (I + A / lambda)^-1; the gradient is P A P (w - c). Tasks differ in scale."""
    torch.manual_seed(0)
    root = torch.randn(TASKS, 4, 4, dtype=torch.float64)
    a = (root @ root.mT / 8 + torch.eye(4) / 2) * torch.tensor([1.0, 0.01, 0.3]).reshape(-1, 1, 1)
    batch = {"a": a, "c": torch.randn(TASKS, 4, dtype=torch.float64)}
    strength = 1.5 * float(torch.linalg.eigvalsh(a).max())
    model = Point()
    learner = fewstep.imaml(model, quadratic, lr=1 / (2 * strength), steps=80, strength=strength, solver=solver,
                            iterations=4 if solver == "cg" else 80)  # fmt: skip
    gradient = meta_gradient(learner(Task(batch, batch)), [model.w])
    p = torch.linalg.inv(torch.eye(4) + a / strength)
    formula = torch.einsum("bij,bj->i", p @ a @ p, model.w.detach() - batch["c"])
    assert relative_error(gradient, formula) < 1e-8
    assert learner.outer.residual.max() < 1e-8  # type: ignore[attr-defined]


def test_imaml_reports_a_solve_that_is_not_done_and_a_first_order_version() -> None:
    model, tasks = mlp(), tasks_of()
    learner = fewstep.imaml(model, functional.cross_entropy, lr=LR, steps=STEPS, strength=0.5, iterations=1)
    learner(tasks).sum().backward()
    rough = learner.outer.residual.max()  # type: ignore[attr-defined]
    kind: Any = type(learner.outer)
    learner.outer = kind(Solve(0.5, iterations=30))
    learner(tasks).sum().backward()
    assert rough > 1e-2
    assert learner.outer.residual.max() < rough / 1e4  # type: ignore[attr-defined]

    learner.derivative = "none"
    gradient = meta_gradient(learner(tasks), list(model.parameters()))
    *_, last = learner.inner_loop(tasks.support, STEPS)
    leaves = {name: value.detach().requires_grad_() for name, value in last.items()}
    query = torch.autograd.grad(learner.query_loss(leaves, STEPS, tasks).sum(), list(leaves.values()))
    assert relative_error(gradient, torch.cat([part.sum(0).flatten() for part in query])) < 1e-12


def test_imaml_with_a_start_of_its_own_agrees_with_a_finite_difference() -> None:
    """Where the inner loop has converged its end is a function of the start and of the body, whatever the path."""
    model, tasks, step = mlp(), tasks_of(), 1e-5
    learner = fewstep.imaml(model, functional.cross_entropy, lr=0.4, steps=200, strength=1.0, iterations=20,
                            adapt="4.*", start=Prototypes(model))  # fmt: skip
    body = [value for name, value in model.named_parameters() if not name.startswith("4.")]
    gradient = meta_gradient(learner(tasks), body)
    torch.manual_seed(3)
    directions, sides = [torch.randn_like(value) for value in body], []
    for signed in (step, -2 * step):
        for value, direction in zip(body, directions, strict=True):
            value.data += signed * direction
        sides.append(learner(tasks).sum().item())
    slope = torch.dot(gradient, torch.cat([direction.flatten() for direction in directions])).item()
    assert slope == pytest.approx((sides[0] - sides[1]) / (2 * step), rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 0.0}, "lambda, the strength of the pull, must be above 0"),
        ({"strength": -1.0}, "lambda, the strength of the pull, must be above 0"),
        ({"solver": "lu"}, "the solver must be one of"),
        ({"iterations": 0}, "at least 1 iteration"),
    ],
)
def test_wrong_options_of_imaml(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        fewstep.imaml(mlp(), functional.cross_entropy, lr=LR, **options)


# Bootstrapped meta-gradients.


@pytest.mark.parametrize("target_steps", [1, 3])
@pytest.mark.parametrize("adapt", ["*", "4.*"])
def test_bmg(target_steps: int, adapt: str) -> None:
    model, tasks, rate = mlp(), tasks_of(), 0.07
    parameters: Tensors = dict(model.named_parameters())
    adapted = [name for name in parameters if adapt == "*" or name.startswith("4.")]
    learner = fewstep.bmg(model, functional.cross_entropy, lr=LR, steps=STEPS, target_steps=target_steps, rate=rate,
                          adapt=adapt)  # fmt: skip

    def function(tensors: Tensors, x: Tensor) -> Tensor:
        result: Tensor = functional_call(model, tensors, (x,))
        return result

    values, truth = [], []
    for task in one_by_one(tasks):
        theta = parameters
        for _ in range(STEPS):
            theta = descended(function, theta, adapted, task.support)
        target = {n: value.detach().requires_grad_() for n, value in theta.items()}
        for _ in range(target_steps - 1):
            target = descended(function, target, adapted, task.support)
        target = {n: v.detach() for n, v in descended(function, target, adapted, task.query, rate).items()}
        distance = torch.stack([(theta[n] - target[n]).square().sum() for n in adapted]).sum() / (2 * rate)
        still = {n: value.detach() if n in adapted else value for n, value in theta.items()}
        shared = loss_of(function, still, task.query) if adapt != "*" else 0.0
        values.append(loss_of(function, theta, task.query))
        truth.append(distance + shared)
    assert_equal(learner, tasks, torch.stack(truth), torch.stack(values))


def test_bmg_one_step_ahead_is_maml_and_further_is_not() -> None:
    model, tasks, loss = mlp(), tasks_of(), functional.cross_entropy
    own = list(model.parameters())
    maml = meta_gradient(fewstep.maml(model, loss, lr=LR, steps=STEPS, adapt="~2.*")(tasks), own)
    for ahead, rate in ((1, None), (1, 3.0), (2, None)):
        learner = fewstep.bmg(model, loss, lr=LR, steps=STEPS, target_steps=ahead, rate=rate, adapt="~2.*")
        error = relative_error(meta_gradient(learner(tasks), own), maml)
        assert error < 1e-12 if ahead == 1 else error > 1e-2
    for options, message in (({"target_steps": 0}, "at least 1 step ahead"), ({"rate": 0.0}, "must be above 0")):
        with pytest.raises(InputError, match=message):
            fewstep.bmg(model, loss, lr=LR, **options)


# MAML++.

SWITCHES = ("multi_step", "learned_rates", "step_norms", "step_statistics")


def naive_weights(iteration: int, anneal: int) -> list[float]:
    """The authors' code, with iterations in place of epochs."""
    if iteration >= anneal:
        return [0.0] * (STEPS - 1) + [1.0]
    decay, least = 1 / STEPS / anneal, 0.03 / STEPS
    early = [max(1 / STEPS - iteration * decay, least)] * (STEPS - 1)
    return [*early, min(1 / STEPS + iteration * (STEPS - 1) * decay, 1 - (STEPS - 1) * least)]


@pytest.mark.parametrize("off", [None, *SWITCHES])
@pytest.mark.parametrize("iteration", [0, 50, 99, 100])
def test_maml_pp(off: str | None, iteration: int) -> None:
    model, tasks = normed(), tasks_of()
    learner = moved(fewstep.maml_pp(model, functional.cross_entropy, lr=LR, steps=STEPS, anneal=100,
                                    **{off: False} if off else {}))  # type: ignore[arg-type]  # fmt: skip
    learner.iteration = iteration
    parameters: Tensors = dict(model.named_parameters())
    norms = [] if off == "step_norms" else ["1.weight", "1.bias"]
    adapted = [name for name in parameters if name not in norms]
    steps = dict(zip(norms, learner.per_step, strict=True))
    rates = {} if off == "learned_rates" else dict(learner.update.named_parameters())  # type: ignore[attr-defined]
    assert learner.normalisation == (None if off == "step_statistics" else "batch")

    def function(tensors: Tensors, x: Tensor) -> Tensor:
        result: Tensor = functional_call(model, tensors, (x,))
        return result

    weights = naive_weights(100 if off == "multi_step" else iteration, 100)
    truth = []
    for task in one_by_one(tasks):
        theta, total = parameters, torch.zeros((), dtype=torch.float64)
        for step in range(STEPS):
            theta = {**theta, **{name: value[step] for name, value in steps.items()}}
            grads = torch.autograd.grad(loss_of(function, theta, task.support), [theta[n] for n in adapted],
                                        create_graph=True)  # fmt: skip
            rate = {n: rates[f"rates.model/{n.replace('.', '/')}"][step] if rates else LR for n in adapted}
            theta = {**theta, **{n: theta[n] - rate[n] * g for n, g in zip(adapted, grads, strict=True)}}
            total = total + weights[step] * loss_of(function, theta, task.query)
        truth.append(total)
    assert_equal(learner, tasks, torch.stack(truth))


def test_maml_pp_with_everything_off_is_maml() -> None:
    model, tasks, loss = normed(), tasks_of(), functional.cross_entropy
    learner = fewstep.maml_pp(model, loss, lr=LR, steps=STEPS, first_order_until=7, **dict.fromkeys(SWITCHES, False))  # type: ignore[arg-type]
    own, names = list(model.parameters()), [name for name, _ in model.named_parameters()]
    for iteration, first_order in ((6, True), (7, False)):
        learner.iteration = iteration
        naive = naive_losses(model, loss, tasks, lr=LR, steps=STEPS, adapted=names, first_order=first_order)
        assert relative_error(meta_gradient(learner(tasks), own), meta_gradient(naive, own)) < 1e-9


def test_what_depends_on_the_iteration_is_never_silently_at_its_start() -> None:
    """A loop of one's own says which iteration it is; `MetaStep` counts."""
    tasks, loss = tasks_of(), functional.cross_entropy
    for learner in (
        fewstep.maml(normed(), loss, lr=LR, exact_from=2),
        fewstep.maml_pp(normed(), loss, lr=LR, anneal=2),
    ):
        with pytest.raises(InputError, match=r"set learner\.iteration"):
            learner(tasks)
        assert len(learner.path(tasks, 1)) == 2  # to adapt does not depend on it
        step = fewstep.MetaStep(learner, torch.optim.Adam(learner.parameters()))
        for number in (1, 2, 3):
            step(tasks, lr=0.01)
            assert learner.iteration == number
    early = fewstep.maml(normed(), loss, lr=LR, exact_from=2)
    orders = []
    for early.iteration in (1, 2):
        orders.append(early.order)
    assert orders == ["none", "exact"]


def test_maml_pp_combines_with_what_the_caller_says() -> None:
    learner = fewstep.maml_pp(conv4(), functional.cross_entropy, lr=LR, steps=2, adapt=["~*.offset", "~head.bias"],
                              per_step="head.bias", normalisation="support")  # fmt: skip
    assert learner.normalisation == "support"
    offsets = [f"model.blocks.{i}.norm.offset" for i in range(4)]
    assert set(learner.objective.per_step) == {"model.head.bias", *offsets}
    assert not set(learner.objective.adapted) & set(learner.objective.per_step)


def test_wrong_options_of_maml_pp() -> None:
    with pytest.raises(InputError, match="at least 0 iterations"):
        fewstep.maml_pp(normed(), functional.cross_entropy, lr=LR, anneal=-1)


def test_imaml_refuses_steps_that_the_pull_to_the_start_makes_diverge() -> None:
    with pytest.raises(InputError, match=r"lr \* strength is 2\.0"):
        fewstep.imaml(normed(), functional.cross_entropy, lr=1.0, strength=2.0)


# What all of them do.


@every_model
@pytest.mark.parametrize("method", ["cavia", "t_net", "warp_grad", "imaml", "bmg", "maml_pp"])
def test_more_steps_than_in_training_and_a_plain_module_in_the_end(name: str, method: str) -> None:
    plain, tasks = BUILD[name](), tasks_of(name)
    learner = moved(getattr(fewstep, method)(copy.deepcopy(plain), functional.cross_entropy, lr=LR, steps=STEPS))
    points = learner.path(tasks, STEPS + 2)
    support, (x, y) = one_by_one(tasks)[1]
    adapted = learner.adapt(support, STEPS + 2)
    adapted = (
        adapted.get_submodule("model") if method == "maml_pp" else adapted
    )  # in a wrapper that normalises by the batch
    assert isinstance(adapted, nn.Module)
    assert type(adapted) is type(plain)
    torch.testing.assert_close(functional.cross_entropy(adapted(x), y), points[-1].loss[1], rtol=1e-12, atol=1e-12)
    assert abs(points[-1].loss[1] - points[STEPS].loss[1]) > 1e-6


@pytest.mark.parametrize("name", fewstep.algorithms.__all__)
def test_a_parameter_may_be_a_single_number(name: str) -> None:
    class Scaled(nn.Linear):
        def __init__(self) -> None:
            super().__init__(1, 2)
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * super().forward(x)

    model = nn.Sequential(Scaled(), nn.Tanh(), nn.Linear(2, 2))
    learner = getattr(fewstep.algorithms, name)(model, functional.cross_entropy, lr=0.1, steps=2)
    learner.iteration = 0
    batch = torch.randn(3, 4, 1), torch.tensor([0, 1, 0, 1]).expand(3, 4)
    learner(Task(batch, batch)).mean().backward()
    assert all(value.grad is None or value.grad.isfinite().all() for value in learner.parameters())
