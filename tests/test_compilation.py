"""What is compiled: in one piece or in two, and the cache that it is kept in."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fewstep import Task, maml
from fewstep.building import AS_WRITTEN, ENTRY
from fewstep.compilation import _traced, compiled, compiled_in_two
from fewstep.engine import Engine
from fewstep.errors import FallbackWarning, InputError
from fewstep.functional import Loss
from fewstep.hoisting import Hoist
from tests.cases import CASES, Case
from tests.reference import meta_gradient, relative_error
from tests.small import gradient

pytestmark = pytest.mark.filterwarnings("error::fewstep.FallbackWarning")
KEEP = Engine(compile="pieces", keep=True, chunk=2)


def _tasks(count: int = 4) -> Task:
    torch.manual_seed(1)
    x, y = torch.randn(2, count, 6, 3, dtype=torch.float64), torch.randn(2, count, 6, 2, dtype=torch.float64)
    return Task(support=(x[0], y[0]), query=(x[1], y[1]))


def _gradient(model: nn.Module, loss: Loss, engine: Engine, tasks: Task, *, twice: bool = False) -> Tensor:
    """The meta-gradient after 3 inner steps; `twice` gives that of a second backward pass."""
    learner = maml(model, loss, lr=0.1, steps=3, engine=engine)
    torch.manual_seed(2)
    total = learner(tasks).sum()
    for last in (False, True) if twice else (True,):
        model.zero_grad()
        total.backward(retain_graph=not last)
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_what_is_kept_gives_the_same_derivatives_and_random_numbers() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 2)).double()
    model[0].weight.requires_grad_(False)
    wanted = _gradient(model, functional.mse_loss, Engine(compile="pieces", chunk=2), _tasks())
    for twice in (False, True):
        kept = _gradient(model, functional.mse_loss, KEEP, _tasks(), twice=twice)
        assert relative_error(kept, wanted) < 1e-14


def test_a_copy_of_a_compiled_learner_gives_its_gradients_without_a_warning() -> None:
    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return functional.mse_loss(model(batch["x"]), batch["y"])

    x, y = _tasks().support
    tasks = Task(support={"x": x, "y": y}, query={"x": -x, "y": y})  # PyTorch warns where the form of a dict is copied
    learner = maml(nn.Linear(3, 2).double(), loss, lr=0.1, steps=2, engine=Engine(compile="step"))
    wanted = gradient(learner, tasks)
    assert relative_error(gradient(copy.deepcopy(learner), tasks), wanted) < 1e-12


class Written(nn.Module):
    """Writes in place to results of products, and through views; draws numbers that nothing needs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bias, self.last = nn.Linear(3, 80), nn.Parameter(torch.rand(80)), nn.Linear(80, 2)

    def forward(self, x: Tensor) -> Tensor:
        torch.rand(70, 70)
        hidden = functional.linear(x, self.first.weight)
        hidden += self.bias
        parts = torch.zeros_like(hidden)
        parts[:, :50] = hidden[:, :50].tanh()
        parts[:, 0] += 1.0
        result: Tensor = self.last(functional.dropout(parts * hidden, 0.5))
        return result


@pytest.fixture
def graphs_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled runs as it was traced and cut: the same results, sooner."""
    monkeypatch.setattr("fewstep.compilation._by_inductor", lambda graph, examples: graph)


@pytest.mark.usefixtures("graphs_as_they_are")
@pytest.mark.parametrize("method", ["vmap", "loop"])
@pytest.mark.parametrize("twice", [False, True])
def test_what_is_written_in_place_or_drawn_in_vain_is_cut_right(method: Any, twice: bool) -> None:
    model = Written().double()
    x, y = torch.randn(2, 70, 3, dtype=torch.float64), torch.randn(2, 70, 2, dtype=torch.float64)
    tasks = Task(support=(x, y), query=(x + 1, y))
    plain = Engine(method=method, compile="pieces")
    wanted = _gradient(model, functional.mse_loss, plain, tasks)
    kept = _gradient(model, functional.mse_loss, replace(plain, keep=True), tasks, twice=twice)
    assert relative_error(kept, wanted) < 1e-13


def _exponential(x: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    value = x.exp()
    return value, value * c


def _raised(error: Exception) -> None:
    raise error


@pytest.mark.usefixtures("graphs_as_they_are")
def test_the_caller_may_write_to_the_first_results() -> None:
    x, c = torch.rand(3), torch.rand(3)
    early, later = compiled_in_two(_exponential, [x, c], late=1, failed=_raised)
    result, *kept = early(x)
    result.zero_()
    torch.testing.assert_close(later(x, c, *kept), (x.exp() * c,))


def _breaking(monkeypatch: pytest.MonkeyPatch, broken: Sequence[int], fail: Callable[[], None]) -> list[str]:
    """Have the builds of these numbers fail; returns the code of those that were begun."""
    from torch._inductor.codecache import CppWrapperCodeCache

    libraries: Any = CppWrapperCodeCache
    load, begun = libraries.load_pybinding_async, list[str]()

    def load_some(*, main_code: str, **more: Any) -> Any:
        begun.append(main_code)
        return fail if len(begun) - 1 in broken else load(main_code=main_code, **more)

    monkeypatch.setattr(libraries, "load_pybinding_async", load_some)
    return begun


@pytest.mark.parametrize("broken", [(), (1,), (0,)], ids=["none", "second", "first"])
def test_what_is_built_in_the_background(broken: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for the second part before it is called: where its building fails, its operators run plainly."""
    from torch._inductor.codecache import CppWrapperCodeCache

    def fail() -> None:
        raise OSError("no space left\nfor the library")

    begun = _breaking(monkeypatch, broken, fail)
    x, c = torch.rand(3), torch.rand(3)
    if broken == (0,):
        with pytest.raises(OSError, match="no space left"):
            compiled_in_two(_exponential, [x, c], late=1, failed=_raised)
        return
    told: list[Exception] = []
    early, later = compiled_in_two(_exponential, [x, c], late=1, failed=told.append)
    result, *kept = early(x)
    torch.testing.assert_close(result, x.exp())
    for _ in range(2):
        torch.testing.assert_close(later(x, c, *kept), (x.exp() * c,))
    assert [*map(str, told)] == ["no space left\nfor the library"][: len(broken)]
    assert len(begun) == 2
    assert "load_pybinding" not in vars(CppWrapperCodeCache), "PyTorch's own way is back"


def test_what_only_calls_kernels_is_built_without_effort(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the time that g++ takes; where PyTorch spells its entry in another way, nothing would be spared."""
    written = _breaking(monkeypatch, [], _no_room)
    x = torch.rand(3)
    compiled(lambda x: (x + 7,), [x])
    assert [code.count(AS_WRITTEN + ENTRY) for code in written] == [1]


def test_a_build_that_failed_is_tried_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torch._inductor import codecache

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    build, tried = codecache._worker_compile_cpp, list[str]()

    def fail(lock: str, builders: Any) -> None:
        tried.append(lock)
        raise OSError("no space left")

    x, w = torch.rand(3), torch.rand(3)
    compiled(lambda x, w: (x * w + 4,), [x, w])  # builds PyTorch's header, once a process
    monkeypatch.setattr(codecache, "_worker_compile_cpp", fail)
    for _ in range(2):
        with pytest.raises(OSError, match="no space left"):
            compiled(lambda x, w: (x * w + 5,), [x, w])
    assert len(tried) >= 2
    monkeypatch.setattr(codecache, "_worker_compile_cpp", build)
    (result,) = compiled(lambda x, w: (x * w + 5,), [x, w])(x, w)
    torch.testing.assert_close(result, x * w + 5)


@pytest.mark.filterwarnings("default::fewstep.FallbackWarning")
def test_a_second_part_that_cannot_be_built_is_kept_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(3, 2)
    x, y = torch.rand(2, 4, 3), torch.rand(2, 4, 2)
    learner = maml(model, functional.mse_loss, lr=0.1, engine=Engine(method="loop"))
    tasks = Task(support=(x, y), query=(x + 1, y))
    wanted = meta_gradient(learner(tasks), list(model.parameters()))
    _breaking(monkeypatch, [1], _no_room)
    learner.engine = replace(KEEP, method="loop", chunk=None)
    with pytest.warns(FallbackWarning, match="running without keep, which failed: no room"):
        found = meta_gradient(learner(tasks), list(model.parameters()))
    assert relative_error(found, wanted) < 1e-6
    assert learner.runner.engine == Engine(compile="pieces", method="loop")


def _no_room() -> None:
    raise OSError("no room")


@pytest.mark.usefixtures("graphs_as_they_are")
@pytest.mark.parametrize("case", [case for case in CASES if case.name != "gru"], ids=lambda case: case.name)
@pytest.mark.parametrize("method", ["vmap", "loop"])
def test_every_model_is_cut_right(case: Case, method: Any) -> None:
    model, tasks = case.build(), case.tasks()
    engines = Engine(method="loop"), Engine(method=method, compile="pieces", keep=True)
    wanted, kept = [
        meta_gradient(maml(model, case.loss, lr=case.lr, steps=2, adapt=case.adapt, engine=engine)(tasks),
                      list(model.parameters()))
        for engine in engines
    ]  # fmt: skip
    assert relative_error(kept, wanted) < 1e-9


@pytest.mark.usefixtures("graphs_as_they_are")
def test_weights_in_another_memory_format_and_hooks_that_give_another() -> None:
    model = nn.Sequential(nn.Conv2d(4, 3, 3, padding=1), nn.Tanh(), nn.Flatten(1), nn.Linear(75, 2)).double()
    first = model.get_parameter("0.weight")
    first.data = first.data.contiguous(memory_format=torch.channels_last)
    x = torch.rand(2, 4, 5, 5, 8, dtype=torch.float64)[..., ::2].movedim(-1, 2)
    tasks = Task(support=(x, torch.zeros(2, 4, 2).double()), query=(x, torch.ones(2, 4, 2).double()))
    wanted = _gradient(model, functional.mse_loss, Engine(method="loop"), tasks)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor.contiguous()):
        kept = _gradient(model, functional.mse_loss, replace(KEEP, chunk=1), tasks)
    assert relative_error(kept, wanted) < 1e-13


def test_evaluation_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewstep.engine.compiled", lambda function, examples: function)
    monkeypatch.setattr("fewstep.kept.compiled_in_two", None)
    learner = maml(nn.Linear(3, 2).double(), functional.mse_loss, lr=0.1, steps=2, engine=KEEP)
    with torch.no_grad():
        assert learner(_tasks()).shape == (4,)


def test_keep_and_segment_exclude_each_other() -> None:
    with pytest.raises(InputError, match="segment and offload keep less"):
        maml(nn.Linear(3, 2), functional.mse_loss, lr=0.1, segment=2, engine=KEEP)


@pytest.mark.filterwarnings("always::fewstep.FallbackWarning")
def test_what_cannot_be_cut_runs_without_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled_in_two(function: Any, examples: Any, late: int, failed: Any) -> Any:
        raise RuntimeError("no way to cut it")

    monkeypatch.setattr("fewstep.engine.compiled", lambda function, examples: function)
    monkeypatch.setattr("fewstep.kept.compiled_in_two", compiled_in_two)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2)).double()
    wanted = _gradient(model, functional.mse_loss, Engine(compile="pieces", chunk=2), _tasks())
    with pytest.warns(FallbackWarning, match="running without keep, which failed: no way to cut it"):
        kept = _gradient(model, functional.mse_loss, KEEP, _tasks())
    assert relative_error(kept, wanted) < 1e-14


def test_what_writes_to_its_inputs_cannot_be_cut() -> None:
    def function(x: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        x += 1
        return x.sum(), x * c

    with pytest.raises(RuntimeError, match="the model writes to a tensor of its own"):
        compiled_in_two(function, [torch.ones(3), torch.ones(3)], late=1, failed=_raised)


def test_a_last_chunk_that_is_smaller_keeps_its_own() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    wanted = _gradient(model, functional.mse_loss, Engine(method="loop"), _tasks(3))
    assert relative_error(_gradient(model, functional.mse_loss, KEEP, _tasks(3)), wanted) < 1e-14


def test_convolutions_are_kept() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Flatten(1), nn.Linear(50, 2)).double()
    x, y = torch.rand(4, 3, 1, 5, 5, dtype=torch.float64), torch.tensor([0, 1, 0]).expand(4, 3)
    tasks = Task(support=(x, y), query=(x.flip(1), y))
    wanted = _gradient(model, functional.cross_entropy, Engine(), tasks)
    kept = _gradient(model, functional.cross_entropy, Engine(compile="pieces", keep=True, method="loop"), tasks)
    assert relative_error(kept, wanted) < 1e-14


def test_kept_are_products_and_random_numbers_and_what_is_small() -> None:
    def function(x: Tensor, w: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        product = x @ w
        wide = product.exp() * torch.rand_like(product)
        row = wide.sum(0)
        return row, wide.tanh() * row * c

    x, w, c = torch.rand(80, 100), torch.rand(100, 90), torch.rand(80, 90)
    early, later = compiled_in_two(function, [x, w, c], late=1, failed=_raised)
    torch.manual_seed(3)
    row, *kept = early(x, w)
    assert sorted(tuple(part.shape) for part in kept) == [(80, 90), (80, 90), (90,)]  # neither exp nor what follows
    torch.manual_seed(3)
    wanted = function(x, w, c)
    torch.testing.assert_close((row, *later(x, w, c, *kept)), wanted)


def test_what_was_kept_is_let_go_of_in_the_backward_pass() -> None:
    model = nn.Linear(3, 2).double()
    loss = maml(model, functional.mse_loss, lr=0.1, steps=2, engine=KEEP)(_tasks()).sum()
    steps = [node for node in _nodes(loss) if "_InnerGradient" in node.name()]
    assert [callable(node.finish) for node in steps] == [True, True]
    loss.backward()
    assert [node.finish for node in steps] == [None, None]


@pytest.mark.filterwarnings("always::fewstep.FallbackWarning")
def test_what_cannot_be_compiled_later_leaves_right_what_was_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(function: Any, examples: Any) -> Any:
        raise RuntimeError("no space left")

    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    wanted = _gradient(model, functional.mse_loss, Engine(), _tasks())
    monkeypatch.setattr("fewstep.engine.compiled", compiled)  # the query gradient, after the inner steps
    with pytest.warns(FallbackWarning, match="no space left"):
        kept = _gradient(model, functional.mse_loss, KEEP, _tasks())
    assert relative_error(kept, wanted) < 1e-14


def _nodes(loss: Tensor) -> list[Any]:
    """All that autograd will run."""
    found: list[Any] = []
    waiting: list[Any] = [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.append(node)
            waiting += [after for after, _ in node.next_functions]
    return found


SCRIPT = """
import warnings, torch, fewstep
warnings.simplefilter("error", fewstep.FallbackWarning)
net = torch.nn.Linear(2, 1)
learner = fewstep.maml(net, torch.nn.functional.mse_loss, lr=0.1, engine=fewstep.Engine(compile="pieces"))
x = torch.ones(1, 3, 2)
learner(fewstep.Task(support=(x, x[..., :1]), query=(x, x[..., :1]))).sum().backward()
"""


def test_a_compilation_that_is_killed_leaves_nothing_in_the_users_cache(tmp_path: Path) -> None:
    """Otherwise half of a library is found there by all later runs, which cannot load it."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ on this machine")
    stand_in = tmp_path / "bin" / "g++"
    stand_in.parent.mkdir()
    stand_in.write_text(
        "#!/bin/bash\n"
        'for word; do case "$word" in *.main.so*) if [ -e "$KILL" ]; then\n'
        '  echo half > "${word#-o}"; kill -9 $PPID; exit 1; fi;; esac; done\n'
        f'exec {compiler} "$@"\n'
    )
    stand_in.chmod(0o755)
    flag, cache = tmp_path / "kill", tmp_path / "cache"
    named = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    environment = {**named, "PATH": f"{stand_in.parent}:{os.environ['PATH']}", "XDG_CACHE_HOME": str(cache),
                   "KILL": str(flag), "CXX": "g++"}  # fmt: skip
    flag.touch()
    killed = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, check=False)
    assert killed.returncode == -9, killed.stderr
    assert not list(cache.rglob("*.main.so"))
    flag.unlink()
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert list((cache / "fewstep" / "inductor").rglob("*.main.so"))


def _normalised(x: Tensor) -> tuple[Tensor, ...]:
    """Each column of x [n, 32] normalised, twice over."""
    variance, mean = torch.var_mean(x, 0)
    root = (variance + 1e-3).rsqrt()
    return (x - mean) * root, torch.relu(x * root)


@pytest.mark.parametrize(("rows", "times"), [(1000, 1), (10, 0)])
def test_what_belongs_to_a_channel_is_computed_once_a_channel(rows: int, times: int) -> None:
    x = torch.randn(rows, 32, dtype=torch.float64)
    graph = _traced(_normalised, [x])
    Hoist()(graph.graph)
    held = graph.graph.find_nodes(op="call_function", target=torch.ops.aten.as_strided.default)
    assert [node.args[0].target for node in held] == [torch.ops.aten.rsqrt.default] * times
    graph.recompile()
    for results in (graph(x), compiled(_normalised, [x])(x)):
        for result, wanted in zip(results, _normalised(x), strict=True):
            assert relative_error(result, wanted) < 1e-14
