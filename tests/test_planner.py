"""The planner: what it chooses, by which measurements, and that it leaves everything else as it was."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import platform
import random
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fewstep
from fewstep import Engine, FallbackWarning, InputError, Learner, Plan, Task, maml, models, plan
from fewstep import trial as trials
from fewstep.agreement import relative_error
from fewstep.cli import main
from fewstep.commands import train_run
from fewstep.data import SinusoidEpisodes
from fewstep.footprint import footprint, free_memory
from fewstep.judge import evaluate_run
from fewstep.meta_step import MetaStep
from fewstep.protocol import Protocol
from fewstep.recipes import RECIPES
from fewstep.run import Run
from fewstep.search import chunk_sizes
from tests.cases import CASES
from tests.test_cli import QUICK, fails
from tests.test_train import same

SINUSOIDS = SinusoidEpisodes(tasks=8)[0]
LOOP = Engine(method="loop")
CPU = torch.device("cpu")


def sinusoid_learner(**options: Any) -> Learner:
    torch.manual_seed(0)
    return maml(models.mlp(1, 1, (8, 8), init="xavier"), functional.huber_loss, lr=0.01, **options)


def conv_learner() -> tuple[Learner, Task]:
    case = next(case for case in CASES if case.name == "conv4 strided")
    return maml(case.build(), case.loss, lr=case.lr, adapt=case.adapt), case.tasks(4)


@dataclass
class Machine:
    """A machine on which a meta-step takes as long, and as much memory, as a test says; compiling changes nothing."""

    seconds: Callable[[Engine], float] = lambda engine: 1.0
    compiling: float = 30.0
    bytes: Callable[[Engine], int] = lambda engine: 0
    now: float = 0.0
    ran: list[Engine] = field(default_factory=list)

    def install(self, patch: pytest.MonkeyPatch) -> Machine:
        machine = self

        class Step(MetaStep):
            def __call__(self, tasks: Task, lr: float) -> Tensor:
                engine = self.learner.engine
                first = engine not in machine.ran
                machine.ran += [engine] if first else []
                machine.now += machine.seconds(engine) + (machine.compiling if first and engine.compile != "no" else 0)
                return super().__call__(tasks, lr)

        def weighed(work: Callable[[], object], device: torch.device) -> int:
            work()
            return self.bytes(self.last)

        original = trials.Bench.weigh

        def weigh(bench: trials.Bench, trial: trials.Trial) -> None:
            self.last = trial.engine
            original(bench, trial)

        patch.setattr(trials, "MetaStep", Step)
        patch.setattr(trials, "clock", lambda: self.now)
        patch.setattr(trials, "footprint", weighed)
        patch.setattr(trials.Bench, "weigh", weigh)
        patch.setattr("fewstep.engine.compiled", lambda function, tensors: function)
        return self


# What is chosen.


def test_the_choice_is_fast_and_has_the_loops_gradient() -> None:
    learner = sinusoid_learner(steps=2)
    chosen = plan(learner, SINUSOIDS, seconds=20, compile="no")
    assert chosen.engine.method == "vmap"
    assert chosen.engine.compile == "no"
    own = list(learner.parameters())
    gradients = []
    for learner.engine in (LOOP, chosen.engine):
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(learner(SINUSOIDS).sum(), own)]))
    assert relative_error(gradients[1], gradients[0]) < 1e-5
    assert [entry.seconds for entry in chosen.tried if entry.seconds] == sorted(
        entry.seconds for entry in chosen.tried if entry.seconds
    )
    assert "as fast as the plain loop" in str(chosen)


@pytest.mark.parametrize("works", [True, False])
def test_on_a_gpu_steps_are_recorded_where_they_can_be(works: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu(trials.Bench):
        """Tells that it is on a GPU; the CPU does the work."""

        device: Any = property(lambda self: torch.device("cuda"), lambda self, value: None)

        def run(self, engine: Engine) -> trials.Trial:
            if engine.graph and not works:
                raise RuntimeError("it asks for a value")
            return super().run(engine)

        def _wait(self) -> None:
            pass

    monkeypatch.setattr("fewstep.planner.Bench", OnGpu)
    monkeypatch.setattr(torch.cuda, "get_device_name", str)
    monkeypatch.setattr("fewstep.search.free_memory", lambda device: None)
    monkeypatch.setattr(trials, "footprint", lambda work, device: work() or 1)
    chosen = plan(sinusoid_learner(), SINUSOIDS, seconds=5, compile="no")
    assert chosen.engine.graph == works
    assert works or any("asks for a value" in entry.dropped for entry in chosen.tried)
    with pytest.raises(InputError, match="no engine with") if not works else contextlib.nullcontext():
        assert plan(sinusoid_learner(), SINUSOIDS, seconds=5, compile="no", graph=True).engine.graph


def test_nothing_but_the_plan_comes_of_it() -> None:
    learner = sinusoid_learner()
    learner.model.append(nn.Dropout(0.1))  # type: ignore[operator]
    learner = maml(learner.model, functional.mse_loss, lr=0.01)
    learner(SINUSOIDS).mean().backward()
    before = {name: value.clone() for name, value in learner.state_dict().items()}
    gradients = [value.grad.clone() for value in learner.parameters() if value.grad is not None]
    states = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    runner = learner.runner
    with warnings.catch_warnings(record=True) as said:
        plan(learner, SINUSOIDS, seconds=5, compile="no")
    assert not said
    assert same(before, learner.state_dict())
    assert all(torch.equal(a, b.grad) for a, b in zip(gradients, learner.parameters(), strict=True))  # type: ignore[arg-type]
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), str(np.random.get_state()))
    assert learner.runner is runner


def test_a_model_that_draws_is_judged_without_chance() -> None:
    """No two engines draw alike, so that their gradients differ by as much as they are long."""
    learner = sinusoid_learner()
    learner.model.append(nn.Dropout(0.9))  # type: ignore[operator]
    learner = maml(learner.model, functional.mse_loss, lr=0.01)
    chosen = plan(learner, SinusoidEpisodes(tasks=8)[0], seconds=5, compile="no")
    assert not [entry for entry in chosen.tried if "disagrees" in entry.dropped]
    assert learner.model.training


def test_the_fastest_is_found_also_where_it_lies_between(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {1: 5.0, 2: 3.0, 4: 1.0, 8: 4.0}
    machine = Machine(lambda engine: 6.0 if engine.method == "loop" else times[engine.chunk or 16]).install(monkeypatch)
    times[16] = 5.0
    chosen = plan(sinusoid_learner(), SinusoidEpisodes(tasks=16)[0], seconds=500, compile="no")
    assert chosen.engine.chunk == 4
    assert chosen.engine.product in ("reverse", "forward")
    assert Engine(chunk=1) not in machine.ran


def test_compiled_engines_are_tried_and_taken_where_they_are_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(lambda engine: {"no": 4.0, "pieces": 2.0, "step": 1.0}[engine.compile]).install(monkeypatch)
    chosen = plan(sinusoid_learner(), SINUSOIDS, seconds=600)
    assert chosen.engine.compile == "step"
    assert chosen.chosen.compiling == pytest.approx(30)


def test_many_inner_steps_are_not_compiled_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(lambda engine: 4.0 if engine.compile == "no" else 1.0).install(monkeypatch)
    assert plan(sinusoid_learner(steps=6), SINUSOIDS, seconds=600).engine.compile == "pieces"
    assert all(engine.compile != "step" for engine in machine.ran)


def test_results_are_kept_where_that_is_faster_and_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"no": 4.0, "pieces": 2.0, "step": 4.0}
    machine = Machine(lambda engine: 1.0 if engine.keep else times[engine.compile],
                      bytes=lambda engine: 2**20 * (3 if engine.keep else 1))  # fmt: skip
    machine.install(monkeypatch)
    assert plan(sinusoid_learner(steps=6), SINUSOIDS, seconds=1000).engine.keep
    assert not plan(sinusoid_learner(steps=6), SINUSOIDS, seconds=1000, memory=2 / 1024).engine.keep
    machine.ran.clear()
    fixed = plan(sinusoid_learner(steps=6), SINUSOIDS, seconds=1000, compile="pieces", keep=True).engine
    assert fixed.keep
    assert any(engine.compile == "no" for engine in machine.ran), "eager engines lead the way"
    learner, tasks = conv_learner()
    chosen = plan(learner, tasks, seconds=1000, memory=2 / 1024).engine
    assert chosen.compile == "pieces"
    assert not chosen.keep
    first_order = sinusoid_learner(steps=6, derivative="none")
    assert not plan(first_order, SINUSOIDS, seconds=1000).engine.keep


def test_convolutions_are_a_choice_where_there_are_any(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(lambda engine: 1.0 if engine.convolution == "matmul" else 2.0).install(monkeypatch)
    learner, tasks = conv_learner()
    assert plan(learner, tasks, seconds=100, compile="no").engine.convolution == "matmul"
    machine.ran.clear()
    plan(sinusoid_learner(), SINUSOIDS, seconds=100, compile="no")
    assert all(engine.convolution == "native" for engine in machine.ran)


@pytest.mark.parametrize(("each", "first"), [(1, None), (10, 2), (40, 1)])
def test_convolutions_are_compiled_first_for_as_many_tasks_as_stay_in_a_cache(
    each: int, first: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """each : MiB that a task takes eagerly"""
    learner, tasks = conv_learner()
    machine = Machine(bytes=lambda engine: each * 2**20 * engine.at_a_time(tasks.size)).install(monkeypatch)
    plan(learner, tasks, seconds=1000)
    compiled = [engine for engine in machine.ran if engine.compile != "no"]
    assert compiled[0].convolution == "matmul"
    assert compiled[0].chunk == first


def test_a_model_without_batching_rules_gets_the_loop() -> None:
    case = next(case for case in CASES if case.name == "gru")
    chosen = plan(maml(case.build(), case.loss, lr=0.1), case.tasks(), seconds=20, compile="no")
    assert chosen.engine == LOOP
    assert any("try engine='loop'" in entry.dropped for entry in chosen.tried)


def test_what_is_fixed_is_kept() -> None:
    chosen = plan(sinusoid_learner(), SINUSOIDS, seconds=5, compile="no", chunk=3, product="reverse")
    assert chosen.engine == Engine(chunk=3)
    learner = sinusoid_learner(engine=Engine(precision="bfloat16"))
    assert plan(learner, SINUSOIDS, seconds=5, compile="no").engine.precision == "bfloat16"


def test_a_compiled_plan() -> None:
    """Compiles once, in earnest."""
    chosen = plan(sinusoid_learner(), SINUSOIDS, seconds=1, compile="step", chunk=8)
    assert chosen.engine == Engine(compile="step", chunk=8)
    assert chosen.chosen.error is not None
    assert chosen.chosen.error < 1e-5


# What is not chosen.


def wrong_by_a_percent(x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return 1.01 * torch.conv2d(x, weight, *args, **kwargs)


def test_an_engine_that_disagrees_is_announced_and_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    Machine(lambda engine: 1.0 if engine.convolution == "matmul" else 2.0).install(monkeypatch)
    monkeypatch.setattr("fewstep.engine.conv2d_by_matmul", wrong_by_a_percent)
    learner, tasks = conv_learner()
    with pytest.warns(FallbackWarning, match="convolution matmul disagrees with the plain loop"):
        chosen = plan(learner, tasks, seconds=100, compile="no")
    assert chosen.engine.convolution != "matmul"
    with (
        pytest.warns(FallbackWarning, match="disagrees"),
        pytest.raises(InputError, match="no engine with convolution='matmul', compile='no' can be used"),
    ):
        plan(learner, tasks, seconds=100, convolution="matmul", compile="no")


def test_what_is_wrong_in_float32_alone_is_found_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong_in_float32(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return (1.01 if x.dtype == torch.float32 else 1) * torch.conv2d(x, *args, **kwargs)

    Machine(lambda engine: 1.0 if engine.convolution == "matmul" else 2.0).install(monkeypatch)
    monkeypatch.setattr("fewstep.engine.conv2d_by_matmul", wrong_in_float32)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    x, y = torch.rand(2, 6, 1, 8, 8), torch.arange(6).remainder(3).expand(2, 6)
    with pytest.warns(FallbackWarning, match="disagrees"):
        chosen = plan(maml(model, functional.cross_entropy, lr=0.1), Task((x, y), (x, y)), seconds=1000, compile="no")
    assert chosen.engine.convolution != "matmul"


def test_the_kinks_of_relu_are_no_disagreement(monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 an activation near 0 can move a gradient by a percent; in float64 it agrees."""
    Machine(lambda engine: 1.0 if engine.convolution == "matmul" else 2.0).install(monkeypatch)
    torch.manual_seed(0)
    learner = maml(models.conv4(5), functional.cross_entropy, lr=0.4, adapt="~*.offset")
    x, y = torch.rand(2, 5, 1, 28, 28), torch.arange(5).expand(2, 5)
    with warnings.catch_warnings(record=True) as said:
        chosen = plan(learner, Task((x, y), (x.flip(0), y)), seconds=1000, compile="no")
    assert not said
    assert chosen.engine.convolution == "matmul"


def test_memory_stays_within_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    def at_once(engine: Engine) -> int:
        return 1 if engine.method == "loop" else engine.chunk or 16

    machine = Machine(lambda engine: 16 / at_once(engine), bytes=lambda engine: at_once(engine) * 2**20)
    machine.install(monkeypatch)
    tasks = SinusoidEpisodes(tasks=16)[0]
    assert plan(sinusoid_learner(), tasks, seconds=1000, compile="no").engine.chunk is None
    machine.ran.clear()
    chosen = plan(sinusoid_learner(), tasks, seconds=1000, memory=5 / 1024, compile="no")
    assert chosen.engine.chunk == 4
    assert chosen.chosen.peak is not None
    assert chosen.chosen.peak <= 5 * 2**20
    assert max(at_once(engine) for engine in machine.ran) == 4, "more was tried than fits"
    with pytest.raises(InputError, match=r"no engine stays within 0.0005 GiB: loop takes 0.00098 GiB; raise the limit"):
        plan(sinusoid_learner(), tasks, seconds=1000, memory=0.0005, compile="no")


def test_what_is_chosen_keeps_to_its_limit_when_it_is_weighed_again() -> None:
    learner, tasks = conv_learner()
    free = plan(learner, tasks, seconds=20, compile="no", method="vmap", chunk=None)
    limit = 0.6 * (free.chosen.peak or 0)
    if not limit:
        pytest.skip("memory is not counted on this machine")
    chosen = plan(learner, tasks, seconds=20, compile="no", memory=limit / 2**30)
    learner.engine = chosen.engine
    step = MetaStep(learner, torch.optim.Adam(learner.parameters()))
    step(tasks, 0.0)
    assert 0 < (footprint(lambda: step(tasks, 0.0), CPU) or 0) <= 1.1 * limit
    assert chosen.engine != free.engine


def test_a_compiler_that_fails_is_announced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(function: Any, tensors: Any) -> Any:
        raise RuntimeError("no compiler here")

    monkeypatch.setattr("fewstep.engine.compiled", fails)
    with pytest.warns(FallbackWarning) as told:
        chosen = plan(sinusoid_learner(), SINUSOIDS, seconds=100)
    assert [str(each.message) for each in told] == ["running without compilation, which failed: no compiler here"]
    assert chosen.engine.compile == "no"
    with pytest.raises(InputError, match="no compiler here"), pytest.warns(FallbackWarning):
        plan(sinusoid_learner(), SINUSOIDS, seconds=100, compile="pieces")


def test_fewer_processes_have_more_tasks_each(planned: Plan) -> None:
    entry = dataclasses.replace(planned.chosen, peak=100, engine=Engine())
    four = dataclasses.replace(planned, engine=Engine(), tried=(entry,), tasks=8)
    assert (four.peak_of(4), four.peak_of(8), four.peak_of(32)) == (100, 100, 400)
    for chunk, peak in ((2, 100), (16, 200)):
        cut = dataclasses.replace(entry, engine=Engine(chunk=chunk))
        assert dataclasses.replace(four, engine=cut.engine, tried=(cut,)).peak_of(32) == peak


def test_no_engine_is_begun_that_would_not_end_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(lambda engine: 10.0, compiling=20.0).install(monkeypatch)
    chosen = plan(sinusoid_learner(), SINUSOIDS, seconds=120)
    assert chosen.spent == machine.now
    assert machine.now <= 120
    machine = Machine(lambda engine: 0.1, compiling=70.0).install(monkeypatch)
    plan(sinusoid_learner(), SINUSOIDS, seconds=120)
    assert machine.now <= 120
    assert sum(engine.compile != "no" for engine in machine.ran) == 1, "a second one looks as if it took as long"
    machine = Machine(lambda engine: 0.1, compiling=50.0).install(monkeypatch)
    plan(sinusoid_learner(), SINUSOIDS, seconds=20)
    assert all(engine.compile == "no" for engine in machine.ran)


def test_a_loop_that_takes_all_the_time_is_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(lambda engine: 1000.0).install(monkeypatch)
    assert plan(sinusoid_learner(), SINUSOIDS, seconds=10).engine == LOOP
    assert machine.ran == [LOOP]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seconds": 0}, "seconds for planning must be above 0 and finite, but 0 came"),
        ({"memory": -1}, "memory limit must be above 0 GiB and finite, but -1 came"),
        ({"precision": "bfloat16"}, "an engine's precision cannot be fixed in a plan, only method, chunk"),
        ({"speed": "high"}, "an engine's speed cannot be fixed"),
        ({"compile": "all"}, "compile must be one of"),
        ({"seconds": "60"}, "seconds for planning must be above 0 and finite, but '60' came"),
        ({"memory": "4"}, "memory limit must be above 0 GiB and finite, but '4' came"),
        ({"method": "loop", "product": "forward"}, "needs the method 'vmap'"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        plan(sinusoid_learner(), SINUSOIDS, **options)


def test_wrong_tasks_and_learners_that_diverge() -> None:
    with pytest.raises(InputError, match=r"expected fewstep\.Task"):
        plan(sinusoid_learner(), SINUSOIDS.support)
    broken = Task((SINUSOIDS.support[0] / 0, SINUSOIDS.support[1]), SINUSOIDS.query)
    with pytest.raises(InputError, match="support set of task 0 holds NaN"):
        plan(sinusoid_learner(), broken)
    learner = maml(models.mlp(1, 1, (8, 8), init="xavier"), functional.mse_loss, lr=1e30, steps=3)
    with pytest.raises(fewstep.DivergenceError, match="before training after inner step"):
        plan(learner, SINUSOIDS)
    with pytest.raises(InputError, match="finite differences, segment and offload, and outer objectives"):
        plan(sinusoid_learner(derivative="finite_difference"), SINUSOIDS, seconds=1, compile="step")


# What it is measured by.


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of the resident set is Linux's")
def test_footprint_is_what_is_held_at_most() -> None:
    """In a process of its own: what other tests left behind, such as freed memory in caches, would count."""
    code = """
import torch
from fewstep.footprint import footprint
cpu = torch.device("cpu")
def work():
    for _ in range(3):
        torch.ones(2**24).add(1)  # two of 64 MiB, for a moment
print(footprint(work, cpu))
kept = torch.ones(2**24)
print(footprint(lambda: None, cpu))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    most, nothing = map(int, result.stdout.split())
    assert most == pytest.approx(2 * 2**26, rel=0.1)
    assert nothing < 2**20, "what was held before does not count"
    assert (free_memory(CPU) or 0) > 2**20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's")
def test_freed_memory_is_kept_for_the_next_step() -> None:
    """In a process of its own: it cannot be taken back."""
    code = """
import resource
import torch
from fewstep.footprint import keep_freed_memory
def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24).add(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(min(new_pages() for _ in range(3)))
keep_freed_memory()
print(min(new_pages() for _ in range(4)))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    without, kept = map(int, result.stdout.split())
    assert kept < 0.1 * without


@pytest.mark.parametrize(
    ("tasks", "sizes"),
    [(1, [None]), (2, [1, None]), (7, [1, 2, 4, None]), (20, [1, 2, 4, 10, 16, None]), (32, [1, 2, 4, 8, 16, None])],
)
def test_chunk_sizes(tasks: int, sizes: list[int | None]) -> None:
    assert chunk_sizes(tasks) == sizes


# The plan of a run.


@pytest.fixture
def planned() -> Plan:
    return plan(sinusoid_learner(), SINUSOIDS, seconds=2, compile="no")


def test_the_planner_stays_at_one_iteration() -> None:
    """Or what goes by the iteration would differ from engine to engine."""
    learner = fewstep.maml_pp(models.mlp(), functional.mse_loss, lr=0.01, steps=2, anneal=3)
    found = plan(learner, SINUSOIDS, seconds=2, compile="no")
    assert max(trial.error or 0.0 for trial in found.tried) < 1e-4
    assert learner.iteration is None


def test_a_plan_survives_json(planned: Plan) -> None:
    assert Plan.from_json(json.loads(json.dumps(planned.to_json()))) == planned


@pytest.mark.parametrize("content", [[], {}, {"engine": {"method": "magic"}, "tried": []}, None])
def test_what_is_no_plan_is_refused(content: Any) -> None:
    with pytest.raises(InputError, match="this is no plan of an engine"):
        Plan.from_json(content)


PLANNED = [option for option in QUICK if option != "--no-plan"] + ["--plan-seconds", "3", "--compile", "no"]


def test_a_run_keeps_its_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    main(["train", "sinusoid", *PLANNED, "--out", str(tmp_path)])
    said = capsys.readouterr().err
    assert "timing ways to compute on the first tasks, for up to 3 s" in said
    assert "as fast as the plain loop" in said
    before = (tmp_path / "engine.json").read_bytes()
    engine = Plan.from_json(json.loads(before)).engine
    used: list[Engine] = []
    monkeypatch.setattr("fewstep.commands.plan", None)
    monkeypatch.setattr("fewstep.commands.train", lambda learner, *_, **__: used.append(learner.engine))
    main(["train", "sinusoid", *PLANNED, "--iterations", "8", "--out", str(tmp_path)])
    assert used == [engine]
    assert (tmp_path / "engine.json").read_bytes() == before
    capsys.readouterr()
    elsewhere = json.loads(before) | {"machine": {"device": "NVIDIA H200"}}
    (tmp_path / "engine.json").write_text(json.dumps(elsewhere))
    with pytest.raises(TypeError):  # a new plan would be made
        main(["train", "sinusoid", *PLANNED, "--iterations", "8", "--out", str(tmp_path)])
    assert "the engine was planned on NVIDIA H200, and this is cpu" in capsys.readouterr().err
    arguments = ["train", "sinusoid", *PLANNED, "--iterations", "8", "--memory-limit", "1e-9", "--out", str(tmp_path)]
    for content, message in (
        ("", "takes more than --memory-limit 1e-09"),
        ("{}", "engine.json: this is no plan of an engine"),
    ):
        (tmp_path / "engine.json").write_text(content or before.decode())
        with pytest.raises(SystemExit):
            main(arguments)
        assert message in capsys.readouterr().err
    (tmp_path / "engine.json").unlink()
    with pytest.raises(TypeError):  # a new plan would be made
        main(["train", "sinusoid", *PLANNED, "--iterations", "8", "--out", str(tmp_path)])


def test_a_resumed_run_uses_the_same_engine_and_is_bit_identical(tmp_path: Path, planned: Plan) -> None:
    """With an engine that nobody would plan, so that another plan would show."""
    recipe = dataclasses.replace(RECIPES["sinusoid"], iterations=6, check_every=3, meta_batch=5, validation_episodes=4,
                                 test_steps=1)  # fmt: skip
    chosen = dataclasses.replace(planned.tried[0], engine=Engine(chunk=2))
    odd = dataclasses.replace(planned, engine=Engine(chunk=2), tried=(*planned.tried, chosen))
    for name, lengths in (("whole", [6]), ("parted", [2, 6])):
        run = Run(tmp_path / name)
        run.write_json("engine.json", odd.to_json())
        for iterations in lengths:
            train_run("sinusoid", dataclasses.replace(recipe, iterations=iterations), run.path)
    whole, parted = Run(tmp_path / "whole"), Run(tmp_path / "parted")
    assert same(whole.load_weights("model.safetensors"), parted.load_weights("model.safetensors"))


def test_a_run_is_judged_by_the_engine_it_was_trained_with(
    tmp_path: Path, planned: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing of a step is kept, since nothing is differentiated."""
    train_run("sinusoid", dataclasses.replace(RECIPES["sinusoid"], iterations=1, meta_batch=5, plan=False,
                                              validation_episodes=4), tmp_path)  # fmt: skip
    trained = Engine(chunk=2, compile="pieces", keep=True)
    chosen = dataclasses.replace(planned.tried[0], engine=trained)
    kept = dataclasses.replace(planned, engine=trained, tried=(*planned.tried, chosen))
    used: list[Engine] = []
    real = Protocol.judge

    def judge(protocol: Protocol, learners: list[Any], *args: Any, **options: Any) -> Any:
        used.append(learners[0].engine)
        learners[0].engine = Engine()  # does not take a compiler's time
        return real(protocol, learners, *args, **options)

    monkeypatch.setattr(Protocol, "judge", judge)
    for write, engine in ((False, Engine()), (True, dataclasses.replace(trained, keep=False))):
        if write:
            Run(tmp_path).write_json("engine.json", kept.to_json())
        used.clear()
        evaluate_run(tmp_path, baselines=False, episodes=4, first_only=True)
        assert used == [engine]


def test_two_processes_share_the_plan_of_the_first(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fewstep", "train", "sinusoid", *PLANNED, "--procs", "2", "--out", str(tmp_path)]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=300, check=True)
    assert done.stderr.count("as fast as the plain loop") == 1
    assert json.loads((tmp_path / "engine.json").read_text())["tasks"] == 1  # its share of two
    assert Run(tmp_path).metrics()[-1]["step"] == 6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--plan-seconds", "0"], "--plan-seconds must be above 0"),
        (["--memory-limit", "-1"], "--memory-limit must be above 0"),
        (["--memory-limit", "1", "--no-plan"], "goes with a plan"),
        (["--chunk", "0"], "chunk must be at least 1"),
        (["--method", "vmap", "--convolution", "channels_last"], "channels-last"),
    ],
)
def test_wrong_options_of_the_command_line(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in fails(capsys, "train", "sinusoid", *options, "--out", "unused")


def test_a_derivative_that_is_exact_later_is_what_is_planned_for() -> None:
    tasks = SinusoidEpisodes(tasks=2)[0]
    learner = fewstep.maml(fewstep.models.mlp(), functional.mse_loss, lr=0.01, exact_from=5)
    learner.iteration = 0
    bench = trials.Bench(learner, tasks, None, None)
    bench.run(Engine())
    assert bench.learner.order == "exact"
    assert learner.order == "none"
