"""What CAVIA, T-net, WarpGrad, iMAML, BMG and MAML++ promise beyond their equations."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fewstep
from fewstep import InputError, Learner, Task, models
from fewstep.implicit import Solve
from fewstep.models.context import context_of
from fewstep.starts import Prototypes
from tests.reference import meta_gradient, naive_losses, one_by_one, relative_error

TASKS, LR, STEPS = 3, 0.2, 3


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


def moved(learner: Learner) -> Learner:
    """All parameters away from special points such as identities and zeros."""
    torch.manual_seed(2)
    with torch.no_grad():
        for value in learner.parameters():
            value.add_(0.1 * torch.randn_like(value))
    return learner


# Context parameters.


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


@every_model
def test_warps_start_as_the_identity_and_take_part(name: str) -> None:
    plain, x = BUILD[name](), tasks_of(name).query[0][0]
    model = models.add_warp(copy.deepcopy(plain))
    assert torch.equal(model(x), plain(x))
    warps = [value for n, value in model.named_parameters() if n.endswith(".warp")]
    assert len(warps) == (4 if name == "conv4" else 2)
    grads = torch.autograd.grad(model(x).square().sum(), warps)
    assert all(grad.abs().max() > 1e-6 for grad in grads)
    with pytest.raises(InputError, match="warp layers already"):
        models.add_warp(model)
    with pytest.raises(InputError, match="no layer to warp"):
        models.add_warp(nn.Sequential(nn.Linear(2, 1)))


def test_warp_grad_by_one_step_is_t_net_and_by_none_is_refused() -> None:
    tasks, loss = tasks_of(), functional.cross_entropy
    one, other = (moved(method(mlp(), loss, lr=LR)) for method in (fewstep.warp_grad, fewstep.t_net))
    gradients = [meta_gradient(learner(tasks), list(learner.parameters())) for learner in (one, other)]
    assert relative_error(*gradients) < 1e-12
    with pytest.raises(InputError, match="steps must be at least 1"):
        fewstep.warp_grad(mlp(), loss, lr=LR, steps=0)


# Implicit gradients.


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
    residual = learner.outer.residual  # type: ignore[attr-defined]
    assert residual.shape == (TASKS,)
    assert residual.max() < 1e-8


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
