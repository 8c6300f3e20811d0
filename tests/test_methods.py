"""The contract of all methods: what is in `fewstep.algorithms` does the same under every engine, and writes nowhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from fewstep import Engine, InputError, MetaStep, algorithms
from fewstep.gradient import task_loss
from tests.contract import CASES, EXCEPT, STEPS, TASKS, TOLERANCE, build, every_pair, tasks_of
from tests.reference import meta_gradient, relative_error

pytestmark = pytest.mark.usefixtures("double")


def copied(values: Any) -> list[Tensor]:
    return [value.detach().clone() for value in tree_leaves(values)]


def test_the_exceptions_are_of_methods_and_cases_that_there_are() -> None:
    assert {name for name, _ in EXCEPT} | set(TOLERANCE) <= set(algorithms.__all__)
    assert {case for _, case in EXCEPT} <= set(CASES)


@pytest.mark.parametrize(("name", "case"), EXCEPT)
def test_a_method_refuses_what_makes_no_sense_for_it(name: str, case: str) -> None:
    with pytest.raises(InputError, match="integer labels"):
        build(name, case)(tasks_of(case))


@every_pair
def test_batched_looped_and_chunked_agree(name: str, case: str) -> None:
    learner, tasks = build(name, case), tasks_of(case)
    wanted = list(learner.parameters())
    truth = learner(tasks)
    gradient = meta_gradient(truth, wanted)
    assert truth.shape == (TASKS,)
    assert gradient.isfinite().all()
    assert gradient.norm() > 0
    tolerance = TOLERANCE.get(name, 1e-9)
    if learner.unrollable:  # the function that compile="step" compiles
        whole = task_loss(*learner.unrolled(tasks))
        torch.testing.assert_close(whole, truth, rtol=1e-9, atol=1e-9)
        assert relative_error(meta_gradient(whole, wanted), gradient) < tolerance
    for engine in (Engine(method="loop"), Engine(chunk=1), Engine(chunk=2)):
        learner.engine = engine
        losses = learner(tasks)
        torch.testing.assert_close(losses, truth, rtol=1e-9, atol=1e-9)
        assert relative_error(meta_gradient(losses, wanted), gradient) < tolerance


@every_pair
def test_tasks_and_parameters_are_left_alone(name: str, case: str) -> None:
    learner, tasks = build(name, case), tasks_of(case)
    held = [*tree_leaves(tasks), *learner.state_dict().values()]
    before, versions = copied(held), [value._version for value in held]
    learner(tasks).mean().backward()
    learner.path(tasks, steps=3)
    learner.adapt(tree_map(lambda leaf: leaf[0], tasks.support))
    assert [value._version for value in held] == versions
    assert all(torch.equal(value, old) for value, old in zip(held, before, strict=True))


@every_pair
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dtype_is_kept(name: str, case: str, dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    learner, tasks = build(name, case), tasks_of(case)
    losses = learner(tasks)
    losses.mean().backward()
    adapted = learner.adapt(tree_map(lambda leaf: leaf[0], tasks.support))
    gradients = [value.grad for value in learner.parameters() if value.grad is not None]
    points = learner.path(tasks)
    assert {value.dtype for value in (losses, *gradients, *adapted.parameters(), *(p.loss for p in points))} == {dtype}
    if points[0].prediction is not None:
        assert points[-1].prediction is not None
        assert points[-1].prediction.dtype == dtype


@every_pair
def test_a_state_dict_says_all_that_was_learned(name: str, case: str) -> None:
    learner, other, tasks = build(name, case), build(name, case, seed=1), tasks_of(case)
    assert not torch.equal(other(tasks), learner(tasks))
    other.load_state_dict(learner.state_dict())
    torch.testing.assert_close(other(tasks), learner(tasks), rtol=1e-12, atol=1e-12)


@every_pair
def test_it_adapts_with_no_steps_and_with_more_than_in_training(name: str, case: str) -> None:
    learner, tasks = build(name, case), tasks_of(case)
    points = learner.path(tasks, steps=STEPS + 3)
    assert len(points) == STEPS + 4
    assert all(point.loss.shape == (TASKS,) and point.loss.isfinite().all() for point in points)
    assert len(learner.path(tasks, steps=0)) == 1
    own, query = (tree_map(lambda leaf: leaf[0], batch) for batch in tasks)
    for steps in (0, STEPS + 3):
        adapted = learner.adapt(own, steps=steps)
        loss = CASES[case].loss
        value = loss(adapted(query[0]), query[1]) if isinstance(query, tuple) else loss(adapted, query)
        torch.testing.assert_close(value, points[steps].loss[0], rtol=1e-9, atol=1e-9)


@every_pair
def test_a_step_of_training_moves_parameters_to_finite_values(name: str, case: str) -> None:
    learner, tasks = build(name, case), tasks_of(case)
    before = copied(list(learner.parameters()))
    loss = MetaStep(learner, torch.optim.Adam(learner.parameters(), lr=1e-2))(tasks, 1e-2)
    after = list(learner.parameters())
    assert loss.isfinite()
    assert all(value.isfinite().all() for value in after)
    assert any(not torch.equal(value, old) for value, old in zip(after, before, strict=True))


@pytest.mark.parametrize("name", algorithms.__all__)
def test_options_of_the_caller_reach_the_learner(name: str) -> None:
    adapt = ["~*.offset"]
    learner = build(name, "convolution", steps=3, adapt=adapt, engine=Engine(chunk=2))
    assert (learner.steps, learner.engine.chunk) == (3, 2)
    assert not any("offset" in name for name in learner.objective.adapted)
    assert learner(tasks_of("convolution")).isfinite().all()
