"""The learner from a user's side: adaptation, any loss, any rule, and clear errors."""

from __future__ import annotations

import copy
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fewstep
from fewstep import Engine, InputError, Learner, Task, maml
from fewstep.data import ClassEpisodes, SinusoidEpisodes
from fewstep.functional import Tensors
from fewstep.updates import SGD
from tests.cases import CASES
from tests.reference import meta_gradient, relative_error


@pytest.fixture
def sinusoids() -> Task:
    return SinusoidEpisodes(tasks=4, shots=5, queries=6)[0]


@pytest.fixture
def learner() -> Learner:
    torch.manual_seed(0)
    return maml(fewstep.models.mlp(init="xavier"), functional.mse_loss, lr=0.01, steps=2)


def test_the_snippet_of_the_design_runs() -> None:
    images = torch.randint(256, (8, 4, 1, 28, 28), dtype=torch.uint8)
    episodes = ClassEpisodes(images=images, ways=5, shots=1, queries=1, tasks=2)
    model = fewstep.models.conv4(ways=5)
    learner = fewstep.maml(model, functional.cross_entropy, lr=0.4, steps=1)
    optimizer = torch.optim.Adam(learner.parameters(), lr=1e-3)
    before = copy.deepcopy(model.state_dict())
    for tasks, _ in zip(episodes, range(2), strict=False):
        learner(tasks).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(not torch.equal(before[name], value) for name, value in model.state_dict().items() if "bias" not in name)
    support_x, support_y = episodes[0].support
    classifier = learner.adapt((support_x[0], support_y[0]))
    assert classifier(torch.rand(3, 1, 28, 28)).shape == (3, 5)


def test_adapt_equals_hand_written_descent_and_leaves_the_model_alone(learner: Learner, sinusoids: Task) -> None:
    model = learner.model
    before = copy.deepcopy(model.state_dict())
    x, y = sinusoids.support[0][0], sinusoids.support[1][0]
    adapted = learner.adapt((x, y), steps=7)
    by_hand = copy.deepcopy(model)
    for _ in range(7):
        grads = torch.autograd.grad(functional.mse_loss(by_hand(x), y), list(by_hand.parameters()))
        for value, grad in zip(by_hand.parameters(), grads, strict=True):
            value.data -= 0.01 * grad
    torch.testing.assert_close(adapted(x), by_hand(x))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert type(adapted) is type(model)


def test_adapt_by_no_step_is_the_model(learner: Learner, sinusoids: Task) -> None:
    x, y = sinusoids.support[0][0], sinusoids.support[1][0]
    assert torch.equal(learner.adapt((x, y), steps=0)(x), learner.model(x))


def test_path_agrees_with_adapt_and_with_forward(learner: Learner, sinusoids: Task) -> None:
    points = learner.path(sinusoids, steps=4)
    assert len(points) == 5
    x, y = sinusoids.support[0][1], sinusoids.support[1][1]
    for step, point in enumerate(points):
        assert point.prediction is not None
        torch.testing.assert_close(point.prediction[1], learner.adapt((x, y), steps=step)(sinusoids.query[0][1]))
    torch.testing.assert_close(points[learner.steps].loss, learner(sinusoids))


def test_any_batch_and_any_loss(sinusoids: Task) -> None:
    """`loss(model, batch)`: here an autoencoder whose batch is a dict, with a method of the model's own."""

    class Autoencoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Linear(1, 3), nn.Linear(3, 1)

        def encode(self, x: Tensor) -> Tensor:
            return torch.tanh(self.down(x))

    def loss(model: Autoencoder, batch: dict[str, Tensor]) -> Tensor:
        return functional.mse_loss(model.up(model.encode(batch["x"])), batch["x"])

    batch = {"x": sinusoids.support[0]}
    learner = maml(Autoencoder(), loss, lr=0.1, steps=3)
    losses = learner(Task(batch, batch))
    losses.sum().backward()
    assert losses.shape == (4,)
    assert all(value.grad is not None for value in learner.parameters())
    assert learner.path(Task(batch, batch))[0].prediction is None


def test_a_loss_with_parameters_is_meta_learned(sinusoids: Task) -> None:
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.0))

        def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
            return self.scale.exp() * functional.mse_loss(prediction, target)

    learner = maml(fewstep.models.mlp(init="xavier"), Weighted(), lr=0.01)
    learner(sinusoids).sum().backward()
    assert learner.get_parameter("loss.scale").grad is not None


def test_a_rule_of_the_users_own_with_a_learned_rate(sinusoids: Task) -> None:
    class MetaSGD(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.rate = nn.ParameterList([torch.full_like(value, 0.01) for value in model.parameters()])

        def forward(self, theta: Tensors, gradient: Tensors, state: Any, step: int) -> tuple[Tensors, Any]:
            return {n: t - r * gradient[n] for (n, t), r in zip(theta.items(), self.rate, strict=True)}, state

    model = fewstep.models.mlp(init="xavier")
    learner = Learner(model, functional.mse_loss, MetaSGD(model), steps=2)
    plain = maml(model, functional.mse_loss, lr=0.01, steps=2)
    torch.testing.assert_close(learner(sinusoids), plain(sinusoids))
    learner(sinusoids).sum().backward()
    assert all(value.grad is not None for name, value in learner.named_parameters() if name.startswith("update."))


def test_a_frozen_base_is_not_copied(sinusoids: Task) -> None:
    model = nn.Sequential(nn.Linear(1, 50), nn.Tanh(), nn.Linear(50, 1))
    model[0].requires_grad_(False)
    learner = maml(model, functional.mse_loss, lr=0.01)
    adapted = learner.adapt((sinusoids.support[0][0], sinusoids.support[1][0]))
    assert adapted.get_parameter("0.weight") is model[0].weight
    assert learner.objective.adapted == ["model.2.weight", "model.2.bias"]


def test_freezing_after_the_learner_is_built_does_not_let_adapt_touch_the_model(sinusoids: Task) -> None:
    model = fewstep.models.mlp(init="xavier")
    learner = maml(model, functional.mse_loss, lr=0.1)
    model.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    learner.adapt((sinusoids.support[0][0], sinusoids.support[1][0]))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("derivative", "flat"), [("none", True), ("exact", False)])
def test_what_a_step_keeps(sinusoids: Task, derivative: Any, flat: bool) -> None:
    """The exact derivative keeps the parameters of each step, the first-order one nothing."""

    def kept(steps: int) -> int:
        model = fewstep.models.mlp(init="xavier")
        learner = maml(model, functional.mse_loss, lr=0.01, steps=steps, derivative=derivative)
        found: dict[int, int] = {}
        seen: set[Any] = set()
        nodes: list[Any] = [learner(sinusoids).grad_fn]
        while nodes:
            node = nodes.pop()
            if node is not None and node not in seen:
                seen.add(node)
                found.update({t.data_ptr(): t.numel() for t in getattr(node, "saved_tensors", ())})
                nodes += [parent for parent, _ in node.next_functions]
        return sum(found.values())

    few, many = kept(2), kept(12)
    parameters = 4 * 1761  # of 4 tasks
    assert (many == few) if flat else (0.9 * 10 * parameters < many - few < 1.3 * 10 * parameters)


def test_state_dict_round_trip(learner: Learner, sinusoids: Task) -> None:
    other = maml(fewstep.models.mlp(), functional.mse_loss, lr=0.01, steps=2)
    other.load_state_dict(learner.state_dict())
    assert torch.equal(other(sinusoids), learner(sinusoids))
    assert torch.equal(copy.deepcopy(learner)(sinusoids), learner(sinusoids))


def test_dtype_is_kept(learner: Learner, sinusoids: Task) -> None:
    double = learner.double()
    tasks = Task(*((x.double(), y.double()) for x, y in sinusoids))
    assert double(tasks).dtype == torch.float64


def test_a_rule_may_give_its_tensors_in_any_order_and_leave_some_alone() -> None:
    """Against plain autograd; the parameter left alone has a size equal to the number of tasks."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    x, y = torch.randn(3, 4, 1, dtype=torch.float64), torch.randn(3, 4, 1, dtype=torch.float64)

    def rule(theta: Tensors, gradient: Tensors, state: Any, step: int) -> tuple[Tensors, Any]:
        moved = [name for name in reversed(theta) if step == 1 or name != "model.0.bias"]
        new = {name: theta[name] - 0.1 * gradient[name] for name in moved}
        return {**new, **{name: theta[name] for name in theta if name not in new}}, state

    ours = Learner(model, functional.mse_loss, rule, steps=2)(Task((x, y), (x, y)))
    losses = []
    for i in range(3):
        own: Tensors = dict(model.named_parameters())
        for step in range(2):
            value = functional.mse_loss(torch.func.functional_call(model, own, (x[i],)), y[i])
            grads = dict(zip(own, torch.autograd.grad(value, list(own.values()), create_graph=True), strict=True))
            own = {n: t.clone() if step == 0 and n == "0.bias" else t - 0.1 * grads[n] for n, t in own.items()}
        losses.append(functional.mse_loss(torch.func.functional_call(model, own, (x[i],)), y[i]))
    parameters = list(model.parameters())
    truth = meta_gradient(torch.stack(losses), parameters)
    assert relative_error(meta_gradient(ours, parameters), truth) < 1e-12


# Input that cannot work


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (lambda theta, gradient, state, step: ({}, state), "must return the tensors model.1.weight"),
        (lambda theta, gradient, state, step: ({n: t.sum() for n, t in theta.items()}, state), "instead of"),
    ],
)
def test_a_rule_that_returns_something_else(sinusoids: Task, rule: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Learner(fewstep.models.mlp(), functional.mse_loss, rule, steps=1)(sinusoids)


def test_an_outer_objective_may_make_something_else_of_the_query_set() -> None:
    """Here three batches of it, which the loss takes one by one."""
    torch.manual_seed(0)
    x, many = torch.randn(4, 5, 1), torch.randn(4, 3, 5, 1)

    def loss(prediction: Tensor, y: Tensor) -> Tensor:
        assert prediction.shape == (5, 1)
        return functional.mse_loss(prediction, y)

    def outer(learner: Learner, tasks: Task) -> Tensor:
        *_, theta = learner.inner_loop(tasks.support, learner.steps)
        each = [Task(tasks.support, (tasks.query[0][:, i], tasks.query[1][:, i])) for i in range(3)]
        return torch.stack([learner.query_loss(theta, learner.steps, task) for task in each]).sum(0)

    learner = Learner(fewstep.models.mlp(), loss, SGD(0.1), steps=1, inner_loss=functional.mse_loss, outer=outer)
    assert learner(Task((x, x), (many, many))).shape == (4,)


@pytest.mark.parametrize("engine", ["vmap", "loop"])
def test_what_would_silently_lose_a_derivative_is_refused(sinusoids: Task, engine: Any) -> None:
    scale = nn.Parameter(torch.ones(()))
    with pytest.raises(InputError, match="depends on a parameter that is neither the model's nor its own"):
        maml(fewstep.models.mlp(), lambda p, y: scale * functional.mse_loss(p, y), lr=0.1, engine=engine)(sinusoids)
    with pytest.raises(InputError, match="depends on a parameter that is neither the model's nor its own"):
        maml(fewstep.models.mlp(), lambda p, y: scale * functional.mse_loss(p, y), lr=0.1, engine=engine,
             inner_loss=functional.mse_loss)(sinusoids)  # fmt: skip
    with patch("fewstep.engine.compiled", lambda function, tensors: function):
        judged = maml(fewstep.models.mlp(), lambda p, y: scale * functional.mse_loss(p, y), lr=0.1,
                      inner_loss=functional.mse_loss, engine=Engine(compile="pieces", method=engine))  # fmt: skip
        judged.path(sinusoids)  # without gradients nothing is lost
        with pytest.raises(InputError, match="depends on a parameter that is neither the model's nor its own"):
            judged(sinusoids)

    learner = maml(nn.Sequential(nn.Linear(1, 3), nn.Dropout(0.5), nn.Linear(3, 1)), functional.mse_loss, lr=0.1)
    losses = learner(sinusoids)
    learner.eval()
    with pytest.raises(InputError, match="from train to eval mode"):
        losses.sum().backward()
    learner.model[2] = nn.Linear(3, 1)  # type: ignore[operator]
    with pytest.raises(InputError, match="replaced after the learner was built"):
        learner(sinusoids)


@pytest.mark.parametrize("kind", ["batch", "layer", "group", "instance"])
@pytest.mark.parametrize("adapt", ["bias", "*"])
def test_a_norm_with_a_bias_and_no_weight_is_refused(kind: str, adapt: str) -> None:
    class Norm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.bias = nn.Parameter(torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.linear(x)
            return {
                "batch": lambda: functional.batch_norm(hidden, None, None, None, self.bias, training=True),
                "layer": lambda: functional.layer_norm(hidden, (4,), None, self.bias),
                "group": lambda: functional.group_norm(hidden, 2, None, self.bias),
                "instance": lambda: functional.instance_norm(hidden[..., None].expand(-1, -1, 2), bias=self.bias)[
                    ..., 0
                ],
            }[kind]()

    x = torch.randn(2, 5, 4)
    with pytest.raises(InputError, match="norm with a bias and no weight"):
        maml(Norm(), functional.mse_loss, lr=0.1, adapt=adapt)(Task((x, x), (x, x)))
    if kind == "group":
        return  # PyTorch cannot even take its gradient without a weight, and says so
    first_order = maml(Norm(), functional.mse_loss, lr=0.1, adapt=adapt, derivative="none", engine="loop")
    assert first_order(Task((x, x), (x, x))).isfinite().all()


def test_operators_without_rules_are_met_with_the_way_out() -> None:
    case = next(case for case in CASES if case.name == "gru")
    with pytest.raises(InputError, match=r"works for one task, but not batched by vmap .* try engine='loop'"):
        maml(case.build(), case.loss, lr=0.1)(case.tasks())

    class Distances(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.linear(x)
            return torch.cdist(hidden, hidden.flip(0)).flatten(1)

    x, y = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 25)
    tasks = Task((x, y), (x, y))
    with pytest.raises(InputError, match=r"no second derivative .* use the derivative 'finite_difference'"):
        maml(Distances(), functional.mse_loss, lr=0.1, engine="loop")(tasks).sum().backward()
    hessian_free = fewstep.hf_maml(Distances(), functional.mse_loss, lr=0.1, engine="loop")
    hessian_free(tasks).sum().backward()


def test_finite_differences_in_half_precision_are_refused(sinusoids: Task) -> None:
    tasks = Task(*((x.bfloat16(), y.bfloat16()) for x, y in sinusoids))
    learner = maml(fewstep.models.mlp().bfloat16(), functional.mse_loss, lr=0.1, derivative="finite_difference")
    with pytest.raises(InputError, match="are noise"):
        learner(tasks).sum().backward()


def test_running_statistics_are_refused_with_the_two_ways_out(sinusoids: Task) -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1))

    with pytest.raises(InputError, match=r"BatchNorm1d '1' keeps running statistics.*use_batch_statistics.*eval mode"):
        maml(build(), functional.mse_loss, lr=0.1)
    converted = fewstep.use_batch_statistics(build())
    assert maml(converted, functional.mse_loss, lr=0.1)(sinusoids).isfinite().all()
    in_eval = maml(build().eval(), functional.mse_loss, lr=0.1)
    assert in_eval(sinusoids).isfinite().all()
    with pytest.raises(InputError, match="BatchNorm1d '1'"):
        in_eval.train()(sinusoids)


@pytest.mark.parametrize("engine", ["vmap", "loop"])
def test_a_module_that_writes_to_a_buffer_is_refused(sinusoids: Task, engine: Any) -> None:
    class Counting(nn.Linear):
        calls: Tensor

        def __init__(self) -> None:
            super().__init__(1, 1)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x)

    with pytest.raises(InputError, match="writes to its buffer 'calls'"):
        maml(Counting(), functional.mse_loss, lr=0.1, engine=engine)(sinusoids)


def test_a_compiled_model_is_refused() -> None:
    with pytest.raises(InputError, match=r"compiled by torch\.compile"):
        maml(torch.compile(fewstep.models.mlp()), functional.mse_loss, lr=0.1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapt": "head.*"}, r"'head.\*' matches no trainable parameter; there are: 1.weight"),
        ({"adapt": "~*"}, "leave no trainable parameter to adapt"),
        ({"steps": -1}, "at least 0, but -1 came"),
        ({"derivative": "exakt"}, "derivative must be one of"),
        ({"engine": "vmapp"}, r"method must be one of \('vmap', 'loop'\), but 'vmapp' came"),
        ({"lr": 0.0}, "learning rate must be above 0"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        maml(fewstep.models.mlp(), functional.mse_loss, **{"lr": 0.1, **options})


X, Y = torch.rand(2, 5, 1, 28, 28), torch.arange(5).expand(2, 5)


@pytest.mark.parametrize(
    ("support", "message"),
    [
        ((X, Y + 1), r"support labels run from 1 to 5, but the model has 5 outputs, for labels 0..4"),
        ((X, Y - 1), "support labels run from -1 to 3"),
        ((X[:, :4], Y), r"support x \(2, 4, 1, 28, 28\) and y \(2, 5\) must agree"),
        ((X[:, :, 0], Y), r"the model cannot take one task's support x \(5, 28, 28\)"),
        ((X[:1], Y), "disagree about the number of tasks"),
        ((X[:, :0], Y[:, :0]), "at least one example"),
        ((torch.full_like(X, torch.nan), Y), "support set of task 0 holds NaN"),
        ((X, None), "NoneType"),
        ((X, [0, 1]), "holds tensors only, but a int came"),
    ],
)
@pytest.mark.parametrize("engine", ["vmap", "loop"])
def test_wrong_tasks(support: Any, message: str, engine: Any) -> None:
    learner = maml(fewstep.models.conv4(5), functional.cross_entropy, lr=0.1, engine=engine)
    with pytest.raises(InputError, match=message):
        learner(Task(support=support, query=(X, Y)))


def test_wrong_support_of_one_task() -> None:
    learner = maml(fewstep.models.conv4(5), functional.cross_entropy, lr=0.1)
    with pytest.raises(InputError, match="NaN or infinity"):
        learner.adapt((torch.full_like(X[0], torch.nan), Y[0]))
    with pytest.raises(InputError, match="labels run from 1 to 5"):
        learner.adapt((X[0], Y[0] + 1))
    with pytest.raises(InputError, match="at least one example"):
        learner.adapt((X[0, :0], Y[0, :0]))
    with pytest.raises(InputError, match="holds tensors only, but a float came"):
        learner.adapt((1.0, Y[0]))
    with pytest.raises(InputError, match=r"expected fewstep.Task"):
        learner((X, Y))


def test_a_loss_that_is_no_number_is_refused(sinusoids: Task) -> None:
    with pytest.raises(InputError, match=r"one floating-point number for a task, but torch.float32 \(5, 1\) came"):
        maml(fewstep.models.mlp(), lambda p, y: (p - y).square(), lr=0.1)(sinusoids)


def test_adaptation_that_diverges_says_so(sinusoids: Task) -> None:
    learner = Learner(fewstep.models.mlp(init="normal"), functional.mse_loss, SGD(1e6), steps=30)
    with pytest.raises(fewstep.DivergenceError, match="not finite after adaptation; lower the inner learning rate"):
        learner.adapt((sinusoids.support[0][0], sinusoids.support[1][0]))


def test_a_module_that_is_used_twice_keeps_its_parameters(sinusoids: Task) -> None:
    torch.manual_seed(0)
    twice, tied = nn.Linear(4, 4), nn.Linear(4, 4)
    tied.weight = twice.weight
    model = nn.Sequential(nn.Linear(1, 4), twice, nn.Tanh(), twice, tied, nn.Linear(4, 1))
    learner, before = maml(model, functional.mse_loss, lr=0.01), dict(model.named_parameters())
    first = meta_gradient(learner(sinusoids), list(learner.parameters()))
    assert all(value is before[name] for name, value in model.named_parameters())
    assert torch.equal(meta_gradient(learner(sinusoids), list(learner.parameters())), first)

    def query_loss() -> float:
        return float(learner(sinusoids).sum())

    learner(sinusoids).sum().backward()
    direction = torch.randn(4, 4)
    assert twice.weight.grad is not None
    slope = (twice.weight.grad * direction).sum()
    with torch.no_grad():
        twice.weight.add_(direction, alpha=1e-2)
        above = query_loss()
        twice.weight.sub_(direction, alpha=2e-2)
        assert (above - query_loss()) / 2e-2 == pytest.approx(slope.item(), rel=1e-2)


def test_a_learned_rule_is_in_the_learner_once(sinusoids: Task) -> None:
    model = fewstep.models.mlp(init="xavier")
    learner = fewstep.meta_sgd(model, functional.mse_loss, lr=0.01)
    assert {name.partition(".")[0] for name in learner.state_dict()} == {"model", "update"}
    learner.update = fewstep.updates.Clipped(SGD(0.01), norm=1.0)
    learner(sinusoids)
    assert len(list(learner.parameters())) == len(list(model.parameters()))


def test_a_start_with_parameters_of_its_own_is_refused_also_after_an_evaluation(sinusoids: Task) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value = nn.Parameter(torch.ones(1, 1))

        def known(self, support: Any) -> None:
            return None

        def forward(self, objective: Any, tensors: Tensors, support: Any, known: Any) -> Tensors:
            return {"model.weight": 2 * self.value}

    learner = Learner(nn.Linear(1, 1), functional.mse_loss, SGD(0.1), steps=1, start=Own())
    with torch.no_grad(), pytest.raises(InputError, match="whose gradient would be lost"):
        learner.path(sinusoids)


@pytest.mark.parametrize("first", [None, "running"])
def test_another_normalisation_before_the_backward_pass_is_refused(sinusoids: Task, first: Any) -> None:
    model = nn.Sequential(nn.Linear(1, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)).eval()
    learner = maml(model, functional.mse_loss, lr=0.1, normalisation=first)
    losses = learner(sinusoids)
    learner.normalisation = "batch"
    with pytest.raises(InputError, match="to another normalisation, between forward and backward pass"):
        losses.sum().backward()


def test_another_mode_before_the_backward_pass_of_a_start_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    learner = fewstep.proto_maml(model, functional.cross_entropy, lr=0.1, derivative="none")
    batch = torch.randn(3, 4, 2), torch.tensor([0, 1, 0, 1]).expand(3, 4)
    losses = learner(Task(batch, batch))
    learner.eval()
    with pytest.raises(InputError, match="from train to eval mode"):
        losses.sum().backward()
