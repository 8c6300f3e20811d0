"""Every method equals its paper's equations in plain float64 autograd: values and gradients by all meta-parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep import Engine, Learner, MetaStep, Task, algorithms
from tests.contract import LR, TOLERANCE, build, case_of, every_pair, tasks_of
from tests.naive import NAIVE, Given, Truth
from tests.naive.given import shaped
from tests.naive.outer import maml_pp_path
from tests.reference import forward_of, meta_gradient, one_by_one, relative_error

pytestmark = pytest.mark.usefixtures("double")
STEPS = 3
EXACT = 1e-8

OPTIONS: dict[str, dict[str, Any]] = {"imaml": {"strength": 10.0}}
FURTHER: dict[str, dict[str, Any]] = {"imaml": {"iterations": 30}}
"""Of the naive loop too, and of the learner alone. The naive loop solves iMAML's system directly; with this lambda its
eigenvalues lie in 0.9 .. 1.6 for the MLPs and in -0.8 .. 2.9 for the convolution, where conjugate gradient has no
guarantee, but so many iterations come to 1e-11 of the solution. VARIANTS compare few iterations."""

FINITE: dict[str, Any] = {"derivative": "finite_difference"}
VARIANTS: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("anil", "convolution", {"adapt": "~*.bias"}, {}),
    ("anil", "policy", {"head": "1"}, {}),
    ("boil", "convolution", {"adapt": "*.weight"}, {}),
    ("boil", "regression", {"head": "1"}, {}),
    ("proto_maml", "2 ways", {}, {}),
    ("proto_maml", "5 ways", {}, {}),
    ("unicorn_maml", "2 ways", {}, {}),
    ("unicorn_maml", "5 ways", {}, {}),
    ("reptile", "regression", {"pool": False}, {}),
    ("reptile", "convolution", {"pool": False}, {}),
    ("cavia", "convolution", {"context": 2, "kind": "concat"}, {}),
    ("cavia", "policy", {"context": 3, "kind": "film"}, {}),
    ("t_net", "regression", {"adapt": "~*.bias"}, {}),
    ("warp_grad", "convolution", {}, {"segment": 2}),
    ("imaml", "regression", {"iterations": 3}, {}),
    ("imaml", "policy", {"iterations": 5}, {}),
    ("imaml", "policy", {"strength": 10.0}, {"iterations": 30, "solver": "neumann"}),
    ("imaml", "policy", {"strength": 10.0}, {"iterations": 30, **FINITE}),
    ("imaml", "regression", {"strength": 10.0, "adapt": "5.*"}, {"iterations": 20}),
    ("imaml", "policy", {"strength": 10.0, "adapt": "~1.*"}, {"iterations": 30}),
    ("bmg", "regression", {"target_steps": 1, "rate": 0.07, "adapt": "5.*"}, {}),
    ("bmg", "convolution", {"target_steps": 3, "rate": 0.07, "adapt": "head.*"}, {}),
    ("bmg", "policy", {"target_steps": 2, "rate": 0.3}, {}),
    *(("sharp_maml", case, {"where": where, "inner_radius": 0.3, "outer_radius": 0.4}, {})
      for where in ("inner", "outer") for case in ("regression", "convolution")),
    ("sharp_maml", "policy", {"where": "outer", "outer_radius": 0.4, "ascent": "none"}, {}),
    ("sharp_maml", "regression", {"where": "outer", "ascent": "none", "adapt": "5.*"}, {"segment": 2}),
]  # fmt: skip
"""Options that change the equation, and others that do not."""

SWITCHES = ("multi_step", "learned_rates", "step_norms", "step_statistics")


def named(variant: tuple[str, str, dict[str, Any], dict[str, Any]]) -> str:
    name, case, options, further = variant
    return " ".join([name, case, *(f"{key}={value}" for key, value in (options | further).items())])


def given_of(learner: Learner, case: str, tasks: Task) -> Given:
    """What the naive loop is told: the model before the method touched it, and numbers by name."""
    own: dict[str, Tensor] = dict(learner.named_parameters())
    return Given(case_of(case).model(), case_of(case).loss, tasks, own, LR, STEPS)


def assert_equal(learner: Learner, tasks: Task, truth: Truth, tolerance: float = EXACT,
                 engines: Sequence[Engine] = (Engine(),)) -> None:  # fmt: skip
    """The loss of each task, and the gradient by each meta-parameter."""
    wanted = dict(learner.named_parameters())
    gradient = meta_gradient(truth.objective, list(wanted.values()))
    naive = shaped(gradient, wanted)
    for engine in engines:
        learner.engine = engine
        losses = learner(tasks)
        torch.testing.assert_close(losses, truth.values, rtol=EXACT, atol=0)
        found = meta_gradient(losses, list(wanted.values()))
        assert relative_error(found, gradient) < tolerance
        for name, ours in shaped(found, wanted).items():
            # Each tensor by itself; one whose true gradient is next to nothing has rounding of the others' size.
            least = 1e-4 * float(gradient.norm())
            assert (ours - naive[name]).norm() < tolerance * max(float(naive[name].norm()), least), name


def test_every_method_has_a_naive_reference() -> None:
    assert set(NAIVE) == set(algorithms.__all__)


@every_pair
def test_values_and_meta_gradients_equal_the_naive_loop(name: str, case: str) -> None:
    """Of the default engine: `test_methods` compares the others with it."""
    options = OPTIONS.get(name, {})
    learner, tasks = build(name, case, steps=STEPS, **options, **FURTHER.get(name, {})), tasks_of(case)
    assert_equal(learner, tasks, NAIVE[name](given_of(learner, case, tasks), **options), TOLERANCE.get(name, EXACT))


@pytest.mark.parametrize(("name", "case", "options", "further"), VARIANTS, ids=map(named, VARIANTS))
def test_options_do_to_the_equation_what_they_say(
    name: str, case: str, options: dict[str, Any], further: dict[str, Any]
) -> None:
    learner, tasks = build(name, case, steps=STEPS, **options, **further), tasks_of(case)
    truth = NAIVE[name](given_of(learner, case, tasks), **options)
    tolerance = 1e-6 if "derivative" in further else EXACT
    assert_equal(learner, tasks, truth, tolerance, [Engine(), Engine(method="loop"), Engine(chunk=2)])


# MAML++.


@pytest.mark.parametrize("off", [None, *SWITCHES])
@pytest.mark.parametrize("iteration", [0, 50, 99, 100])
def test_each_part_of_maml_pp_equals_the_naive_loop(iteration: int, off: str | None) -> None:
    case = "batch norm"
    options: dict[str, Any] = {"anneal": 100, **({off: False} if off else {})}
    learner, tasks = build("maml_pp", case, steps=STEPS, **options), tasks_of(case)
    learner.iteration = iteration
    assert learner.normalisation == (None if off == "step_statistics" else "batch")
    assert_equal(learner, tasks, NAIVE["maml_pp"](given_of(learner, case, tasks), iteration=iteration, **options))


@pytest.mark.parametrize("case", ["batch norm", "convolution"])
def test_maml_pp_goes_on_beyond_the_trained_steps_by_the_norms_and_rates_of_the_last(case: str) -> None:
    learner, tasks = build("maml_pp", case, steps=STEPS), tasks_of(case)
    given, points = given_of(learner, case, tasks), learner.path(tasks, STEPS + 2)
    forward = forward_of(given.model)
    for number, task in enumerate(one_by_one(tasks)):
        path = maml_pp_path(given, task, STEPS + 2)
        for point, theta in zip(points, path, strict=True):
            assert point.prediction is not None
            torch.testing.assert_close(point.prediction[number], forward(theta, task.query[0]), rtol=EXACT, atol=EXACT)
        adapted = learner.adapt(task.support, STEPS + 2)
        torch.testing.assert_close(adapted(task.query[0]), forward(path[-1], task.query[0]), rtol=EXACT, atol=EXACT)
        # Which of the norms these are is not a matter of taste: those of the first step answer otherwise.
        norms = [*learner.objective.per_step]
        others = {name.removeprefix("model."): learner.objective.per_step[name][0] for name in norms}
        assert (forward({**path[-1], **others}, task.query[0]) - forward(path[-1], task.query[0])).abs().max() > 1e-3


# Reptile.


@pytest.mark.parametrize("case", ["regression", "convolution", "policy"])
def test_serial_reptile_moves_the_start_towards_one_task_after_another(case: str) -> None:
    """Nichol et al. 2018, Algorithm 1: theta <- theta + epsilon (theta' - theta)."""
    learner, tasks, epsilon = build("reptile", case, steps=STEPS), tasks_of(case), 0.3
    model, loss = case_of(case).model(), case_of(case).loss
    model.load_state_dict(learner.model.state_dict())
    optimizer = torch.optim.SGD(learner.parameters(), lr=epsilon)
    step = MetaStep(learner, optimizer)
    for number in [*range(tasks.size), 0]:
        step(tasks.select(slice(number, number + 1)), epsilon)
        support, query = one_by_one(tasks)[number]
        start = [value.detach().clone() for value in model.parameters()]
        inner = torch.optim.SGD(model.parameters(), lr=LR)
        for _ in range(STEPS):
            inner.zero_grad()
            if isinstance(support, dict):
                value = loss(model, support)  # such batches cannot be joined
            else:
                x, y = (torch.cat(parts) for parts in zip(support, query, strict=True))
                value = loss(model(x), y)
            value.backward()  # type: ignore[no-untyped-call]
            inner.step()
        with torch.no_grad():
            for own, before in zip(model.parameters(), start, strict=True):
                own.copy_(before + epsilon * (own - before))
        for ours, own in zip(learner.model.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(ours, own, rtol=1e-12, atol=1e-12)
