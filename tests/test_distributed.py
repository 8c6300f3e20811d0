"""Several processes: the gradients, runs and evaluations of one, and one voice; killed, stopped and resumed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.scaling import all_reduce_seconds, step_seconds
from benchmarks.scaling import main as benchmark
from fewstep import DivergenceError, FewstepError, InputError, Learner, Task, maml
from fewstep import distributed as dist
from fewstep import launch as launching
from fewstep.cli import main
from fewstep.data import SinusoidEpisodes
from fewstep.evaluate import Evaluation, evaluate
from fewstep.launch import launch
from fewstep.run import Run
from fewstep.train import Training, train
from tests.test_cli import fails
from tests.test_train import same, without_time

ROOT = Path(__file__).parents[1]
EPISODES = SinusoidEpisodes(tasks=7, shots=5, queries=5)  # which neither 2 nor 3 divides
TRAINING = Training(iterations=12, check_every=4, log_every=2, schedule="cosine", clip=0.5)
OPTIONS = """
    --no-plan --iterations 240 --check-every 20 --log-every 10 --validation-episodes 4 --test-steps 2
    --test-episodes 40
"""
CLI = ["train", "sinusoid", *OPTIONS.split()]


def on_ranks(count: int, work: Callable[[str], None], folder: Path) -> int:
    """Run a function of a file of tests on several ranks, and return their exit code."""
    # Left as the command line leaves: threads of gloo can abort a process that ends in the usual way.
    code = f"""
import os, sys, traceback
sys.path.insert(0, {str(ROOT)!r})
from {work.__module__} import {work.__name__} as work
code = 0
try:
    work({str(folder)!r})
except SystemExit as leaving:
    code = leaving.code
except BaseException:
    traceback.print_exc()
    code = 1
sys.stdout.flush()
os._exit(code)
"""
    return launch([sys.executable, "-c", code], count)


def build(dropout: float = 0.0) -> Learner:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 1))
    return maml(model, functional.mse_loss, lr=0.05)


def validate(learner: Learner) -> Evaluation:
    return evaluate(learner, replace(EPISODES, seed=1), metric="mse", steps=2, count=18)


def go(path: Path, iterations: int = 12, dropout: float = 0.0, episodes: SinusoidEpisodes = EPISODES) -> Learner:
    learner = build(dropout)
    train(
        learner, episodes, replace(TRAINING, iterations=iterations, schedule="constant"), Run(path), validate=validate
    )
    return learner


# Gradients and evaluation.


def double_gradients() -> tuple[list[Tensor], Tensor]:
    learner, tasks = build().double(), EPISODES[0]
    mine = dist.share(Task(*(tuple(leaf.double() for leaf in part) for part in tasks)))
    loss = learner(mine).mean()
    loss.backward()
    (loss,) = dist.average_gradients(learner.parameters(), mine.size, loss)
    return [value.grad for value in learner.parameters() if value.grad is not None], loss


def partly_used() -> list[Tensor | None]:
    """The gradients of three parameters: one with a gradient everywhere, one on the last rank, one nowhere."""
    values = [nn.Parameter(torch.zeros(2, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16, torch.float32)]
    values[0].grad = torch.full((2,), float(dist.rank()))
    if dist.rank() == dist.ranks() - 1:
        values[1].grad = torch.ones(2, dtype=torch.bfloat16)
    dist.average_gradients(values, 1 + dist.rank())
    return [value.grad for value in values]


def work_of_three(folder: str) -> None:
    with dist.joined():
        work_on_gradients(Path(folder))


def work_of_two(folder: str) -> None:
    with dist.joined():
        work_on_gradients(Path(folder))
        work_on_runs(Path(folder))


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two ranks have done their work."""
    path = tmp_path_factory.mktemp("two")
    go(path / "one, then two", iterations=4)
    assert on_ranks(2, work_of_two, path) == 0
    return path


def work_on_gradients(path: Path) -> None:
    gradients, loss = double_gradients()
    result = validate(build())
    assert all(other == result for other in dist.gathered(result))
    sizes = dist.gathered(dist.share(EPISODES[0]).size)
    assert sum(sizes) == 7
    assert sizes[0] == max(sizes) <= min(sizes) + 1
    torch.manual_seed(dist.rank())
    module = nn.Linear(2, 2)
    dist.start_alike(module)
    content = {
        "gradients": gradients,
        "loss": loss,
        "weights": dist.gathered(module.state_dict()),
        "random": dist.gathered(torch.rand(3)),
        "partly": partly_used(),
        "result": result.to_json(),
        "fewer": dist.on_all_ranks(torch.tensor, 1),
    }
    if dist.is_first():
        torch.save(content, path / "content.pt")


@pytest.mark.parametrize("count", [2, 3])
def test_gradients_and_evaluation_are_those_of_one_process(count: int, two: Path, tmp_path: Path) -> None:
    if count == 3:
        assert on_ranks(3, work_of_three, tmp_path) == 0
    content = torch.load((two if count == 2 else tmp_path) / "content.pt")
    gradients, loss = double_gradients()
    for ours, theirs in zip(gradients, content["gradients"], strict=True):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-12)
    torch.testing.assert_close(content["loss"], loss, rtol=0, atol=1e-12)
    assert content["result"] == validate(build()).to_json()
    assert content["fewer"] == [torch.tensor(0)]
    assert all(same(content["weights"][0], weights) for weights in content["weights"])
    assert len({float(numbers[0]) for numbers in content["random"]}) == count
    total = count * (count + 1) / 2  # rank r counts for 1 + r tasks
    everywhere, last, nowhere = content["partly"]
    torch.testing.assert_close(everywhere, torch.full((2,), sum(r * (1 + r) for r in range(count)) / total))
    assert last.dtype == torch.bfloat16
    torch.testing.assert_close(last, torch.full((2,), count / total, dtype=torch.bfloat16))
    assert nowhere is None


def test_one_process_takes_all_and_changes_nothing() -> None:
    tasks, weight = EPISODES[0], nn.Parameter(torch.ones(1))
    assert dist.share(tasks) is tasks
    weight.grad = gradient = torch.ones(1)
    loss, stop = dist.average_gradients([weight], 3, torch.tensor(2.0), False)
    assert weight.grad is gradient
    assert (float(loss), bool(stop)) == (2.0, False)
    assert (dist.ranks(), dist.rank(), dist.deserted(), dist.gathered(1)) == (1, 0, False, [1])


# Whole runs.


class Interrupted(SinusoidEpisodes):
    """The last rank gets a Ctrl-C in iteration 5."""

    def __getitem__(self, index: int) -> Task:
        if index == 4 and dist.rank() == dist.ranks() - 1:
            os.kill(os.getpid(), signal.SIGINT)
        return super().__getitem__(index)


class Exploding(SinusoidEpisodes):
    """In iteration 3 the last task is finite, and its loss is not."""

    def __getitem__(self, index: int) -> Task:
        tasks = super().__getitem__(index)
        if index == 2:
            tasks.query[1][6] = 1e30
        return tasks


def work_on_runs(path: Path) -> None:
    go(path / "whole")
    go(path / "one, then two")
    go(path / "two, then one", iterations=4)
    go(path / "dropout", dropout=0.2)
    go(path / "resumed", dropout=0.2, iterations=4)
    torch.manual_seed(99)  # a new process has another random state
    go(path / "resumed", dropout=0.2)
    with pytest.raises(KeyboardInterrupt):
        go(path / "interrupted", dropout=0.2, episodes=Interrupted(tasks=7, shots=5, queries=5))
    state = Run(path / "interrupted").load_state()
    assert state is not None
    assert state["step"] == 5
    go(path / "interrupted", dropout=0.2)
    with pytest.raises(KeyboardInterrupt):
        stop_a_step_without_messages(path / "silent")
    with pytest.raises(DivergenceError) as error:
        go(path / "diverged", episodes=Exploding(tasks=7, shots=5, queries=5))
    messages = dist.gathered(str(error.value))
    assert len(set(messages)) == 1
    if dist.is_first():
        (path / "message").write_text(messages[0])


def stop_a_step_without_messages(path: Path) -> None:
    """Train by a step that averages nothing, so that ranks have to ask each other whether one is to stop."""
    train(build(), Interrupted(tasks=7, shots=5, queries=5), TRAINING, Run(path), validate=validate,
          step_of=lambda learner, adam: lambda tasks, lr: torch.zeros(()))  # fmt: skip


def close(first: Run, second: Run) -> None:
    """Assert that two runs are equal up to rounding."""
    for name in ("model.safetensors", "best.safetensors"):
        torch.testing.assert_close(first.load_weights(name), second.load_weights(name), rtol=1e-4, atol=1e-6)
    for own, other in zip(without_time(first), without_time(second), strict=True):
        assert own.keys() == other.keys()
        assert own == {key: pytest.approx(value, rel=1e-4) for key, value in other.items()}


def identical(first: Run, second: Run) -> None:
    """Assert that two runs are equal to the last bit."""
    for name in ("model.safetensors", "best.safetensors"):
        assert same(first.load_weights(name), second.load_weights(name))
    assert without_time(first) == without_time(second)


def test_a_run_is_that_of_one_process_also_where_their_number_changes(two: Path, tmp_path: Path) -> None:
    go(tmp_path)
    go(two / "two, then one")
    for name in ("whole", "one, then two", "two, then one"):
        close(Run(tmp_path), Run(two / name))
        assert Run(two / name).step_of("model.safetensors") == Run(tmp_path).step_of("model.safetensors")


def test_a_stopped_run_goes_on_to_the_identical_result_with_dropout(two: Path) -> None:
    for name in ("resumed", "interrupted"):
        identical(Run(two / "dropout"), Run(two / name))
    silent = Run(two / "silent").load_state()
    assert silent is not None
    assert silent["step"] == 5
    state = Run(two / "dropout").load_state()
    assert state is not None
    first, second = state["random"]
    assert not torch.equal(first, second)


def test_divergence_on_one_rank_has_the_words_of_one_process(two: Path, tmp_path: Path) -> None:
    with pytest.raises(DivergenceError, match=r"iteration 2: .* task 6 is not finite on the query set") as error:
        go(tmp_path, episodes=Exploding(tasks=7, shots=5, queries=5))
    assert (two / "message").read_text() == str(error.value)


# The command line.


@pytest.fixture(scope="module")
def unharmed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A whole run of two processes, with what they said in a file."""
    run = Run(tmp_path_factory.mktemp("unharmed"))
    with (run.path / "said").open("w") as said:
        command = [sys.executable, "-m", "fewstep", *CLI, "--procs", "2", "--out", str(run.path)]
        subprocess.run(command, stdout=said, stderr=said, check=True)
    return run


def test_one_process_speaks(unharmed: Run) -> None:
    lines = (unharmed.path / "said").read_text().splitlines()
    narrated = [line for line in lines if not line.startswith("{")]
    assert narrated == [
        f"sinusoid: iteration 0 of 240, in {unharmed.path}",
        f"trained; now: fewstep evaluate {unharmed.path}",
    ]
    assert sum('"loss"' in line for line in lines) == 24


def test_procs_are_no_setting_of_the_run(unharmed: Run, tmp_path: Path) -> None:
    run = copied(unharmed, tmp_path)
    main([*CLI, "--iterations", "242", "--out", str(run.path)])  # goes on alone
    state = run.load_state()
    assert state is not None
    assert state["step"] == 242
    assert "procs" not in run.read_json("config.json")


def test_evaluation_is_that_of_one_process(unharmed: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = copied(unharmed, tmp_path)
    main(["evaluate", str(run.path), "--no-baselines"])
    alone = run.read_json("evaluation.json")
    main(["evaluate", str(run.path), "--no-baselines", "--procs", "2"])
    assert {**run.read_json("evaluation.json"), "seconds": 0} == {**alone, "seconds": 0}
    assert capfd.readouterr().out.count("evaluation.json") == 2


def test_evaluation_by_no_process(unharmed: Run, capsys: pytest.CaptureFixture[str]) -> None:
    message = "the number of processes must be at least 1, but 0 came"
    assert message in fails(capsys, "evaluate", str(unharmed.path), "--procs", "0")


def copied(run: Run, folder: Path) -> Run:
    shutil.copytree(run.path, folder, dirs_exist_ok=True)
    return Run(folder)


@contextmanager
def started(launcher: str, run: Run, *options: str, until: Callable[[], Any]) -> Iterator[subprocess.Popen[str]]:
    """Two ranks in a process group of their own, as under a shell, which have come as far as `until`."""
    before, after = LAUNCHERS[launcher]
    command = [sys.executable, *before, *after, *options, "--out", str(run.path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            deadline = time.monotonic() + 200
            while not until():
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.01)
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def pid_of_rank(number: int, run: Path) -> int:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            variables, words = ((folder / name).read_bytes().split(b"\0") for name in ("environ", "cmdline"))
        except OSError:
            continue
        if f"RANK={number}".encode() in variables and str(run).encode() in words:
            return int(folder.name)
    raise AssertionError(f"no rank {number}")


LAUNCHERS = {
    "procs": (["-m", "fewstep", *CLI, "--procs", "2"], []),
    "torchrun": (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2", "-m", "fewstep"],
        CLI,
    ),
}
needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the ranks in Linux's /proc")


@needs_proc
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_killed_rank_is_started_again_and_the_run_is_identical(launcher: str, unharmed: Run, tmp_path: Path) -> None:
    with started(launcher, Run(tmp_path), until=(tmp_path / "trainer.pt").exists) as process:
        os.kill(pid_of_rank(1, tmp_path), signal.SIGKILL)
        _, error = process.communicate(timeout=200)
    assert process.returncode == 0, error
    assert error.count("sinusoid: iteration") == 2, "it was not started again"
    if launcher == "procs":
        assert "process 1 was killed (SIGKILL); all start again from the last checkpoint, restart 1 of 3" in error
        assert "Traceback" not in error
    identical(unharmed, Run(tmp_path))


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_ctrl_c_reaches_all_and_the_state_is_saved(launcher: str, tmp_path: Path) -> None:
    run = Run(tmp_path)
    more = ["--iterations", "100000", "--log-every", "1", "--check-every", "2000"]
    with started(launcher, run, *more, until=lambda: len(run.metrics()) > 2) as process:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        _, error = process.communicate(timeout=200)
    state, metrics = run.load_state(), run.metrics()
    assert state is not None
    assert state["step"] == metrics[-1]["step"] < 2000
    assert error.count("fewstep: stopped; the same command goes on from the last checkpoint") == 1
    if launcher == "procs":
        assert process.returncode == 130
        assert "Traceback" not in error


def test_ranks_end_with_their_launcher(tmp_path: Path) -> None:
    more = ["--iterations", "100000"]
    with started("procs", Run(tmp_path), *more, until=(tmp_path / "trainer.pt").exists) as process:
        process.kill()
        _, error = process.communicate(timeout=200)  # until no rank holds the pipe
    assert error.count("fewstep: stopped") == 1


def test_divergence_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*CLI, "--procs", "2", "--inner-lr", "1e30", "--out", str(tmp_path)])
    assert stop.value.code == 2
    narrated, line = capfd.readouterr().err.splitlines()
    assert narrated.startswith("sinusoid: iteration 0")
    assert line.startswith("fewstep: iteration 0: ")


def work_alone_in_failing(folder: str) -> None:
    with dist.joined():
        if dist.rank() == 1:
            raise InputError("only here")
        dist.gathered(0)


def test_one_failing_rank_takes_all_along(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert on_ranks(2, work_alone_in_failing, tmp_path) == 2
    error = capfd.readouterr().err
    assert error.count("only here") == 2  # the line of the source, and the message
    assert error.count("Traceback") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--procs", "0"], "the number of processes must be at least 1, but 0 came"),
        (["--procs", "26"], "25 tasks a step are too few for 26 processes; start 25, or take more tasks"),
        (["--procs", "many"], "many"),
        (["--procs", "2", "--inner-lr", "fast"], "fast"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in fails(capsys, "train", "sinusoid", *arguments)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda", "2 processes need a GPU each, but there are 1; start 1, or use the CPU"),
        ("cuda:1", "several processes compute on the device cpu, or cuda with a GPU for each, not on cuda:1"),
        ("mps", "not on mps"),
    ],
)
def test_devices(device: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match=message):
        dist.check_processes(2, 32, device)
    dist.check_processes(1, 32, device)


def test_more_ranks_than_tasks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("fewstep.cli.ranks", lambda: 8)
    assert "torchrun started 8 processes; leave out --procs 2" in fails(capsys, "train", "sinusoid", "--procs", "2")
    monkeypatch.setattr(dist, "ranks", lambda: 8)
    with pytest.raises(InputError, match="7 tasks a step are too few for 8 processes; start 7, or take more tasks"):
        dist.share(EPISODES[0])


# The benchmark.


def test_cost_model() -> None:
    assert all_reduce_seconds(1_000_000, 2, latency=0.001, bandwidth=1e9) == pytest.approx(0.003)
    assert all_reduce_seconds(8_000_000, 8, latency=0, bandwidth=1e6) == pytest.approx(14)
    assert step_seconds(32, 3, per_task=1.0, overhead=0.5, all_reduce=0.25) == 11.75


@pytest.mark.parametrize("what", ["steps", "link"])
def test_benchmark(what: Any, capfd: pytest.CaptureFixture[str]) -> None:
    benchmark(what, rounds=1, tasks=2, compiled=False)
    assert {"steps": "speed-up, measured", "link": "bandwidth"}[what] in capfd.readouterr().out


# The launcher by itself.


def python(code: str) -> list[str]:
    return [sys.executable, "-c", f"import os, signal, sys, time; first = os.environ['RANK'] == '0'; {code}"]


def test_who_is_killed_again_and_again_is_given_up(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(FewstepError, match=r"process 0 was killed \(SIGKILL\), after 3 restarts; the last checkpoint"):
        launch(python("os.kill(os.getpid(), signal.SIGKILL if first else 0)"), 2)
    assert "restart 3 of 3" in capsys.readouterr().err


def test_a_mistake_is_not_tried_again_and_those_who_hang_are_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "PATIENCE", 0.1)
    start = time.monotonic()
    assert launch(python("time.sleep(600) if first else sys.exit(2)"), 2) == 2
    assert time.monotonic() - start < 60


@pytest.mark.parametrize(("asked", "expected"), [([15], [-15]), ([2, 2], None)])
def test_a_signal_is_passed_on_and_a_second_kills(asked: list[int], expected: list[int] | None) -> None:
    outcome: Any = None
    try:
        outcome = launching._run(python("time.sleep(600)"), 1, asked)
    except KeyboardInterrupt:
        assert expected is None
    assert outcome == expected


def test_threads_are_a_share_of_the_cores_unless_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [launching._environment(0, count, 1)["OMP_NUM_THREADS"] for count in (2, 3, 16)] == ["4", "2", "1"]
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert launching._environment(0, 2, 1)["OMP_NUM_THREADS"] == "7"
