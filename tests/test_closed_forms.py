"""Quadratics f_i(w) = (w - c_i)^T A_i (w - c_i) / 2: each method has its own optimum and its own rate.

With K inner steps of size alpha and S_i = (I - alpha A_i)^K the meta-gradient is sum_i M_i (w - c_i), where M_i is
    MAML: S A S    FOMAML: A S    Reptile: I - S    iMAML: P A P with P = (I + A / lambda)^-1
so w* = (sum M_i)^-1 sum M_i c_i, and gradient descent with beta = 2 / (max + min eigenvalue of sum M_i) gets nearer by
(kappa - 1) / (kappa + 1) in each step.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import fewstep
from fewstep import Learner, Task

TASKS, SIZE, STEPS, LR, STRENGTH = 3, 4, 3, 0.15, 2.0


class Point(nn.Module):
    """A point in space."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(SIZE, dtype=torch.float64))


def loss(model: Point, batch: dict[str, Tensor]) -> Tensor:
    away = model.w - batch["c"]
    return away @ batch["a"] @ away / 2


def quadratics() -> tuple[Tensor, Tensor]:
    """A [TASKS, SIZE, SIZE] with eigenvalues from 0.3 to 4, and c [TASKS, SIZE]."""
    torch.manual_seed(0)
    axes = torch.linalg.qr(torch.randn(TASKS, SIZE, SIZE, dtype=torch.float64)).Q
    values = torch.rand(TASKS, SIZE, dtype=torch.float64) * 3.7 + 0.3
    return axes @ torch.diag_embed(values) @ axes.mT, 3 * torch.randn(TASKS, SIZE, dtype=torch.float64)


def powers(a: Tensor) -> Tensor:
    result: Tensor = torch.linalg.matrix_power(torch.eye(SIZE, dtype=torch.float64) - LR * a, STEPS)
    return result


def proximal(a: Tensor) -> Tensor:
    result: Tensor = torch.linalg.inv(torch.eye(SIZE, dtype=torch.float64) + a / STRENGTH)
    return result


BUILD: dict[str, Callable[[Point], Learner]] = {
    "maml": lambda model: fewstep.maml(model, loss, lr=LR, steps=STEPS),
    "fomaml": lambda model: fewstep.fomaml(model, loss, lr=LR, steps=STEPS),
    "reptile": lambda model: fewstep.reptile(model, loss, lr=LR, steps=STEPS),
    "imaml": lambda model: fewstep.imaml(model, loss, lr=0.25, steps=40, strength=STRENGTH, iterations=SIZE),
}
MATRICES: dict[str, Callable[[Tensor], Tensor]] = {
    "maml": lambda a: powers(a) @ a @ powers(a),
    "fomaml": lambda a: a @ powers(a),
    "reptile": lambda a: torch.eye(SIZE, dtype=torch.float64) - powers(a),
    "imaml": lambda a: proximal(a) @ a @ proximal(a),
}
every_method = pytest.mark.parametrize("name", BUILD)


def optimum(name: str) -> Tensor:
    a, c = quadratics()
    m = MATRICES[name](a)
    result: Tensor = torch.linalg.solve(m.sum(0), torch.einsum("bij,bj->i", m, c))
    return result


def gradient_at(name: str, w: Tensor) -> Tensor:
    """The meta-gradient, summed over the tasks, through a real learner."""
    a, c = quadratics()
    model = Point()
    model.w.data.copy_(w)
    BUILD[name](model)(Task({"a": a, "c": c}, {"a": a, "c": c})).sum().backward()
    assert model.w.grad is not None
    return model.w.grad


@every_method
def test_gradient_descent_reaches_the_own_optimum_at_the_predicted_rate(name: str) -> None:
    a, _ = quadratics()
    values = torch.linalg.eigvalsh(MATRICES[name](a).sum(0))
    beta, kappa = 2 / (values[0] + values[-1]), values[-1] / values[0]
    w, best = torch.zeros(SIZE, dtype=torch.float64), optimum(name)
    distances: list[float] = []
    while not distances or (distances[-1] > 1e-11 and len(distances) < 500):
        w = w - beta * gradient_at(name, w)
        distances.append(float((w - best).norm()))
    assert distances[-1] <= 1e-11
    late = [distance for distance in distances if distance > 1e-9][-4:]
    rate = (late[-1] / late[0]) ** (1 / 3)
    assert rate == pytest.approx(float((kappa - 1) / (kappa + 1)), rel=5e-4)


@every_method
def test_no_method_is_still_at_the_optimum_of_another(name: str) -> None:
    best = {other: optimum(other) for other in BUILD}
    still = {other: float(gradient_at(name, w).norm()) for other, w in best.items()}
    assert still.pop(name) < 1e-11
    assert min(still.values()) > 1e-2
    assert min(float((w - best[name]).norm()) for other, w in best.items() if other != name) > 1e-2


def test_the_proximal_minimum() -> None:
    """theta* = (A + lambda I)^-1 (A c + lambda w)."""
    a, c = quadratics()
    model = Point()
    model.w.data += 1.0
    theta = BUILD["imaml"](model).adapt({"a": a[0], "c": c[0]}).get_parameter("w")
    expected = torch.linalg.solve(a[0] + STRENGTH * torch.eye(SIZE), a[0] @ c[0] + STRENGTH * model.w.detach())
    torch.testing.assert_close(theta.detach(), expected, rtol=0, atol=1e-10)


def test_the_error_of_first_order_is_linear_in_the_inner_rate() -> None:
    a, c = quadratics()
    tasks = Task({"a": a, "c": c}, {"a": a, "c": c})

    def error(lr: float) -> float:
        found = []
        for method in (fewstep.fomaml, fewstep.maml):
            model = Point()
            method(model, loss, lr=lr, steps=STEPS)(tasks).sum().backward()
            assert model.w.grad is not None
            found.append(model.w.grad)
        return float((found[0] - found[1]).norm() / found[1].norm())

    errors = [error(0.002 / 2**i) for i in range(4)]
    for whole, half in pairwise(errors):
        assert whole / half == pytest.approx(2, rel=0.02)
