"""Pre-training without meta-learning: one net on all tasks, or one classifier of all training classes."""

from __future__ import annotations

import time
from contextlib import nullcontext
from math import cos, pi
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fewstep.data.augment import Augment
from fewstep.data.episodes import Episodes, numbered_generator, rotate_quarters
from fewstep.data.table import ImageTable
from fewstep.engine import Precision
from fewstep.engine_checks import warn_if_slow
from fewstep.errors import InputError
from fewstep.functional import Loss
from fewstep.patterns import linear_head
from fewstep.progress import progress
from fewstep.run import Run
from fewstep.task import Task


def pretrain_on_tasks(model: nn.Module, loss: Loss, episodes: Episodes, *, iterations: int, lr: float = 1e-3) -> None:
    """Train `model` by Adam on the examples of all tasks at once, as if they were one (paper, section 5.1)."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for step in range(iterations):
        x, y = pooled(episodes[step])
        optimizer.zero_grad()
        loss(model(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def pooled(tasks: Task) -> tuple[Tensor, Tensor]:
    """All examples of all tasks as one `(x, y)` batch without a task axis."""
    (support_x, support_y), (query_x, query_y) = tasks
    x, y = torch.cat([support_x, query_x], 1), torch.cat([support_y, query_y], 1)
    return x.flatten(0, 1), y.flatten(0, 1)


class CosineHead(nn.Linear):
    """Ten times the cosine between features and the weight of each class, which leaves features that tell new classes
    apart by their direction (Chen et al. 2019, Baseline++).

    features [batch, inputs] -> logits [batch, classes]

    >>> head = CosineHead(nn.Linear(2, 1, bias=False))
    >>> _ = nn.init.constant_(head.weight, 3.0)
    >>> head(torch.tensor([[5.0, 5.0], [-1.0, 1.0]])).flatten()
    tensor([10.,  0.], grad_fn=<ViewBackward0>)
    """

    def __init__(self, like: nn.Linear) -> None:
        super().__init__(like.in_features, like.out_features, bias=False)
        self.weight = nn.Parameter(functional.normalize(like.weight.detach()))

    def forward(self, features: Tensor) -> Tensor:
        return 10 * functional.linear(functional.normalize(features), functional.normalize(self.weight))


def pretrain_on_classes(
    model: nn.Module,
    images: Tensor | ImageTable,
    *,
    iterations: int,
    seed: int,
    rotate: bool = False,
    augment: Augment | None = None,
    batch: int = 64,
    lr: float = 2e-3,
    precision: Precision = "full",
    run: Run | None = None,
    save_every: int = 500,
) -> None:
    """Train `model` by Adam to tell all classes apart; its last linear layer becomes a `CosineHead`. The rate rises to
    `lr` for a tenth of the iterations, and falls to 0 along a cosine.

    images : uint8 [classes, examples, channels, height, width], or an `ImageTable`
    model : [batch, ...] -> [batch, classes]
    rotate : turn each picture by a random number of quarters, as the episodes do with classes
    augment : changes each picture
    precision : "bfloat16" computes features in it where autocast says so, which takes half of the time where the
        processor has units for it (AMX), and many times as long where it has none
    run : a folder of its own, where it is kept each `save_every` iterations from what the same training goes on to the
        same result; `InputError` where the checkpoint of `fewstep.train` is there
    """
    if precision == "bfloat16":
        warn_if_slow(next(model.parameters()).device)
    table = ImageTable.of(images)
    name, head = linear_head(model)
    model.set_submodule(name, CosineHead(head))
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    model.train()
    first = table.pick(torch.arange(len(table)), torch.zeros(len(table), dtype=torch.int64))
    pictures = [len(table), int(table.counts.sum()), int(first.long().sum())]
    net = [tuple(value.shape) for value in model.state_dict().values()]
    settings = {"iterations": iterations, "seed": seed, "rotate": rotate, "augment": repr(augment), "batch": batch,
                "lr": lr, "precision": precision, "pictures": pictures, "net": net}  # fmt: skip
    done, seconds = _resume(model, optimizer, run, settings) if run else (0, 0.0)
    started = time.monotonic() - seconds
    with progress(iterations, done=done) if run else nullcontext(lambda event: None) as report:
        for step in range(done, iterations):
            x, label = _drawn(table, batch, numbered_generator(seed, step), rotate, augment)
            through = (step + 1) / (iterations + 1)
            optimizer.param_groups[0]["lr"] = lr * min(10 * through, 1) * (1 + cos(pi * through)) / 2
            optimizer.zero_grad()
            with torch.autocast(x.device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                logits = model(x)
            loss = functional.cross_entropy(logits.float(), label.to(x.device))
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if run and (step + 1) % save_every == 0:
                where = {"step": step + 1, "seconds": round(time.monotonic() - started, 2)}
                run.save_state({**where, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                                "random": torch.get_rng_state(), "settings": settings})  # fmt: skip
                report({**where, "loss": loss.item()})


def _drawn(table: ImageTable, batch: int, generator: torch.Generator, rotate: bool,
           augment: Augment | None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Pictures of any classes, and what these are."""
    label = torch.randint(len(table), (batch,), generator=generator)
    x = table.pick(label, torch.randint(1 << 40, (batch,), generator=generator) % table.counts[label])
    if rotate:
        x = rotate_quarters(x[None], torch.randint(4, (1, batch), generator=generator))[0]
    x = x.float() / 255
    x = augment(x, generator) if augment else x
    return x.contiguous(memory_format=torch.channels_last), label  # convolutions that pool take 0.7 of the time


def _resume(
    model: nn.Module, optimizer: torch.optim.Optimizer, run: Run, settings: dict[str, Any]
) -> tuple[int, float]:
    """Set all to where a training with the same settings stood: after so many iterations and seconds."""
    state = run.load_state()
    if state is not None and "settings" not in state:
        raise InputError(f"{run.path} holds the checkpoint of another kind of training; give another folder")
    if state is None or state["settings"] != settings:
        return 0, 0.0
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"])
    return state["step"], state["seconds"]
