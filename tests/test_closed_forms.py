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
every_draw = pytest.mark.parametrize("seed", range(3))


class Point(nn.Module):
    """A point in space."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(SIZE, dtype=torch.float64))


def loss(model: Point, batch: dict[str, Tensor]) -> Tensor:
    away = model.w - batch["c"]
    return away @ batch["a"] @ away / 2


def quadratics(seed: int) -> tuple[Tensor, Tensor]:
    """A [TASKS, SIZE, SIZE] with eigenvalues from 0.3 to 4, and c [TASKS, SIZE]."""
    torch.manual_seed(seed)
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


def optimum(name: str, seed: int) -> Tensor:
    a, c = quadratics(seed)
    m = MATRICES[name](a)
    result: Tensor = torch.linalg.solve(m.sum(0), torch.einsum("bij,bj->i", m, c))
    return result


def gradient_at(name: str, w: Tensor, seed: int) -> Tensor:
    """The meta-gradient, summed over the tasks, through a real learner."""
    a, c = quadratics(seed)
    model = Point()
    model.w.data.copy_(w)
    BUILD[name](model)(Task({"a": a, "c": c}, {"a": a, "c": c})).sum().backward()
    assert model.w.grad is not None
    return model.w.grad


@every_draw
@every_method
def test_gradient_descent_reaches_the_own_optimum_at_the_predicted_rate(name: str, seed: int) -> None:
    a, _ = quadratics(seed)
    values, axes = torch.linalg.eigh(MATRICES[name](a).sum(0))
    beta, kappa = 2 / (values[0] + values[-1]), values[-1] / values[0]
    best = optimum(name, seed)

    def distances(w: Tensor, until: float) -> list[float]:
        found = [float((w - best).norm())]
        while found[-1] > until and len(found) < 500:
            w = w - beta * gradient_at(name, w, seed)
            found.append(float((w - best).norm()))
        return found

    assert distances(torch.zeros_like(best), 1e-11)[-1] <= 1e-11
    # From zero it may be there before the faster directions are gone: the rate is that of the two slowest ones.
    for before, after in pairwise(distances(best + axes[:, 0] + axes[:, -1], 1e-4)):
        assert after / before == pytest.approx(float((kappa - 1) / (kappa + 1)), rel=1e-6)


@every_draw
@every_method
def test_no_method_is_still_at_the_optimum_of_another(name: str, seed: int) -> None:
    best = {other: optimum(other, seed) for other in BUILD}
    still = {other: float(gradient_at(name, w, seed).norm()) for other, w in best.items()}
    assert still.pop(name) < 1e-11
    assert min(still.values()) > 1e-2
    assert min(float((w - best[name]).norm()) for other, w in best.items() if other != name) > 1e-2


@every_draw
def test_the_proximal_minimum(seed: int) -> None:
    """theta* = (A + lambda I)^-1 (A c + lambda w)."""
    a, c = quadratics(seed)
    model = Point()
    model.w.data += 1.0
    theta = BUILD["imaml"](model).adapt({"a": a[0], "c": c[0]}).get_parameter("w")
    expected = torch.linalg.solve(a[0] + STRENGTH * torch.eye(SIZE), a[0] @ c[0] + STRENGTH * model.w.detach())
    torch.testing.assert_close(theta.detach(), expected, rtol=0, atol=1e-10)


@every_draw
def test_the_error_of_first_order_is_linear_in_the_inner_rate(seed: int) -> None:
    a, c = quadratics(seed)
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
