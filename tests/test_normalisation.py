"""Normalisation policies against loops of plain autograd with explicit statistics."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

import fewstep
from fewstep import Engine, InputError, Learner, Task, models
from fewstep.cli import main
from fewstep.data import Episodes
from fewstep.diagnose import where_not_finite
from fewstep.models.layers import OffsetNorm
from fewstep.normalisation import MEANINGS, Policy
from tests.reference import meta_gradient, relative_error

TOLERANCE = 1e-9
LR, STEPS = 0.1, 2
ENGINES = {
    "batched": Engine(),
    "chunked": Engine(chunk=2),
    "looped": Engine(method="loop"),
    "forward": Engine(product="forward"),
}
Norm = Callable[[int, Tensor], tuple[Tensor, Tensor]]


class Residual(nn.Module):
    """A block of a small ResNet, as torchvision writes it."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(functional.softplus(self.bn1(self.conv1(x)))))
        return functional.softplus(out + self.shortcut(x))


class ResNet(nn.Module):
    """BatchNorm2d with running statistics, residual blocks, in train mode."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 3, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(3)
        self.blocks = nn.Sequential(Residual(3, 4, 2), Residual(4, 4, 1))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.blocks(functional.softplus(self.bn(self.stem(x)))).mean((-2, -1)))
        return out


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = ResNet() if name == "resnet" else models.conv4(3, filters=3, size=16)
    model = model.double()
    for value in model.parameters():
        value.data += 0.1 * torch.randn_like(value)
    return model


def draw(count: int = 3, seed: int = 1, x: tuple[int, ...] = (1, 16, 16)) -> Task:
    torch.manual_seed(seed)

    def batch(examples: int) -> tuple[Tensor, Tensor]:
        inputs = torch.randn(count, examples, *x, dtype=torch.float64) + torch.randn(count, 1, *[1] * len(x))
        return inputs, torch.arange(examples).remainder(3).expand(count, -1).clone()

    return Task(support=batch(6), query=batch(9))


class Drawn(Episodes):
    """Tasks like those of `draw`."""

    def draw(self, generator: torch.Generator) -> Task:
        return draw(self.tasks, int(torch.randint(1000, (), generator=generator)))


NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, OffsetNorm)
MODELS = ["conv4", "resnet"]


@contextmanager
def explicit(model: nn.Module, norm: Norm) -> Iterator[None]:
    """Inside, norm layers normalise by the (mean, variance) that `norm(number of the call, x)` says, by forward hooks.

    Nothing of fewstep is used: a hook recomputes the layer's output from its input.
    """
    calls = itertools.count()

    def hook(module: Any, args: tuple[Tensor], output: Tensor) -> Tensor:
        (x,) = args
        shape = (1, -1, *[1] * (x.dim() - 2))
        mean, variance = (part.reshape(shape) for part in norm(next(calls), x))
        normal = (x - mean) / (variance + module.eps).sqrt()
        if isinstance(module, OffsetNorm):
            result: Tensor = normal + module.offset.reshape(shape)
        else:
            result = normal * module.weight.reshape(shape) + module.bias.reshape(shape)
        return result

    hooks = [module.register_forward_hook(hook) for module in model.modules() if isinstance(module, NORMS)]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, written out."""
    flat = x.transpose(0, 1).flatten(1)
    mean = flat.mean(1)
    return mean, ((flat - mean[:, None]) ** 2).mean(1)


class Naive:
    """MAML on one task after another, by plain autograd. `known` [steps][call] = (mean, variance) are given ones."""

    def __init__(self, model: nn.Module, policy: str, known: Any = None) -> None:
        # A twin whose layers write to running statistics of their own; parameters are the model's.
        self.model, self.policy, self.known = (
            copy.deepcopy(model, {id(p): p for p in model.parameters()}),
            policy,
            known,
        )

    def logits(self, theta: dict[str, Tensor], x: Tensor, step: int, support: Tensor | None = None) -> Tensor:
        """`support` : the inputs of the support set, where the query set is asked."""
        if self.policy == "support" and support is not None:
            seen: list[tuple[Tensor, Tensor]] = []

            def remember(call: int, x: Tensor) -> tuple[Tensor, Tensor]:
                seen.append(moments(x))
                return seen[-1]

            with explicit(self.model, remember):
                functional_call(self.model, theta, (support,))
            norm: Norm = lambda call, x: seen[call]  # noqa: E731
        elif self.known is not None:
            norm = lambda call, x: self.known[step][call]  # noqa: E731
        else:
            norm = lambda call, x: moments(x)  # noqa: E731
        with explicit(self.model, norm):
            result: Tensor = functional_call(self.model, theta, (x,))
        return result

    def thetas(self, support: tuple[Tensor, Tensor]) -> list[dict[str, Tensor]]:
        x, y = support
        theta: dict[str, Tensor] = dict(self.model.named_parameters())
        path = [theta]
        for step in range(STEPS):
            loss = functional.cross_entropy(self.logits(theta, x, step), y)
            grads = torch.autograd.grad(loss, list(theta.values()), create_graph=True, allow_unused=True)
            theta = {n: v if g is None else v - LR * g for (n, v), g in zip(theta.items(), grads, strict=True)}
            path.append(theta)
        return path

    def run(self, tasks: Task) -> tuple[Tensor, Tensor]:
        """Query losses [B] and predictions [steps + 1, B, ...]."""
        losses, predictions = [], []
        for x, y, query, target in zip(*tasks.support, *tasks.query, strict=True):
            path = [self.logits(theta, query, step, x) for step, theta in enumerate(self.thetas((x, y)))]
            losses.append(functional.cross_entropy(path[-1], target))
            predictions.append(torch.stack(path))
        return torch.stack(losses), torch.stack(predictions, 1)


def naive_statistics(model: nn.Module, episodes: Episodes, batches: int) -> list[list[tuple[Tensor, Tensor]]]:
    """Mean and variance [points][call] of the population of all tasks, the whole population at once."""
    points: list[dict[int, list[Tensor]]] = [{} for _ in range(STEPS + 1)]
    naive = Naive(model, "batch")
    for index in range(batches):
        for x, y, query, _ in zip(*episodes[index].support, *episodes[index].query, strict=True):
            for found, theta in zip(points, naive.thetas((x, y)), strict=True):
                for inputs in (x, query):

                    def remember(call: int, x: Tensor, found: Any = found) -> tuple[Tensor, Tensor]:
                        # Sets count alike, so each channel's values are weighted by 1 / their number.
                        found.setdefault(call, []).append(x.detach().transpose(0, 1).flatten(1))
                        return moments(x)

                    with explicit(naive.model, remember), torch.no_grad():
                        functional_call(naive.model, theta, (inputs,))

    def population(sets: list[Tensor]) -> tuple[Tensor, Tensor]:
        mean = sum(values.mean(1) for values in sets) / len(sets)
        return mean, sum(((values - mean[:, None]) ** 2).mean(1) for values in sets) / len(sets)  # type: ignore

    each = [[population(found[call]) for call in sorted(found)] for found in points]
    return [*each, [population([v for found in points for v in found[call]]) for call in sorted(points[0])]]


def learner_of(model: nn.Module, policy: Policy | None, **options: Any) -> Learner:
    return fewstep.maml(model, functional.cross_entropy, lr=LR, steps=STEPS, normalisation=policy, **options)


def predictions(learner: Learner, tasks: Task) -> Tensor:
    points = learner.path(tasks)
    return torch.stack([point.prediction for point in points if point.prediction is not None])


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
@pytest.mark.parametrize("policy", ["batch", "support"])
@pytest.mark.parametrize("name", MODELS)
def test_losses_gradients_and_predictions(name: str, policy: Policy, engine: Engine) -> None:
    model, tasks = build(name), draw()
    before = copy.deepcopy(dict(model.named_buffers()))
    learner = learner_of(model, policy, engine=engine)
    losses, expected = Naive(model, policy).run(tasks)
    own = list(model.parameters())
    mine = learner(tasks)
    assert relative_error(mine, losses) < TOLERANCE
    assert relative_error(meta_gradient(mine, own), meta_gradient(losses, own)) < TOLERANCE
    assert relative_error(predictions(learner, tasks), expected) < TOLERANCE
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.named_buffers())


@pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
@pytest.mark.parametrize("name", MODELS)
def test_measured_statistics(name: str, engine: Engine) -> None:
    model, tasks, episodes = build(name), draw(), Drawn(tasks=2, seed=5)
    before = copy.deepcopy(dict(model.named_buffers()))
    learner = learner_of(model, "support", engine=engine)
    fewstep.calibrate(learner, episodes, batches=2)
    assert learner.normalisation == "support"
    known = naive_statistics(model, episodes, 2)
    for call, pair in enumerate(known[-1]):
        for kind, value in zip(("mean", "var"), pair, strict=True):
            measured = learner.statistics.get_buffer(f"{kind}_{call}")
            assert measured.dtype == torch.float64
            assert relative_error(measured[0], value) < TOLERANCE
            each = torch.stack([point[call][kind == "var"] for point in known[:-1]])
            assert relative_error(measured[1:], each) < TOLERANCE
    own = list(model.parameters())
    for policy, points in (("per_step", known[:-1]), ("running", [known[-1]] * (STEPS + 1))):
        learner.normalisation = policy  # type: ignore[assignment]
        losses, expected = Naive(model, policy, points).run(tasks)
        mine = learner(tasks)
        assert relative_error(mine, losses) < TOLERANCE
        assert relative_error(meta_gradient(mine, own), meta_gradient(losses, own)) < TOLERANCE
        assert relative_error(predictions(learner, tasks), expected) < TOLERANCE
    assert all(torch.equal(value, before[key]) for key, value in model.named_buffers())


@pytest.mark.parametrize("name", MODELS)
def test_adapt_is_the_last_point_of_the_path(name: str) -> None:
    tasks = draw()
    learner = learner_of(build(name), "batch")
    fewstep.calibrate(learner, Drawn(tasks=2), batches=1)
    results = []
    for policy in ("batch", "support", "running", "per_step"):
        learner.normalisation = policy
        last = predictions(learner, tasks)[-1]
        for task in range(tasks.size):
            adapted = learner.adapt(tuple(part[task] for part in tasks.support))
            found = adapted(tasks.query[0][task])
            assert relative_error(found, last[task]) < TOLERANCE
            assert relative_error(copy.deepcopy(adapted).train()(tasks.query[0][task]), last[task]) < TOLERANCE
        results.append(last)
    assert all(relative_error(a, b) > 1e-6 for a, b in itertools.combinations(results, 2))


@pytest.mark.parametrize("policy", ["batch", "support", "running", "per_step"])
def test_a_prediction_depends_on_other_queries_under_batch_only(policy: Policy) -> None:
    tasks = draw()
    learner = learner_of(build("resnet"), policy)
    fewstep.calibrate(learner, Drawn(tasks=2), batches=1)
    x, y = tasks.query
    other = x.clone()
    other[:, 1:] += 3
    first, second = (predictions(learner, Task(tasks.support, (part, y)))[:, :, 0] for part in (x, other))
    assert (relative_error(first, second) > 1e-3) == (policy == "batch")
    if policy != "batch":
        assert relative_error(first, second) < TOLERANCE
        single = predictions(learner, Task(tasks.support, (x[:, :1], y[:, :1])))[:, :, 0]
        assert relative_error(single, first) < TOLERANCE


def test_compiled() -> None:
    def small() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 3)).double()

    class Small(Episodes):
        def draw(self, generator: torch.Generator) -> Task:
            return draw(self.tasks, x=(2,))

    tasks = draw(x=(2,))
    plain, fast = (learner_of(small(), "batch", engine=engine) for engine in (Engine(), Engine(compile="pieces")))
    for learner in (plain, fast):
        fewstep.calibrate(learner, Small(tasks=2), batches=1)
    for policy in ("support", "per_step", "support"):
        gradients = []
        for learner in (plain, fast):
            learner.normalisation = policy
            gradients.append(meta_gradient(learner(tasks), list(learner.parameters())))
        assert relative_error(gradients[1], gradients[0]) < TOLERANCE
    assert fast.engine.compile == "pieces"
    fast.normalisation = plain.normalisation = "running"
    before = fast(tasks).detach()
    for learner in (plain, fast):  # what is compiled goes by the new statistics
        learner.statistics.get_buffer("mean_0").add_(1)
    assert relative_error(fast(tasks), plain(tasks)) < TOLERANCE
    assert relative_error(fast(tasks), before) > 1e-3


def test_policies_change_on_a_trained_learner() -> None:
    model, tasks = build("resnet"), draw()
    learner = learner_of(model, "batch")
    optimizer = torch.optim.Adam(learner.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        learner(tasks).mean().backward()
        optimizer.step()
    fewstep.calibrate(learner, Drawn(tasks=2), batches=1)
    for policy in ("support", "per_step", "batch"):
        learner.normalisation = policy
        for mode in (False, True):  # modes of batch norm make no difference under a policy
            model.train(mode)
            known = naive_statistics(model, Drawn(tasks=2), 1)[:-1] if policy == "per_step" else None
            assert relative_error(learner(tasks), Naive(model, policy, known).run(tasks)[0]) < TOLERANCE
    learner.normalisation = None
    with pytest.raises(InputError, match="keeps running statistics"):
        learner(tasks)
    learner.eval()
    own: Any = [[(m.running_mean, m.running_var) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]] * 3
    assert relative_error(learner(tasks), Naive(model, "running", in_call_order(own, model)).run(tasks)[0]) < TOLERANCE


def in_call_order(known: Any, model: nn.Module) -> Any:
    """Statistics listed by module are in the order of the calls: in `Residual` they are the same."""
    assert [name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)][1:4] == [
        "blocks.0.bn1",
        "blocks.0.bn2",
        "blocks.0.shortcut.1",
    ]
    return known


def test_running_statistics_that_the_model_brings_along() -> None:
    model, tasks = build("resnet"), draw()
    for index in range(3):
        model(draw(seed=index).support[0].flatten(0, 1))
    before = copy.deepcopy(dict(model.named_buffers()))
    layers = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    learner = learner_of(model, "running")
    known = [[(layer.running_mean, layer.running_var) for layer in layers]] * (STEPS + 1)
    assert (
        relative_error(learner(tasks), Naive(model, "running", in_call_order(known, model)).run(tasks)[0]) < TOLERANCE
    )
    adapted = learner.adapt(tuple(part[0] for part in tasks.support))
    assert relative_error(adapted(tasks.query[0][0]), predictions(learner, tasks)[-1, 0]) < TOLERANCE
    learner.train()(tasks)
    assert all(torch.equal(value, before[key]) for key, value in model.named_buffers())
    fewstep.calibrate(learner, Drawn(tasks=2), batches=1)
    assert relative_error(learner(tasks), Naive(model, "running", known).run(tasks)[0]) > 1e-6


def test_copies_types_and_state() -> None:
    tasks = draw()
    learner = learner_of(build("conv4"), "per_step")
    keys = list(learner.state_dict())
    fewstep.calibrate(learner, Drawn(tasks=2), batches=1)
    assert list(learner.state_dict()) == keys
    twin = copy.deepcopy(learner)
    assert torch.equal(twin(tasks), learner(tasks))
    twin.statistics.get_buffer("mean_0").add_(1)
    assert not torch.equal(twin(tasks), learner(tasks))
    twin.load_state_dict(learner.state_dict())
    assert not torch.equal(twin(tasks), learner(tasks))
    narrow = copy.deepcopy(learner).float()
    assert narrow.statistics.mean_0.dtype == torch.float32
    half = Task(*((x.float(), y) for x, y in tasks))
    assert relative_error(narrow(half).double(), learner(tasks)) < 1e-4
    fewstep.calibrate(narrow, [half], batches=1)  # type: ignore[arg-type]
    assert narrow.statistics.mean_0.dtype == torch.float32
    plan = fewstep.plan(learner, tasks, seconds=1.0, compile="no")
    assert all("disagrees" not in entry.dropped for entry in plan.tried)


def test_step_beyond_those_measured_take_the_last() -> None:
    tasks = draw()
    learner = learner_of(build("conv4"), "per_step")
    fewstep.calibrate(learner, Drawn(tasks=2), batches=1, steps=1)
    assert len(learner.statistics.of(0)[0]) == 3
    every = predictions(learner, tasks)
    for name, value in [*learner.statistics.named_buffers()]:
        setattr(learner.statistics, name, torch.cat([value, value[-1:]]))
    assert torch.equal(predictions(learner, tasks), every)


def test_rows_of_a_sequence_go_with_their_examples() -> None:
    class Rows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.head = nn.BatchNorm1d(2), nn.Linear(2, 3)

        def forward(self, x: Tensor) -> Tensor:  # [examples, length, 2]
            rows = self.norm(x.flatten(0, 1))
            result: Tensor = self.head(rows.unflatten(0, x.shape[:2]).mean(1))
            return result

    torch.manual_seed(0)
    model, tasks = Rows().double(), draw(x=(5, 2))
    learner = learner_of(model, "support")
    assert relative_error(learner(tasks), Naive(model, "support").run(tasks)[0]) < TOLERANCE


def test_running_statistics_stay_where_a_task_cannot_be_computed() -> None:
    model = build("resnet")
    before = copy.deepcopy(dict(model.named_buffers()))
    tasks = draw()
    wrong = Task(tasks.support, (tasks.query[0], tasks.query[1] + 7))
    with pytest.raises(InputError, match="labels run from 7 to 9"):
        learner_of(model, "batch")(wrong)
    assert all(torch.equal(value, before[key]) for key, value in model.named_buffers())
    assert all(module.training for module in model.modules())


def test_errors() -> None:
    tasks = draw()
    with pytest.raises(InputError, match=r"normalisation must be None or one of.*'query' came"):
        learner_of(build("conv4"), "query")  # type: ignore[arg-type]
    learner = learner_of(build("conv4"), "running")
    with pytest.raises(InputError, match="'query' came"):
        learner.normalisation = "query"  # type: ignore[assignment]
    for policy in ("running", "per_step"):
        learner.normalisation = policy
        with pytest.raises(InputError, match=f"'{policy}' has no statistics to go by.*fewstep.calibrate"):
            learner(tasks)
    with pytest.raises(InputError, match="'per_step' has no statistics"):
        learner_of(build("resnet"), "per_step")(tasks)

    def on_dicts(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return functional.cross_entropy(model(batch["x"]), batch["y"])

    named = Task(*({"x": x, "y": y} for x, y in tasks))
    other = fewstep.maml(build("conv4"), on_dicts, lr=LR, normalisation="support")
    with pytest.raises(InputError, match=r"support statistics needs \(x, y\) batches.*'running' or 'per_step'"):
        other(named)
    mixed = fewstep.maml(build("conv4"), functional.cross_entropy, inner_loss=on_dicts, lr=LR, normalisation="support")
    with pytest.raises(InputError, match="support statistics needs"):
        mixed(Task(named.support, tasks.query))
    fewstep.calibrate(other, [named], batches=1)  # type: ignore[arg-type]
    other.normalisation = "per_step"
    assert other(named).isfinite().all()
    plain = fewstep.maml(models.mlp(2, 3).double(), functional.cross_entropy, lr=LR)
    with pytest.raises(InputError, match="no batch normalisation"):
        fewstep.calibrate(plain, [draw(x=(2,))], batches=1)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="at least 1 batch"):
        fewstep.calibrate(other, [named], batches=0)  # type: ignore[arg-type]
    instance = nn.Sequential(nn.Conv2d(1, 2, 3), nn.InstanceNorm2d(2, track_running_stats=True))
    with pytest.raises(InputError, match=r"with fewstep.use_batch_statistics") as raised:
        learner_of(instance, "batch")
    assert "normalisation='batch'" not in str(raised.value)


@pytest.mark.parametrize("policy", get_args(Policy))
def test_a_divergence_is_found_under_each_policy(policy: Policy) -> None:
    learner = learner_of(build("conv4"), policy)
    fewstep.calibrate(learner, Drawn(tasks=2), batches=1)
    learner.update = fewstep.maml(build("conv4"), functional.cross_entropy, lr=1e200).update
    assert "after inner step 1 the output of layer 'blocks.1" in where_not_finite(learner, draw())


def test_calibration_that_fails_leaves_the_policy() -> None:
    learner = learner_of(build("conv4"), "support").train()
    with pytest.raises(InputError):
        fewstep.calibrate(learner, [Task(*((x[:, :, [0, 0]], y) for x, y in draw()))], batches=1)  # type: ignore
    assert learner.normalisation == "support"
    assert learner.training


def test_streams_go_by_the_batch_seen_last() -> None:
    model, tasks = build("conv4"), draw()
    stream = Task(tuple(torch.stack([part[:, :3], part[:, 3:]], 1) for part in tasks.support), tasks.query)
    losses = []
    for x, y, query, target in zip(*stream.support, *stream.query, strict=True):
        naive = Naive(model, "support")
        theta: dict[str, Tensor] = dict(model.named_parameters())
        for step in range(STEPS):
            loss = functional.cross_entropy(naive.logits(theta, x[step], step), y[step])
            grads = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
            theta = {n: v - LR * g for (n, v), g in zip(theta.items(), grads, strict=True)}
        losses.append(functional.cross_entropy(naive.logits(theta, query, STEPS, x[-1]), target))
    truth, own = torch.stack(losses), list(model.parameters())
    learner = learner_of(model, "support", stream=True)
    mine = learner(stream)
    assert relative_error(mine, truth) < TOLERANCE
    assert relative_error(meta_gradient(mine, own), meta_gradient(truth, own)) < TOLERANCE
    problem, tensors = learner.unrolled(stream)
    whole = problem.gradient(tensors, tuple(range(len(own))))[0]
    assert relative_error(whole, truth) < TOLERANCE
    with pytest.raises(InputError, match="support labels run from 7"):
        learner(Task((stream.support[0], stream.support[1] + 7), stream.query))


def test_other_derivatives() -> None:
    model, tasks = build("resnet"), draw()
    loss = partial(functional.cross_entropy, label_smoothing=0.1)
    for make in (fewstep.fomaml, fewstep.hf_maml):
        learner = make(model, loss, lr=LR, steps=STEPS, normalisation="support")
        exact = fewstep.maml(model, loss, lr=LR, steps=STEPS, normalisation="support")
        assert relative_error(learner(tasks), exact(tasks)) < TOLERANCE
        own = list(model.parameters())
        error = relative_error(meta_gradient(learner(tasks), own), meta_gradient(exact(tasks), own))
        assert error < (1e-5 if make is fewstep.hf_maml else 1)


def test_evaluation_of_a_run_under_each_policy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quick = """--no-plan --iterations 2 --check-every 2 --meta-batch 2 --validation-episodes 4 --test-episodes 4
        --test-steps 2 --pretrain-iterations 2"""
    main(["train", "glyphs-5way-1shot", *quick.split(), "--network", "mlp", "--out", str(tmp_path)])
    found = {}
    for policy in get_args(Policy):
        options = [] if policy == "batch" else ["--normalisation", policy]
        main(["evaluate", str(tmp_path), *options])
        found[policy] = json.loads((tmp_path / "evaluation.json").read_text())
        entries = [found[policy], *found[policy]["other_protocols"]]
        judged = [*entries, *(entry for one in entries for entry in one["baselines"].values())]
        assert len(judged) == 6
        assert {entry["protocol"]["normalisation"] for entry in judged} == {MEANINGS[policy]}
    assert MEANINGS["batch"] == "batch statistics (transductive)"
    assert len({str(entry["other_protocols"][0]["by_step"]) for entry in found.values()}) == 4
    main(["train", "sinusoid", *quick.split(), "--no-ablations", "--out", str(tmp_path / "sinusoid")])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["evaluate", str(tmp_path / "sinusoid"), "--normalisation", "support"])
    assert "no batch normalisation; leave out --normalisation support" in capsys.readouterr().err
