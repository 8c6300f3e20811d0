"""The authors' own trained network, under their protocol, on the real test classes."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

import fewstep
from fewstep import models
from fewstep.data import ClassEpisodes, load_mini_imagenet
from fewstep.engine import Engine
from fewstep.errors import InputError
from fewstep.evaluate import evaluate
from fewstep.losses import summed_over_ways

ENGINE = Engine(method="loop", convolution="channels_last")
GOLDEN = "reference/finn_maml_miniimagenet_5way1shot.npz"


@pytest.fixture(scope="module")
def data() -> Path:
    folder = Path(os.environ.get("FEWSTEP_DATA", ""))
    if not (folder / GOLDEN).is_file() or not (folder / "mini_imagenet").is_dir():
        pytest.skip("FEWSTEP_DATA names no folder with mini_imagenet and the authors' weights")
    return folder


def episodes(data: Path, queries: int, tasks: int = 10) -> ClassEpisodes:
    return ClassEpisodes(images=load_mini_imagenet("test", root=data), ways=5, shots=1, queries=queries, tasks=tasks)


def learner(data: Path, dtype: torch.dtype = torch.float32) -> fewstep.Learner:
    model = models.load_authors_conv4(data / GOLDEN).to(dtype)
    return fewstep.maml(model, summed_over_ways, lr=0.01, steps=5, adapt="~*.offset", engine=ENGINE)


def naive_logits(path: Path, support: tuple[Tensor, Tensor], query: Tensor, steps: int) -> list[Tensor]:
    """The network of the golden file by hand, adapted by plain autograd, without anything of ours."""
    with np.load(path) as file:
        arrays = {name: torch.from_numpy(file[name]).double() for name in file}
    fixed = {name: value for name, value in arrays.items() if name.startswith("beta")}
    theta = {name: value.requires_grad_() for name, value in arrays.items() if name not in fixed}

    def net(x: Tensor) -> Tensor:
        for block in "1234":
            x = functional.conv2d(x, theta["conv" + block], theta["b" + block], padding=1)
            mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
            x = (x - mean) / (variance + 1e-3).sqrt() + fixed["beta" + block].reshape(-1, 1, 1)
            x = functional.max_pool2d(x.relu(), 2)
        return x.flatten(1) @ theta["w5"].T + theta["b5"]

    found = []
    for step in range(steps + 1):
        found.append(net(query).detach())
        if step < steps:
            loss = 5 * functional.cross_entropy(net(support[0]), support[1])
            gradients = torch.autograd.grad(loss, list(theta.values()))
            for name, gradient in zip(theta, gradients, strict=True):
                theta[name] = (theta[name] - 0.01 * gradient).detach().requires_grad_()
    return found


def test_logits_of_one_episode_equal_the_naive_loop(data: Path) -> None:
    (x, y), (query, query_y) = episodes(data, queries=3, tasks=1)[0]
    x, query = x.double(), query.double()  # ten steps make 1e-7 of rounding 1e-3
    naive = naive_logits(data / GOLDEN, (x[0], y[0]), query[0], 10)
    path = learner(data, torch.float64).path(fewstep.Task((x, y), (query, query_y)), 10)
    for step in (0, 1, 5, 10):
        prediction = path[step].prediction
        assert prediction is not None
        assert (prediction[0] - naive[step]).abs().max() < 1e-8
        adapted = learner(data, torch.float64).adapt((x[0], y[0]), steps=step)
        assert (adapted(query[0]) - naive[step]).abs().max() < 1e-8


@pytest.mark.parametrize(("queries", "count", "published"), [(1, 100, 0.485), (15, 20, 0.462)])
def test_accuracy_under_the_authors_protocol(data: Path, queries: int, count: int, published: float) -> None:
    """`python -m benchmarks.authors_weights` takes all episodes; these few have wide intervals."""
    result = evaluate(learner(data), episodes(data, queries), metric="accuracy", steps=10, count=count, at=[0, 10])
    before, after = result.by_step
    assert abs(before.mean - 0.2) < 0.04
    assert abs(after.mean - published) < 1.5 * after.ci95
    assert after.ci95 < 0.05


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        models.load_authors_conv4(tmp_path / "none.npz")
    (tmp_path / "bad.npz").write_bytes(b"no zip")
    with pytest.raises(InputError, match=r"bad.npz does not hold the authors' network"):
        models.load_authors_conv4(tmp_path / "bad.npz")
    np.savez(tmp_path / "other.npz", w5=np.zeros((5, 800), np.float32))
    with pytest.raises(InputError, match=r"other.npz does not hold .*conv1 to conv4"):
        models.load_authors_conv4(tmp_path / "other.npz")
