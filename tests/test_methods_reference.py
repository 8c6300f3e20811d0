"""Each method against its paper's equations, written out with plain autograd through one task after another."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

import fewstep
from fewstep import Engine, InputError, Learner, Task
from fewstep.baselines import ProtoNet
from fewstep.baselines.features import features_of
from fewstep.functional import Loss, Tensors
from fewstep.patterns import adapted_parameters, adapted_part
from fewstep.task import map_tensors
from tests.reference import meta_gradient, naive_losses, relative_error

TASKS, WAYS, STEPS, LR = 3, 3, 3, 0.2
HEAD = "2"
Step = Callable[[Tensors, Callable[[Tensors], Tensors], int], Tensors]
"""One inner step of one task: `theta' = step(theta, gradient, number)`, where `gradient(theta)` is that of its loss."""

KINDS: dict[str, Loss] = {"classification": functional.cross_entropy, "regression": functional.mse_loss}
every_kind = pytest.mark.parametrize("kind", KINDS)


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


def moved(learner: Learner) -> Learner:
    """The learner with its rule's parameters away from where they start."""
    torch.manual_seed(2)
    with torch.no_grad():
        assert isinstance(learner.update, nn.Module)
        for value in learner.update.parameters():
            value.add_(0.1 * torch.randn_like(value))
    return learner


def one_by_one(tasks: Task) -> list[Task]:
    return [map_tensors(lambda leaf, i=i: leaf[i], tasks) for i in range(tasks.size)]  # type: ignore[misc]


def gradient_of(model: nn.Module, loss: Loss, batch: Any, theta: Tensors) -> Tensors:
    value = loss(functional_call(model, theta, (batch[0],)), batch[1])
    return dict(zip(theta, torch.autograd.grad(value, list(theta.values()), create_graph=True), strict=True))


def plain(theta: Tensors, gradient: Callable[[Tensors], Tensors], number: int) -> Tensors:
    g = gradient(theta)
    return {name: theta[name] - LR * g[name] for name in theta}


def after(model: nn.Module, loss: Loss, task: Task, step: Step, theta: Tensors | None = None) -> Tensors:
    """theta of one task after STEPS inner steps."""
    start = dict(model.named_parameters()) if theta is None else theta
    theta = {name: value.clone() for name, value in start.items()}  # a head is no longer a function of the body
    for number in range(STEPS):
        theta = step(theta, partial(gradient_of, model, loss, task.support), number)
    return theta


def query_loss(model: nn.Module, loss: Loss, task: Task, theta: Tensors) -> Tensor:
    x, y = task.query
    value: Tensor = loss(functional_call(model, theta, (x,)), y)
    return value


def naive(model: nn.Module, loss: Loss, tasks: Task, step: Step) -> Tensor:
    return torch.stack([query_loss(model, loss, task, after(model, loss, task, step)) for task in one_by_one(tasks)])


def assert_equal(learner: Learner, tasks: Task, truth: Tensor) -> None:
    """Losses and meta-gradients by every parameter of the learner, batched and one task after another."""
    wanted = list(learner.parameters())
    gradient = meta_gradient(truth, wanted)
    for engine in (Engine(), Engine(method="loop")):
        learner.engine = engine
        losses = learner(tasks)
        torch.testing.assert_close(losses, truth, rtol=1e-9, atol=1e-9)
        assert relative_error(meta_gradient(losses, wanted), gradient) < 1e-9


# What adapts.


@every_kind
@pytest.mark.parametrize(
    ("method", "options", "adapted"),
    [
        (fewstep.anil, {}, ["2.weight", "2.bias"]),
        (fewstep.anil, {"adapt": "~*.bias"}, ["2.weight"]),
        (fewstep.anil, {"head": "0"}, ["0.weight", "0.bias"]),
        (fewstep.boil, {}, ["0.weight", "0.bias"]),
        (fewstep.boil, {"adapt": "*.weight"}, ["0.weight"]),
        (fewstep.boil, {"head": "0"}, ["2.weight", "2.bias"]),
    ],
)
def test_anil_and_boil_are_maml_of_a_part(
    method: Callable[..., Learner], options: dict[str, Any], adapted: list[str], kind: str
) -> None:
    model, tasks = model_of(), tasks_of(kind)
    learner = method(model, KINDS[kind], lr=LR, steps=STEPS, **options)
    assert_equal(learner, tasks, naive_losses(model, KINDS[kind], tasks, lr=LR, steps=STEPS, adapted=adapted))


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


def prototypes(model: nn.Module, task: Task, ways: int) -> Tensors:
    x, y = task.support
    features = model[:2](x)  # type: ignore[index]
    means = torch.stack([features[y == way].mean(0) for way in range(ways)])
    return {f"{HEAD}.weight": 2 * means, f"{HEAD}.bias": -(means * means).sum(1)}


def shared_vector(model: nn.Module, task: Task, ways: int) -> Tensors:
    weight, bias = model.get_parameter(f"{HEAD}.weight"), model.get_parameter(f"{HEAD}.bias")
    return {f"{HEAD}.weight": torch.stack([weight.mean(0)] * ways), f"{HEAD}.bias": torch.stack([bias.mean()] * ways)}


@pytest.mark.parametrize(("method", "start"), [(fewstep.proto_maml, prototypes), (fewstep.unicorn_maml, shared_vector)])
@pytest.mark.parametrize("ways", [2, 3, 5])
def test_methods_with_a_start_equal_plain_autograd(
    method: Callable[..., Learner], start: Callable[[nn.Module, Task, int], Tensors], ways: int
) -> None:
    model, tasks, loss = model_of(), tasks_of(ways=ways), functional.cross_entropy
    truth = []
    for task in one_by_one(tasks):
        theta = {**dict(model.named_parameters()), **start(model, task, ways)}
        truth.append(query_loss(model, loss, task, after(model, loss, task, plain, theta)))
    assert_equal(method(model, loss, lr=LR, steps=STEPS), tasks, torch.stack(truth))


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


# Learned update rules.


@every_kind
def test_meta_sgd(kind: str) -> None:
    model, tasks, loss = model_of(), tasks_of(kind), KINDS[kind]
    learner = moved(fewstep.meta_sgd(model, loss, lr=LR, steps=STEPS))
    rates: Any = learner.update

    def step(theta: Tensors, gradient: Callable[[Tensors], Tensors], number: int) -> Tensors:
        g = gradient(theta)
        return {name: theta[name] - rates.rates[f"model.{name}".replace(".", "/")] * g[name] for name in theta}

    assert_equal(learner, tasks, naive(model, loss, tasks, step))


@every_kind
def test_meta_curvature(kind: str) -> None:
    model, tasks, loss = model_of(), tasks_of(kind), KINDS[kind]
    learner = moved(fewstep.meta_curvature(model, loss, lr=LR, steps=STEPS))
    rule: Any = learner.update

    def transformed(name: str, g: Tensor) -> Tensor:
        key = f"model/{name.replace('.', '/')}"
        if g.dim() == 1:
            return torch.einsum("po,o->p", rule.out[key], g)
        return torch.einsum("po,qi,oi->pq", rule.out[key], rule.into[key], g)

    def step(theta: Tensors, gradient: Callable[[Tensors], Tensors], number: int) -> Tensors:
        g = gradient(theta)
        return {name: theta[name] - LR * transformed(name, g[name]) for name in theta}

    assert_equal(learner, tasks, naive(model, loss, tasks, step))


def two_layers(network: nn.Module, x: Tensor) -> Tensor:
    hidden = (network.get_parameter("0.weight") @ x + network.get_parameter("0.bias")).clamp(min=0)
    return network.get_parameter("2.weight") @ hidden + network.get_parameter("2.bias")


@every_kind
def test_alfa(kind: str) -> None:
    model, tasks, loss = model_of(), tasks_of(kind), KINDS[kind]
    learner = moved(fewstep.alfa(model, loss, lr=LR, steps=STEPS))
    rule: Any = learner.update

    def step(theta: Tensors, gradient: Callable[[Tensors], Tensors], number: int) -> Tensors:
        g = gradient(theta)
        seen = torch.stack([*(g[name].mean() for name in theta), *(theta[name].mean() for name in theta)])
        made = two_layers(rule.network, seen)
        alpha, beta = rule.alpha[number] * made[: len(theta)], rule.beta[number] * made[len(theta) :]
        return {name: beta[i] * theta[name] - alpha[i] * g[name] for i, name in enumerate(theta)}

    assert_equal(learner, tasks, naive(model, loss, tasks, step))


@every_kind
def test_l2f(kind: str) -> None:
    model, tasks, loss = model_of(), tasks_of(kind), KINDS[kind]
    learner = moved(fewstep.l2f(model, loss, lr=LR, steps=STEPS))
    rule: Any = learner.update

    def step(theta: Tensors, gradient: Callable[[Tensors], Tensors], number: int) -> Tensors:
        if number == 0:
            g = gradient(theta)
            gamma = two_layers(rule.network, torch.stack([g[name].mean() for name in theta])).sigmoid()
            theta = {name: gamma[i] * theta[name] for i, name in enumerate(theta)}
        return plain(theta, gradient, number)

    assert_equal(learner, tasks, naive(model, loss, tasks, step))


# Sharp-MAML.

INNER, OUTER = 0.3, 0.4


def sharp(theta: Tensors, gradient: Callable[[Tensors], Tensors], number: int) -> Tensors:
    g = gradient(theta)
    norm = torch.stack([value.square().sum() for value in g.values()]).sum().sqrt()
    g = gradient({name: theta[name] + INNER * g[name] / norm for name in theta})
    return {name: theta[name] - LR * g[name] for name in theta}


def beside(model: nn.Module, losses: Tensor) -> nn.Module:
    """The model with its parameters moved by OUTER along the gradient of the mean loss."""
    gradient = torch.autograd.grad(losses.mean(), list(model.parameters()))
    norm = torch.cat([value.flatten() for value in gradient]).norm()
    other = copy.deepcopy(model)
    for value, part in zip(other.parameters(), gradient, strict=True):
        value.data += OUTER * part / norm
    return other


@every_kind
@pytest.mark.parametrize("where", ["inner", "outer", "both"])
def test_sharp_maml(where: str, kind: str) -> None:
    model, tasks, loss = model_of(), tasks_of(kind), KINDS[kind]
    learner = fewstep.sharp_maml(model, loss, lr=LR, steps=STEPS, where=where,  # type: ignore[arg-type]
                                 inner_radius=INNER, outer_radius=OUTER)  # fmt: skip
    step = plain if where == "outer" else sharp
    other = model if where == "inner" else beside(model, naive(model, loss, tasks, step))
    truth = naive(other, loss, tasks, step)
    losses = learner(tasks)
    torch.testing.assert_close(losses, truth, rtol=1e-9, atol=1e-9)
    gradient = meta_gradient(truth, list(other.parameters()))
    assert relative_error(meta_gradient(losses, list(model.parameters())), gradient) < 1e-9
    assert learner.objective.shifts == {}


@pytest.mark.parametrize("adapt", ["*", "2.*"])
def test_sharp_maml_shifts_shared_parameters_too_and_may_do_so_by_first_order(adapt: str) -> None:
    model, tasks, loss = model_of(), tasks_of(), functional.cross_entropy
    adapted = [name.removeprefix("model.") for name in adapted_parameters(model, adapt)]
    known = partial(naive_losses, loss=loss, tasks=tasks, lr=LR, steps=STEPS, adapted=adapted)
    other = beside(model, known(model, first_order=True))
    truth = known(other)
    gradient = meta_gradient(truth, list(other.parameters()))
    for segment in (None, 2):
        learner = fewstep.sharp_maml(model, loss, lr=LR, steps=STEPS, where="outer", outer_radius=OUTER, ascent="none",
                                     adapt=adapt, segment=segment)  # fmt: skip
        losses = learner(tasks)
        torch.testing.assert_close(losses, truth, rtol=1e-9, atol=1e-9)
        assert relative_error(meta_gradient(losses, list(model.parameters())), gradient) < 1e-9
        assert learner.derivative == "exact"


def test_sharp_maml_stays_where_the_gradient_is_zero_and_puts_back_what_it_shifted() -> None:
    tasks = tasks_of("regression")
    learner = fewstep.sharp_maml(model_of(), lambda out, y: 0 * out.sum() + 1, lr=LR)
    assert torch.equal(learner(tasks), torch.ones(TASKS, dtype=torch.float64))

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


@every_kind
@pytest.mark.parametrize("pool", [True, False])
def test_reptile_moves_towards_what_torch_finds(pool: bool, kind: str) -> None:
    model, tasks, loss = model_of(), tasks_of(kind), KINDS[kind]
    losses, moves = [], []
    for task in one_by_one(tasks):
        own = copy.deepcopy(model)
        optimizer = torch.optim.SGD(own.parameters(), lr=LR)
        x, y = union(task) if pool else task.support
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss(own(x), y).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        losses.append(loss(own(task.query[0]), task.query[1]).detach())
        moves.append([a.detach() - b.detach() for a, b in zip(model.parameters(), own.parameters(), strict=True)])
    truth = torch.cat([torch.stack(parts).mean(0).flatten() for parts in zip(*moves, strict=True)])
    learner = fewstep.reptile(model, loss, lr=LR, steps=STEPS, pool=pool)
    for engine in (Engine(), Engine(method="loop"), Engine(chunk=2)):
        learner.engine = engine
        found = learner(tasks)
        torch.testing.assert_close(found, torch.stack(losses), rtol=1e-9, atol=1e-9)
        assert relative_error(meta_gradient(found / TASKS, list(model.parameters())), truth) < 1e-9


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
    learner = fewstep.proto_maml(model, loss, lr=LR, steps=STEPS)
    learner = fewstep.reptile(model, loss, lr=LR, steps=STEPS, start=learner.start, pool=False)
    half = []
    for task in one_by_one(tasks):
        start = {**dict(model.named_parameters()), **prototypes(model, task, WAYS)}
        theta = after(model, loss, task, plain, start)
        half.append(torch.stack([0.5 * (start[name] - theta[name].detach()).square().sum() for name in start]).sum())
    own = list(model.parameters())
    assert relative_error(meta_gradient(learner(tasks), own), meta_gradient(torch.stack(half), own)) < 1e-9


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
