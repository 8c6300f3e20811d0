"""Every benchmark runs for one tiny step with the contenders that are installed, so that it cannot rot."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console

import fewstep
from benchmarks import contenders, gradient_noise, memory, methods, planner, speed
from benchmarks.charts import chart
from benchmarks.results import Entry, Fresh, Result, load, times_faster
from benchmarks.tables import as_markdown, as_table
from benchmarks.workers import FailureError, Group, Job, Turn, agreement
from benchmarks.workloads import TASKS, WORKLOADS, Workload, miniimagenet
from fewstep import algorithms, cli

COMPILING = ["torch.func, compiled", "fewstep, compiled"]
QUICK = [family for family in contenders.FAMILIES if family not in {*COMPILING, "matrix product"}]


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    """Tiny tensors on several threads wait for each other; a contender may change what is warned of."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        yield
    torch.set_num_threads(threads)


def small(name: str) -> Workload:
    """One task; two inner steps at most; pictures of Mini-ImageNet at a third of their side."""
    workload = miniimagenet(2, 5, 5, 28, tasks=1) if name.startswith("mini") else WORKLOADS[name](1)
    object.__setattr__(workload, "steps", min(workload.steps, 2))
    return workload


@pytest.mark.parametrize("name", list(WORKLOADS))
@pytest.mark.parametrize("family", [*QUICK, *COMPILING])
def test_contenders_agree_with_the_naive_loop(name: str, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compilers take minutes: what they are given runs as it is."""
    monkeypatch.setattr("fewstep.compilation._by_inductor", lambda graph, examples: graph)
    monkeypatch.setattr("torch.compile", lambda function, **options: function)
    if reason := contenders.missing(family):
        pytest.skip(reason)
    workload = small(name)
    truth = workload.meta_gradient(workload.naive).clone()
    assert truth.norm() > 0
    before = [value.detach().clone() for value in workload.model.parameters()]
    variants = contenders.variants(family, workload)
    for variant in list(variants) if name == "sinusoid" else list(variants)[:1]:
        contender = contenders.build(family, workload, variants[variant])
        assert agreement(contender.gradient(), truth) < 5e-3, variant  # float32, and the kinks of ReLU
        contender.step()  # of a size that moves no weight
    for value, start in zip(workload.model.parameters(), before, strict=True):
        assert torch.allclose(value, start, rtol=1e-4, atol=1e-6)


def test_the_planners_choice_is_among_the_best_of_a_grid() -> None:
    workload = WORKLOADS["sinusoid"](4)
    options = planner.Options(workload="sinusoid", seconds=3, rounds=2, compiled=False)
    chosen, runners = planner.judge(workload, options, Console(quiet=True))
    assert runners[0].engine == chosen.engine
    assert len(runners) >= 3
    assert 0 < planner.ratio(runners) < 2  # the machine may be busy
    Console(quiet=True).print(planner.as_table(workload, runners))


def test_every_workload_names_itself_and_its_tasks() -> None:
    assert set(TASKS) == set(WORKLOADS)
    assert all(WORKLOADS[name](2).name == name for name in WORKLOADS if not name.startswith("mini"))
    workload = WORKLOADS["sinusoid"](5)
    sizes = [workload.share(part, 2).tasks.size for part in range(2)]
    assert sorted(sizes) == [2, 3]


def test_the_work_is_counted_with_its_second_derivatives() -> None:
    """Two linear layers after the first: 9 forward passes for support and 3 for query; the first has no dL/dx."""
    workload = WORKLOADS["sinusoid"](1)
    first, others = 2 * 10 * 40, 2 * 10 * (40 * 40 + 40)
    by_hand = (9 + 3) * others + (4 + 2) * first
    assert speed.meta_step_flops(workload) == pytest.approx(by_hand, rel=0.02)


def test_a_comparison_end_to_end(tmp_path: Path) -> None:
    smoke = "--repeats 1 --tasks 2 --cores 1 --patience 0 --no-fresh --only fewstep"
    cli.main(["bench", "sinusoid", *smoke.split(), "--out", str(tmp_path)])
    result = load(tmp_path / "sinusoid.json")
    assert [entry.family for entry in result.entries] == ["autograd loop", "matrix product", "fewstep"]
    assert all(len(entry.step) == 1 and entry.step[0] > 0 for entry in result.entries)
    assert all(entry.error < 1e-3 for entry in result.entries)
    assert 0 < result.share_of_machine(result.best[0]) < 1
    assert "sinusoid, 2 tasks" in (tmp_path / "speed.md").read_text()
    assert (tmp_path / "speed.png").stat().st_size > 1000


def test_who_is_not_ready_in_time_is_left_out() -> None:
    result, workload = Result("sinusoid", 2, 1, flops=1, rounding=1e-7), WORKLOADS["sinusoid"](2)
    late = speed._best_variant("fewstep", "threads", workload, speed.Options(ready=0), 0, result, Console(quiet=True))
    assert late is None
    assert list(result.skipped.values()) == ["not ready after 0 s"]


def test_without_the_yardstick_nothing_is_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="nothing was measured"):
        cli.main(["bench", "sinusoid", "--tasks", "2", "--cores", "1", "--limit", "0", "--out", str(tmp_path)])
    assert "sinusoid: not measured without the autograd loop" in " ".join(capsys.readouterr().out.split())
    assert not list(tmp_path.iterdir())


def test_the_first_step_and_the_memory_are_those_of_new_processes() -> None:
    result = Result(
        "sinusoid", 2, 1, flops=1, rounding=1e-7, entries=[Entry("fewstep", "processes", "vmap", {}, 0, [1])]
    )
    speed._measure_fresh(result, speed.Options(cores=1), Console(quiet=True))
    assert not result.skipped
    fresh = result.fresh["fewstep"]
    assert min(fresh.cold, fresh.warm) > 0
    assert fresh.peak >= 0


def test_bench_needs_a_checkout_and_a_benchmark(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench", "sinusoidal"])
    assert stopped.value.code == 2
    assert "did you mean 'sinusoid'?" in capsys.readouterr().err
    monkeypatch.setattr(fewstep, "__file__", str(tmp_path / "lib" / "site-packages" / "fewstep" / "__init__.py"))
    with pytest.raises(SystemExit) as stopped:
        cli.main(["bench"])
    assert stopped.value.code == 2
    assert "clone the repository" in capsys.readouterr().err


def test_a_contender_that_cannot_start_says_why() -> None:
    with pytest.raises(FailureError, match=r"TypeError: .*nonsense"):
        Group(Job("sinusoid", 2, "autograd loop", {"nonsense": 1}), "threads", 1, 60, {})


def test_ratios_are_medians_over_the_rounds() -> None:
    ours = Entry("fewstep", "threads", "vmap", {}, step=[1.0, 10.0, 1.0])
    loop = Entry("autograd loop", "processes", "any module", {}, step=[2.0, 30.0, 2.0])
    assert times_faster(ours, loop) == 2.0
    product = [Entry("matrix product", layout, "", {}, step=[1.0] * 3) for layout in ("threads", "processes")]
    result = Result("sinusoid", 4, 2, flops=50, rounding=1e-7, product=100, entries=[ours, loop, *product])
    result.fresh["fewstep"] = Fresh("vmap", 9.0, 3.0, 2**20)
    assert result.share_of_machine(ours) == 0.5
    assert result.share_of_machine(loop) == 0.125  # two processes do two products a second
    text = as_markdown(Result(**{**vars(result), "origin": "command\nmachine"}))
    assert "| fewstep | vmap | 1000.00 |" in text
    assert "| 2.00x |" in text
    Console(quiet=True).print(as_table(result))


def test_a_disturbed_turn_is_taken_again() -> None:
    class Busy:
        turns = iter([Turn(3.0, 0.5), Turn(2.0, 0.2), Turn(1.0, 0.0)])

        def turn(self, what: str, count: int) -> Turn:
            return next(self.turns)

    runner = speed.Runner(Entry("", "threads", "", {}), Busy(), WORKLOADS["sinusoid"](1), patience=3)  # type: ignore[arg-type]
    assert runner.take_turn("step") == 1.0
    assert runner.foreign == [0.0]


def test_chart_of_one_and_of_several(tmp_path: Path) -> None:
    entry = Entry("fewstep", "threads", "vmap", {}, step=[1.0])
    results = [Result(name, 4, 2, 1, 1e-7, entries=[entry]) for name in list(WORKLOADS)[:4]]
    for count in (1, 4):
        chart(results[:count], tmp_path / f"{count}.png")
        assert (tmp_path / f"{count}.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of the resident set is Linux's")
@pytest.mark.parametrize("name", ["ours", "naive loop"])
def test_memory(name: memory.Name) -> None:
    peak = memory.measure(name, steps=3, images=(5, 5), size=16, threads=0)
    assert peak.resident >= 0
    assert peak.allocated is not None
    assert peak.allocated > 0
    assert peak.seconds > 0


def test_what_grows_with_the_inner_steps_is_theta() -> None:
    model = miniimagenet(1, 5, 5, 16).model
    theta = sum(value.numel() * value.element_size() for value in model.parameters())
    peaks = [memory.measure("ours", steps=steps, images=(5, 5), size=16, threads=0).allocated for steps in (3, 9)]
    assert peaks[0] is not None
    assert peaks[1] is not None
    assert 0 < peaks[1] - peaks[0] <= 6 * 1.05 * theta  # activations of one step are far more


def test_methods_end_to_end(tmp_path: Path) -> None:
    names = ["maml", "reptile", "protonet", "nearest_pixels"]
    smoke = "--data glyphs --iterations 2 --validation 2 --episodes 2 --no-compiled"
    cli.main(["bench", "methods", "--methods", *names, *smoke.split(), "--out", str(tmp_path)])
    text = (tmp_path / "methods.md").read_text()
    assert "### glyphs: 2 iterations, the best validated weights, 2 episodes" in text
    assert all(f"| {name} |" in text for name in names)
    assert "| 3, 5 |" in text
    assert set(algorithms.__all__) < set(methods.METHODS)
    cost = json.loads((tmp_path / "glyphs" / "maml" / "cost.json").read_text())
    assert cost["peak_mib"] > 50
    lines = [
        {"step": 100, "seconds": 9.0},
        {"step": 200, "seconds": 20.0},
        {"step": 300, "seconds": 25.0},
        {"step": 300},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert methods._pace(tmp_path) == "50"


def test_gradient_noise() -> None:
    """Of batches that do not differ there is no noise, of the sinusoid's there is."""
    learner = fewstep.maml(fewstep.models.mlp(), torch.nn.functional.mse_loss, lr=0.01)
    episodes = fewstep.data.SinusoidEpisodes(tasks=2)
    _, ratio = gradient_noise.signal_to_noise(learner, [episodes[0]] * 3, 3)
    assert ratio > 1e6
    norm, ratio = gradient_noise.signal_to_noise(learner, episodes, 8)
    assert norm > 0
    assert ratio < 10


@pytest.mark.parametrize("procs", ["1", "2"])
def test_episodes(procs: str, capfd: pytest.CaptureFixture[str]) -> None:
    few = ["--episodes", "2", "--rounds", "1", "--no-compiled", "--procs", procs]
    cli.main(["bench", "episodes", "--recipes", "glyphs-5way-1shot", *few])
    last = capfd.readouterr().out.splitlines()[-1]
    assert last.startswith("| glyphs-5way-1shot |")
    drawing, step = (float(cell) for cell in last.split("|")[2:4])
    assert 0 < drawing < step
    batched, products = float(last.split("|")[7]), float(last.split("|")[9])
    assert 0 < products < batched


@pytest.mark.filterwarnings("ignore")
def test_sampler(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mujoco", reason="the extra rl is not installed")
    few = ["--tasks", "2", "--trajectories", "2", "--horizon", "3", "--vector", "2", "--rounds", "1"]
    cli.main(["bench", "sampler", *few])
    rows = [line.split("|") for line in capsys.readouterr().out.splitlines() if line.startswith(("| half", "| ant"))]
    assert [row[1].strip() for row in rows] == [
        "half-cheetah, gymnasium", "ant, gymnasium", "half-cheetah, paper", "ant, paper"
    ]  # fmt: skip
    assert all(float(row[3].replace(",", "")) > 0 for row in rows)
