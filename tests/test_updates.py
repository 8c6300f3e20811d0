"""Update rules: against torch's optimisers, formulas written out, and plain autograd through one task after another."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from fewstep import InputError, Learner, Task
from fewstep.functional import Tensors
from fewstep.gradient import task_loss
from fewstep.updates import (
    ALFA,
    SGD,
    Adam,
    AdamW,
    Clipped,
    Forget,
    LearnedRates,
    MetaCurvature,
    Momentum,
    Proximal,
    RMSprop,
    Sharp,
    Update,
    WeightDecay,
    evaluations,
)
from tests.reference import meta_gradient, relative_error

TASKS = 3
Make = Callable[[Tensors], Any]

RULES: dict[str, Make] = {
    "sgd": lambda p: SGD(0.1),
    "momentum": lambda p: Momentum(0.1, 0.8),
    "nesterov": lambda p: Momentum(0.1, 0.8, nesterov=True),
    "adam": lambda p: Adam(0.1),
    "adamw": lambda p: AdamW(0.1, weight_decay=0.2),
    "rmsprop": lambda p: RMSprop(0.01),
    "decay": lambda p: WeightDecay(SGD(0.1), 0.3),
    "norm": lambda p: Clipped(Momentum(0.1), norm=0.5),
    "value": lambda p: Clipped(SGD(0.1), value=0.1),
    "proximal": lambda p: Proximal(Momentum(0.1), 0.5),
    "rates": lambda p: LearnedRates(p, 0.1),
    "meta-sgd": lambda p: LearnedRates(p, 0.1, per="element"),
    "lslr": lambda p: LearnedRates(p, 0.1, steps=2, bounds=(0.09, 0.11)),
    "curvature": lambda p: MetaCurvature(p, 0.1),
    "alfa": lambda p: ALFA(p, 0.1),
    "alfa-steps": lambda p: ALFA(p, 0.1, steps=2),
    "nested": lambda p: Clipped(WeightDecay(LearnedRates(p, 0.1), 0.2), norm=0.7),
    "forget": lambda p: Forget(Momentum(0.1), p),
    "sharp": lambda p: Sharp(Momentum(0.1), 0.05),
    "sharp-forget": lambda p: Proximal(Sharp(Forget(LearnedRates(p, 0.1), p), 0.05), 0.5),
}
SEVERAL = ("forget", "sharp", "sharp-forget")
"""Those that take several gradients in a step."""
LEARNED = ("rates", "meta-sgd", "lslr", "curvature", "alfa", "alfa-steps", "nested", "forget", "sharp-forget")
STARTS_AS_SGD = ("rates", "meta-sgd", "lslr", "curvature", "alfa", "alfa-steps")


def model_of(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).to(dtype)


def named(model: nn.Module) -> Tensors:
    return {f"model.{name}": value for name, value in model.named_parameters()}


def rule_of(name: str, parameters: Tensors, *, moved: bool = True) -> Any:
    """A rule of the table; with `moved` its own parameters are no longer where they start."""
    torch.manual_seed(1)
    rule = RULES[name](parameters)
    if moved and isinstance(rule, nn.Module):
        for value in rule.parameters():
            value.data += 0.1 * value * torch.randn_like(value) + 0.01 * torch.randn_like(value)
    return rule


def stacked(parameters: Tensors, seed: int) -> Tensors:
    generator = torch.Generator(torch.get_default_device()).manual_seed(seed)
    return {name: torch.randn(TASKS, *value.shape, generator=generator, dtype=value.dtype)
            for name, value in parameters.items()}  # fmt: skip


def tasks_of() -> Task:
    generator = torch.Generator(torch.get_default_device()).manual_seed(2)
    x, y = (torch.randn(2, TASKS, 5, n, generator=generator, dtype=torch.float64) for n in (2, 1))
    return Task((x[0], y[0]), (x[1], y[1]))


def walk(rule: Update, theta: Tensors, gradient: Callable[[Tensors], Tensors], steps: int) -> Tensors:
    """theta after `steps` of a rule: as many gradients in each as the rule asks for."""
    state = None
    for step in range(steps):
        for _ in range(evaluations(rule, step)):
            theta, state = rule(theta, gradient(theta), state, step)
    return theta


def naive_losses(model: nn.Module, rule: Update, tasks: Task, steps: int) -> Tensor:
    """The query loss of each task after `steps` on its support set: plain autograd, one task after another."""
    losses = []
    for task in range(TASKS):
        (x, y), (query_x, query_y) = ((part[0][task], part[1][task]) for part in tasks)

        def loss(theta: Tensors, x: Tensor, y: Tensor) -> Tensor:
            alone = {name.removeprefix("model."): value.squeeze(0) for name, value in theta.items()}
            return functional.mse_loss(functional_call(model, alone, (x,)), y)

        def gradient(theta: Tensors, x: Tensor = x, y: Tensor = y) -> Tensors:
            values = torch.autograd.grad(loss(theta, x, y), list(theta.values()), create_graph=True)
            return dict(zip(theta, values, strict=True))

        theta = walk(rule, {name: value.unsqueeze(0) for name, value in named(model).items()}, gradient, steps)
        losses.append(loss(theta, query_x, query_y))
    return torch.stack(losses)


@pytest.mark.parametrize("name", RULES)
def test_every_way_of_the_learner_equals_plain_autograd(name: str) -> None:
    model, tasks = model_of(), tasks_of()
    rule = rule_of(name, named(model))
    learner = Learner(model, functional.mse_loss, rule, steps=3)
    truth = naive_losses(model, rule, tasks, 3)
    wanted = list(learner.parameters())
    gradient = meta_gradient(truth, wanted)
    batched = learner(tasks)
    whole = task_loss(*learner.unrolled(tasks))  # the function that compile="step" compiles
    learner.engine = type(learner.engine)(method="loop")
    for losses in (batched, whole, learner(tasks)):
        torch.testing.assert_close(losses, truth, rtol=1e-9, atol=1e-9)
        assert relative_error(meta_gradient(losses, wanted), gradient) < 1e-9


@pytest.mark.parametrize(
    ("rule", "optimiser"),
    [
        (Momentum(0.1, 0.8), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8)),
        (Momentum(0.1, 0.8, nesterov=True), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, nesterov=True)),
        (Adam(0.1, (0.8, 0.95), 1e-14), lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.8, 0.95), eps=1e-14)),
        (Adam(0.1, eps=1e-14), lambda p: torch.optim.Adam(p, lr=0.1, eps=1e-14)),
        (AdamW(0.1, eps=1e-14, weight_decay=0.3),
         lambda p: torch.optim.AdamW(p, lr=0.1, eps=1e-14, weight_decay=0.3)),
        (RMSprop(0.1, 0.9, 1e-14), lambda p: torch.optim.RMSprop(p, lr=0.1, alpha=0.9, eps=1e-14)),
        (WeightDecay(Momentum(0.1), 0.3), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.3)),
        (WeightDecay(Adam(0.1, eps=1e-14), 0.3), lambda p: torch.optim.Adam(p, lr=0.1, eps=1e-14, weight_decay=0.3)),
    ],
)  # fmt: skip
def test_the_steps_are_those_of_torch(rule: Update, optimiser: Callable[[list[Tensor]], torch.optim.Optimizer]) -> None:
    parameters = named(model_of())
    theta: Tensors = {name: value.detach() for name, value in parameters.items()}
    own = [{name: value.detach().clone() for name, value in parameters.items()} for _ in range(TASKS)]
    optimisers = [optimiser(list(values.values())) for values in own]
    state = None
    for step in range(5):
        gradient = stacked(parameters, step)
        theta, state = rule(theta, gradient, state, step)
        for task in range(TASKS):
            for name, value in own[task].items():
                value.grad = gradient[name][task]
            optimisers[task].step()
            for name, value in own[task].items():
                torch.testing.assert_close(theta[name][task], value, rtol=1e-9, atol=1e-9)


def test_adam_with_a_large_eps_by_hand() -> None:
    theta, gradient = {"w": torch.tensor([1.0])}, {"w": torch.tensor([[3.0]])}
    result, _ = Adam(0.1, eps=4.0)(theta, gradient, None, 0)
    assert result["w"].item() == pytest.approx(1 - 0.1 * 3 / 5)  # sqrt(3^2 + 4^2)
    result, _ = RMSprop(0.1, decay=0.0, eps=4.0)(theta, gradient, None, 0)
    assert result["w"].item() == pytest.approx(1 - 0.1 * 3 / 5)


def test_clipping_is_that_of_torch_for_each_task() -> None:
    parameters = named(model_of())
    gradient = stacked(parameters, 0)
    norms = torch.stack([torch.cat([g[i].flatten() for g in gradient.values()]).norm() for i in range(TASKS)])
    between = float(norms.sort().values[:2].mean())
    zero = {name: torch.zeros_like(value) for name, value in parameters.items()}
    result, _ = Clipped(SGD(1.0), norm=between)(zero, gradient, None, 0)
    for task in range(TASKS):
        clipped = [g[task].clone() for g in gradient.values()]
        leaves = [torch.zeros_like(value, requires_grad=True) for value in clipped]
        for leaf, value in zip(leaves, clipped, strict=True):
            leaf.grad = value
        nn.utils.clip_grad_norm_(leaves, between)
        for value, leaf in zip(result.values(), leaves, strict=True):
            assert leaf.grad is not None
            torch.testing.assert_close(-value[task], leaf.grad, rtol=1e-5, atol=1e-7)  # torch adds 1e-6 to the norm
    assert torch.equal(-result["model.0.bias"][norms.argmin()], gradient["model.0.bias"][norms.argmin()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", RULES)
def test_zero_gradients_have_a_finite_derivative(name: str, dtype: torch.dtype) -> None:
    """Task 0 has no gradient at all, task 1 none in one tensor; the derivative is taken by gradients and theta."""
    parameters = named(model_of(dtype))
    rule = rule_of(name, parameters)
    # L = 1/2 sum s (theta - c)^2: with c the start, the gradient is exactly 0, and its derivative is not.
    scale = stacked(parameters, 0)
    center = {key: value.detach().expand_as(scale[key]).clone() for key, value in parameters.items()}
    for key, value in center.items():
        value[2] += 1.0
        value[1] += float(key != "model.0.weight")
        scale[key].requires_grad_(True)
    theta = walk(rule, parameters, lambda theta: {key: scale[key] * (theta[key] - center[key]) for key in theta}, 3)
    total = torch.stack([value.square().sum() for value in theta.values()]).sum()
    own = list(rule.parameters()) if isinstance(rule, nn.Module) else []
    wanted = [*parameters.values(), *scale.values(), *own]
    grads = torch.autograd.grad(total, wanted, allow_unused=True, materialize_grads=True)
    assert all(torch.isfinite(value).all() for value in (*theta.values(), *grads))


@pytest.mark.parametrize("name", RULES)
def test_tasks_do_not_mix_and_arguments_are_left_alone(name: str) -> None:
    parameters = named(model_of())
    rule = rule_of(name, parameters)
    given = [stacked(parameters, seed) for seed in range(8)]
    other = copy.deepcopy(given)
    for gradient in other:
        for value in gradient.values():
            value[1] *= 3

    def run(gradients: list[Tensors]) -> Tensors:
        left = iter(gradients)

        def gradient(theta: Tensors) -> Tensors:  # of theta as well, so that a rule that moves it on the way shows
            return {key: value * (1 + theta[key]) for key, value in next(left).items()}

        return walk(rule, parameters, gradient, 2 if name in SEVERAL else 3)

    before = copy.deepcopy(given)
    first, second = run(given), run(other)
    again = run(given)
    for key in parameters:
        assert first[key].shape == (TASKS, *parameters[key].shape)
        assert torch.equal(first[key][[0, 2]], second[key][[0, 2]])
        assert torch.equal(first[key], again[key])  # nothing is kept in the rule
        assert all(torch.equal(a[key], b[key]) for a, b in zip(given, before, strict=True))
    assert any(not torch.equal(first[key][1], second[key][1]) for key in parameters)


@pytest.mark.parametrize("name", LEARNED)
def test_a_learned_rule_can_be_saved_and_loaded(name: str) -> None:
    parameters = named(model_of())
    rule, fresh = rule_of(name, parameters), rule_of(name, parameters, moved=False)
    gradient = stacked(parameters, 0)
    result = walk(rule, parameters, lambda theta: gradient, 1)
    assert any(
        not torch.equal(value, result[key]) for key, value in walk(fresh, parameters, lambda _: gradient, 1).items()
    )
    fresh.load_state_dict(rule.state_dict())
    assert all(torch.equal(value, result[key]) for key, value in walk(fresh, parameters, lambda _: gradient, 1).items())
    total = torch.stack([value.square().sum() for value in result.values()]).sum()
    torch.autograd.backward(total)
    first = [value for key, value in rule.named_parameters() if "network.0" not in key]
    assert all(value.grad is not None and torch.isfinite(value.grad).all() for value in first)


@pytest.mark.parametrize("name", STARTS_AS_SGD)
def test_a_learned_rule_starts_as_gradient_descent(name: str) -> None:
    parameters = named(model_of())
    rule, plain = rule_of(name, parameters, moved=False), SGD(0.1)
    numbers = iter([*range(4), *range(4)])

    def gradient(theta: Tensors) -> Tensors:
        return stacked(parameters, next(numbers))

    left, right = walk(rule, parameters, gradient, 4), walk(plain, parameters, gradient, 4)
    for key in parameters:
        torch.testing.assert_close(left[key], right[key], rtol=1e-14, atol=1e-14)


def test_rates_of_a_step_bounds_and_how_a_rate_comes_back() -> None:
    one = {"model.w": torch.ones(1, dtype=torch.float64)}
    rule = LearnedRates(one, 0.1, steps=2, bounds=(0.05, 0.2))
    with torch.no_grad():
        rule.rates["model/w"].copy_(torch.tensor([0.1, 0.5], dtype=torch.float64))
    gradient = {"model.w": torch.ones(1, 1, dtype=torch.float64)}
    results = [rule(one, gradient, None, step)[0]["model.w"] for step in (0, 1, 7)]
    assert [round(value.item(), 9) for value in results] == [0.9, 0.8, 0.8]  # 0.5 is clamped; step 7 is as step 1
    torch.autograd.backward(results[1].sum())
    assert rule.rates["model/w"].grad is not None
    assert rule.rates["model/w"].grad.tolist() == [0, -1]  # as if it were not clamped


def test_meta_curvature_is_a_kronecker_product() -> None:
    """vec(MC(G)) = (M_o x M_i x M_f) vec(G), for a convolution, a matrix, a vector and a single number."""
    shapes = {"model.c": (3, 2, 2, 2), "model.m": (3, 2), "model.v": (3,), "model.s": ()}
    parameters = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
    rule = MetaCurvature(parameters, 1.0)
    for value in rule.parameters():
        nn.init.normal_(value)
    gradient = stacked(parameters, 0)
    result, _ = rule(parameters, gradient, None, 0)
    for name in shapes:
        factor = torch.ones(1, 1, dtype=torch.float64)
        for group in (rule.out, rule.into, rule.kernel):
            if name.replace(".", "/") in group:
                factor = torch.kron(factor, group[name.replace(".", "/")])
        expected = gradient[name].reshape(TASKS, -1) @ factor.T
        torch.testing.assert_close(-result[name].reshape(TASKS, -1), expected)


def test_alfa_by_hand() -> None:
    parameters = named(model_of())
    rule = rule_of("alfa-steps", parameters)
    gradient, theta = stacked(parameters, 0), stacked(parameters, 1)
    result, _ = rule(theta, gradient, None, 5)  # beyond the last step: as the last
    for task in range(TASKS):
        seen = [value[task].mean() for value in (*gradient.values(), *theta.values())]
        a, b = rule.network(torch.stack(seen)).split(len(parameters))
        for index, name in enumerate(parameters):
            alpha, beta = rule.alpha[1, index] * a[index], rule.beta[1, index] * b[index]
            torch.testing.assert_close(result[name][task], beta * theta[name][task] - alpha * gradient[name][task])


def test_forget_by_hand() -> None:
    parameters = named(model_of())
    rule = rule_of("forget", parameters)
    gradient = stacked(parameters, 0)
    assert [evaluations(rule, step) for step in range(3)] == [2, 1, 1]
    theta, state = rule(parameters, gradient, None, 0)
    for task in range(TASKS):
        gamma = rule.network(torch.stack([value[task].mean() for value in gradient.values()])).sigmoid()
        for index, name in enumerate(parameters):
            torch.testing.assert_close(theta[name][task], gamma[index] * parameters[name])
    left, right = rule(theta, gradient, state, 0), Momentum(0.1)(theta, gradient, None, 0)
    assert all(torch.equal(left[0][name], right[0][name]) for name in parameters)


def test_sharp_steps_from_where_it_was_with_the_gradient_of_the_worst_point_nearby() -> None:
    parameters, scale = named(model_of()), stacked(named(model_of()), 0)
    rule = Sharp(Momentum(0.1, 0.8), 0.05)
    assert [evaluations(rule, step) for step in range(3)] == [2, 2, 2]
    result = walk(rule, parameters, lambda theta: {name: scale[name] * theta[name] for name in theta}, 3)
    for task in range(TASKS):
        theta = torch.cat([value.flatten() for value in parameters.values()])
        s, buffer = torch.cat([value[task].flatten() for value in scale.values()]), torch.zeros(())
        for _ in range(3):
            g = s * theta
            buffer = 0.8 * buffer + s * (theta + 0.05 * g / g.norm())
            theta = theta - 0.1 * buffer
        torch.testing.assert_close(torch.cat([value[task].flatten() for value in result.values()]), theta)


def test_wrappers_pass_on_how_many_gradients_a_step_takes() -> None:
    parameters = named(model_of())
    inner = Forget(SGD(0.1), parameters)
    for rule in (WeightDecay(inner, 0.1), Clipped(inner, norm=1.0), Proximal(inner, 0.1)):
        assert [evaluations(rule, step) for step in range(2)] == [2, 1]
    assert [evaluations(Sharp(inner, 0.1), step) for step in range(2)] == [4, 2]
    assert [evaluations(Forget(Sharp(SGD(0.1), 0.1), parameters), step) for step in range(2)] == [3, 2]
    assert evaluations(SGD(0.1), 0) == 1


def test_a_rule_of_the_users_own_in_ten_lines() -> None:
    class Lookahead(nn.Module):
        """The gradient plus a learned share of the last one."""

        def __init__(self) -> None:
            super().__init__()
            self.share = nn.Parameter(torch.tensor(0.5, dtype=torch.float64))

        def forward(self, theta: Tensors, gradient: Tensors, state: Any, step: int) -> tuple[Tensors, Any]:
            last = gradient if state is None else state
            return {n: t - 0.1 * (gradient[n] + self.share * last[n]) for n, t in theta.items()}, gradient

    model, tasks = model_of(), tasks_of()
    rule = Clipped(Lookahead(), norm=1.0)
    learner = Learner(model, functional.mse_loss, rule, steps=3)
    truth = naive_losses(model, rule, tasks, 3)
    wanted = list(learner.parameters())
    assert any(value is rule.get_parameter("rule.share") for value in wanted)
    assert relative_error(meta_gradient(learner(tasks), wanted), meta_gradient(truth, wanted)) < 1e-9


ONE = {"model.w": torch.ones(1)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Momentum(0), "learning rate must be above 0 and finite, but 0 came"),
        (lambda: Momentum(0.1, 1.0), "momentum must be at least 0 and below 1, but 1.0 came"),
        (lambda: Momentum(0.1, 0, nesterov=True), "look ahead needs a momentum above 0"),
        (lambda: Adam(float("nan")), "learning rate must be above 0"),
        (lambda: Adam(0.1, (0.9, 1.0)), "each beta must be at least 0 and below 1"),
        (lambda: Adam(0.1, (0.9,)), "betas must be two numbers"),  # type: ignore[arg-type]
        (lambda: Adam(0.1, eps=0), "eps must be above 0"),
        (lambda: AdamW(0.1, weight_decay=-1), "weight decay other than 0 must be above 0 and finite, but -1 came"),
        (lambda: RMSprop(0.1, 1.5), "decay must be at least 0 and below 1"),
        (lambda: RMSprop(0.1, eps=-1), "eps must be above 0"),
        (lambda: WeightDecay(SGD(0.1), 0), "strength of weight decay must be above 0"),
        (lambda: WeightDecay(0.1, 0.1), "rule inside must be callable"),  # type: ignore[arg-type]
        (lambda: Clipped(SGD(0.1)), "either norm or value, but norm=None and value=None came"),
        (lambda: Clipped(SGD(0.1), norm=1, value=1), "either norm or value"),
        (lambda: Clipped(SGD(0.1), norm=-1), "norm to clip to must be above 0"),
        (lambda: Clipped(SGD(0.1), value=0), "value to clip to must be above 0"),
        (lambda: Proximal(SGD(0.1), -1), "strength of the pull must be above 0"),
        (lambda: Sharp(SGD(0.1), 0), "radius must be above 0"),
        (lambda: LearnedRates(ONE, -0.1), "learning rate must be above 0"),
        (lambda: LearnedRates(ONE, 0.1, per="layer"), "per must be one of"),  # type: ignore[arg-type]
        (lambda: LearnedRates(ONE, 0.1, steps=0), "steps must be None or an integer of at least 1, but 0 came"),
        (lambda: LearnedRates(ONE, 0.1, bounds=(0.2, 0.3)), "with the rate 0.1 between them"),
        (lambda: LearnedRates({}, 0.1), "at least one parameter"),
        (lambda: LearnedRates([torch.ones(1)], 0.1), "parameters that adapt, by name"),  # type: ignore[arg-type]
        (lambda: MetaCurvature(ONE, 0), "learning rate must be above 0"),
        (lambda: ALFA(ONE, 0), "learning rate must be above 0"),
        (lambda: ALFA(ONE, 0.1, steps=-1), "steps must be None or an integer"),
        (lambda: Forget(SGD(0.1), {}), "at least one parameter"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_said(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize("make", [lambda p: LearnedRates(p, 0.1), lambda p: MetaCurvature(p, 0.1),
                                  lambda p: ALFA(p, 0.1), lambda p: Forget(SGD(0.1), p)])  # fmt: skip
def test_a_name_that_a_rule_was_not_built_for(make: Make) -> None:
    model = model_of()
    learner = Learner(model, functional.mse_loss, make(dict(model.named_parameters())), steps=1)
    with pytest.raises(InputError, match=r"built for the parameters 0.weight, .* but 'model.0.weight' came"):
        learner(tasks_of())


@pytest.mark.parametrize("make", [lambda p: ALFA(p, 0.1), lambda p: Forget(SGD(0.1), p)])
def test_a_rule_that_sees_all_parameters_needs_them_all(make: Make) -> None:
    model = model_of()
    learner = Learner(model, functional.mse_loss, make(named(model)), steps=1, adapt="2.*")
    with pytest.raises(InputError, match=r"but 'model.0.weight' is missing; build it from those that adapt"):
        learner(tasks_of())
