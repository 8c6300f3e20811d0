"""What single methods promise beyond their equations: what adapts and where it starts, Sharp-MAML, Reptile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fewstep
from fewstep import InputError, Learner, Task
from fewstep.baselines import ProtoNet
from fewstep.baselines.features import features_of
from fewstep.patterns import adapted_parameters, adapted_part
from tests.naive import Given
from tests.naive.descent import prototypes, towards
from tests.reference import meta_gradient, one_by_one, relative_error

TASKS, WAYS, STEPS, LR = 3, 3, 3, 0.2
HEAD = "2"


def model_of(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, WAYS)).double()


def tasks_of(kind: str = "classification", ways: int = WAYS) -> Task:
    torch.manual_seed(1)

    def batch(examples: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(TASKS, examples, 4, dtype=torch.float64)
        if kind == "regression":
            return x, torch.randn(TASKS, examples, WAYS, dtype=torch.float64)
        return x, torch.stack([torch.randperm(examples) % ways for _ in range(TASKS)])

    return Task(batch(2 * ways + 1), batch(3 * ways))


# What adapts.


def test_anil_and_boil_need_something_that_adapts() -> None:
    model = model_of()
    with pytest.raises(InputError, match="no parameter of the head is left to adapt: the head is '2'"):
        fewstep.anil(model, functional.mse_loss, lr=LR, adapt="0.*")
    with pytest.raises(InputError, match="no parameter of the body is left to adapt"):
        fewstep.boil(nn.Linear(2, 1), functional.mse_loss, lr=LR)
    with pytest.raises(InputError, match="the model has no submodule 'top'; there are: 0, 1, 2"):
        fewstep.anil(model, functional.mse_loss, lr=LR, head="top")
    with pytest.raises(InputError, match="no linear layer to be its head"):
        fewstep.boil(nn.Conv1d(1, 1, 1), functional.mse_loss, lr=LR)


def test_names_of_what_adapts_are_those_of_the_learner() -> None:
    model = model_of()
    model.get_parameter("0.bias").requires_grad_(False)
    for adapt in ("*", "2.*", ["~*.weight"]):
        learner = fewstep.maml(model, functional.mse_loss, lr=LR, adapt=adapt)
        found = adapted_parameters(model, adapt)
        assert list(found) == learner.objective.adapted
        assert all(value is model.get_parameter(name.removeprefix("model.")) for name, value in found.items())
    assert adapted_part(nn.Linear(2, 1), "head") == ["weight", "bias"]


# Where it starts.


@pytest.mark.parametrize("method", [fewstep.proto_maml, fewstep.unicorn_maml])
def test_ways_after_training_may_be_others(method: Callable[..., Learner]) -> None:
    learner = method(model_of(), functional.cross_entropy, lr=LR, steps=STEPS)
    learner(tasks_of(ways=3)).mean().backward()
    for ways in (2, 5):
        task = one_by_one(tasks_of(ways=ways))[0]
        adapted = learner.adapt(task.support)
        assert adapted(task.query[0]).shape == (3 * ways, ways)
        prediction = learner.path(tasks_of(ways=ways))[-1].prediction
        assert prediction is not None
        torch.testing.assert_close(adapted(task.query[0]), prediction[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("ways", [2, 3, 5])
def test_proto_maml_without_steps_is_a_prototypical_network(ways: int) -> None:
    model, tasks = model_of(), tasks_of(ways=ways)
    learner = fewstep.proto_maml(model, functional.cross_entropy, lr=LR, steps=0)
    network = ProtoNet(features_of(model))
    ours, theirs = learner.path(tasks)[0].prediction, network.path(tasks)[0].prediction
    assert ours is not None
    assert theirs is not None
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))
    torch.testing.assert_close(ours.softmax(-1), theirs.softmax(-1), rtol=1e-9, atol=1e-9)
    body = [value for name, value in model.named_parameters() if not name.startswith(HEAD)]
    assert relative_error(meta_gradient(learner(tasks), body), meta_gradient(network(tasks), body)) < 1e-9


@pytest.mark.parametrize("steps", [1, 2])
def test_one_step_of_unicorn_maml_moves_nothing_but_the_head(steps: int) -> None:
    """The head's rows are alike, so that what comes back through them sums to zero: to leave out the body is free."""
    gradients = []
    for adapt in ("*", f"{HEAD}.*"):
        learner = fewstep.unicorn_maml(model_of(), functional.cross_entropy, lr=LR, steps=steps, adapt=adapt)
        gradients.append(meta_gradient(learner(tasks_of()), list(learner.parameters())))
    assert (relative_error(*gradients) < 1e-12) == (steps == 1)


def test_unicorn_maml_does_not_care_what_a_class_is_called() -> None:
    tasks, order = tasks_of(), torch.tensor([2, 0, 1])
    renamed = Task(*((x, order[y]) for x, y in tasks))  # class k is called order[k]
    for method, same in ((fewstep.unicorn_maml, True), (fewstep.maml, False)):
        learner = method(model_of(), functional.cross_entropy, lr=LR, steps=STEPS)
        ours, theirs = learner.path(tasks)[-1].prediction, learner.path(renamed)[-1].prediction
        assert ours is not None
        assert theirs is not None
        assert torch.allclose(ours, theirs[..., order], rtol=1e-12, atol=1e-12) == same


@pytest.mark.parametrize("method", [fewstep.proto_maml, fewstep.unicorn_maml])
def test_a_start_of_the_head_needs_a_head_that_adapts(method: Callable[..., Learner]) -> None:
    loss, tasks = functional.cross_entropy, tasks_of()
    with pytest.raises(InputError, match=r"its parameter '2\.weight' does not adapt"):
        method(model_of(), loss, lr=LR, adapt="0.*")(tasks)
    with pytest.raises(InputError, match=r"its parameter '2\.bias' does not adapt"):
        method(model_of(), loss, lr=LR, adapt="~*.bias")(tasks)
    frozen = model_of()
    frozen.get_submodule(HEAD).requires_grad_(False)
    with pytest.raises(InputError, match="does not adapt"):
        method(frozen, loss, lr=LR)(tasks)
    with pytest.raises(InputError, match="must be a linear layer"):
        method(model_of(), loss, lr=LR, head="1")


@pytest.mark.parametrize("method", [fewstep.proto_maml, fewstep.unicorn_maml])
def test_a_model_may_be_nothing_but_its_head(method: Callable[..., Learner]) -> None:
    learner = method(nn.Linear(4, WAYS).double(), functional.cross_entropy, lr=LR)
    assert learner(tasks_of()).isfinite().all()


@pytest.mark.parametrize("method", [fewstep.proto_maml, fewstep.unicorn_maml])
def test_what_is_wrong_is_named_where_there_are_more_ways_than_outputs(method: Callable[..., Learner]) -> None:
    learner = method(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)), functional.cross_entropy, lr=LR)
    x, y = torch.randn(2, 8, 2), torch.arange(4).repeat(2).expand(2, 8)
    assert learner(Task((x, y), (x, y))).isfinite().all()
    with pytest.raises(InputError, match=r"query labels run from 1 to 4, but the support set has the classes 0\.\.3"):
        learner(Task((x, y), (x, y + 1)))
    with pytest.raises(InputError, match="cannot take one task's query x"):
        learner(Task((x, y), (torch.randn(2, 8, 5), y)))


# Sharp-MAML.


def test_sharp_maml_stays_where_the_gradient_is_zero_and_puts_back_what_it_shifted() -> None:
    tasks = tasks_of("regression")
    learner = fewstep.sharp_maml(model_of(), lambda out, y: 0 * out.sum() + 1, lr=LR)
    assert torch.equal(learner(tasks), torch.ones(TASKS, dtype=torch.float64))
    learner = fewstep.sharp_maml(model_of(), functional.mse_loss, lr=LR, ascent="none")
    assert learner(tasks).isfinite().all()
    assert learner.derivative == "exact"
    assert learner.objective.shifts == {}

    def fails(out: Tensor, y: Tensor) -> Tensor:
        if learner.objective.shifts:
            raise ValueError("shifted")
        return functional.mse_loss(out, y)

    learner = fewstep.sharp_maml(model_of(), fails, lr=LR, where="outer")
    with pytest.raises(ValueError, match="shifted"):
        learner(tasks)
    assert learner.objective.shifts == {}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"where": "above"}, "where must be one of"),
        ({"inner_radius": 0}, "the radius must be above 0"),
        ({"outer_radius": -1.0}, "the outer radius must be above 0"),
        ({"ascent": "finite_difference"}, "ascent must be 'exact' or 'none'"),
    ],
)
def test_sharp_maml_says_what_it_cannot_do(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        fewstep.sharp_maml(model_of(), functional.mse_loss, lr=LR, **options)


# Reptile.


def union(task: Task) -> tuple[Tensor, Tensor]:
    (x, y), (query_x, query_y) = task
    return torch.cat([x, query_x]), torch.cat([y, query_y])


def test_reptile_with_one_step_is_joint_training() -> None:
    model, tasks = model_of(), tasks_of()
    learner = fewstep.reptile(model, functional.cross_entropy, lr=LR)
    own = list(model.parameters())
    joint = torch.stack([functional.cross_entropy(model(x), y) for x, y in map(union, one_by_one(tasks))])
    assert relative_error(meta_gradient(learner(tasks), own), LR * meta_gradient(joint, own)) < 1e-9


def test_reptile_with_no_step_stands_still_and_leaves_alone_what_does_not_adapt() -> None:
    model, tasks = model_of(), tasks_of()
    still = fewstep.reptile(model, functional.cross_entropy, lr=LR, steps=0)
    assert not meta_gradient(still(tasks), list(model.parameters())).any()
    fewstep.reptile(model, functional.cross_entropy, lr=LR, adapt="2.*")(tasks).mean().backward()
    assert {name: value.grad is not None for name, value in model.named_parameters()} == {
        "0.weight": False, "0.bias": False, "2.weight": True, "2.bias": True}  # fmt: skip


def test_reptile_goes_on_through_a_start_that_is_made() -> None:
    model, tasks, loss = model_of(), tasks_of(), functional.cross_entropy
    start = fewstep.proto_maml(model, loss, lr=LR).start
    learner = fewstep.reptile(model, loss, lr=LR, steps=STEPS, start=start, pool=False)
    given = Given(model, loss, tasks, dict(learner.named_parameters()), LR, STEPS)
    truth = towards(given, lambda task: prototypes(given, task), pool=False)
    own = list(model.parameters())
    assert relative_error(meta_gradient(learner(tasks), own), meta_gradient(truth.objective, own)) < 1e-9


def test_reptile_keeps_no_graph_of_its_inner_loop() -> None:
    losses = fewstep.reptile(model_of(), functional.cross_entropy, lr=LR, steps=STEPS)(tasks_of())
    seen, rest = set(), [losses.grad_fn]
    while rest:
        node = rest.pop()
        if node is not None and node not in seen:
            seen.add(node)
            rest += [after for after, _ in node.next_functions]
    assert not [node.name() for node in seen if "InnerGradient" in node.name() or "TaskLoss" in node.name()]


def test_reptile_adapts_to_the_support_set_alone_where_batches_cannot_be_joined() -> None:
    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return functional.mse_loss(model(batch["x"]), batch["y"])

    model, tasks = model_of(), tasks_of("regression")
    named = Task(*({"x": x, "y": y} for x, y in tasks))
    own, other = fewstep.reptile(model, loss, lr=LR), fewstep.reptile(model, functional.mse_loss, lr=LR, pool=False)
    assert torch.equal(own(named), other(tasks))


def test_reptile_cannot_join_a_stream() -> None:
    with pytest.raises(InputError, match="use pool=False"):
        fewstep.reptile(model_of(), functional.mse_loss, lr=LR, stream=True)
    support, query = tasks_of("regression")
    learner = fewstep.reptile(model_of(), functional.mse_loss, lr=LR, steps=STEPS, stream=True, pool=False)
    single = fewstep.reptile(model_of(), functional.mse_loss, lr=LR, steps=STEPS, pool=False)
    stream = tuple(part.unsqueeze(1) for part in support)
    assert torch.equal(learner(Task(stream, query)), single(Task(support, query)))
