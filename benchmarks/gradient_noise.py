"""How much of a batch's meta-gradient is signal: its squared mean over its variance, between batches of tasks.

python -m benchmarks.gradient_noise [--recipe glyphs-5way-1shot] [--algorithms maml fomaml] [--weights RUN ...]

At the initial weights of the recipe, and at those of each run named.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
import tyro
from rich.console import Console

from benchmarks.workloads import origin
from fewstep import Engine, Learner, Task
from fewstep.recipes import RECIPES
from fewstep.run import Run


class Indexed(Protocol):
    """Batches of tasks by number."""

    def __getitem__(self, number: int) -> Task: ...


@dataclass(frozen=True)
class Options:
    """Of which algorithms, and where."""

    recipe: str = "glyphs-5way-1shot"
    algorithms: tuple[str, ...] = ("maml", "fomaml")
    weights: tuple[Path, ...] = ()
    """Runs of the same model, whose last weights are taken."""
    inner_lr: float = 0.1
    inner_steps: int = 3
    meta_batch: int = 4
    batches: int = 40


def main(options: Options) -> None:
    """One line for each algorithm and place."""
    console = Console()
    console.print(origin("benchmarks.gradient_noise"), highlight=False)
    for algorithm in options.algorithms:
        recipe = replace(RECIPES[options.recipe], algorithm=algorithm, inner_lr=options.inner_lr,
                         inner_steps=options.inner_steps, meta_batch=options.meta_batch)  # fmt: skip
        learner = recipe.learner()
        learner.engine = Engine(chunk=2)
        for run in (None, *options.weights):
            if run is not None:
                Run(run).restore("model.safetensors", learner)
            norm, ratio = signal_to_noise(learner, recipe.episodes("train"), options.batches)
            place = run or "the start"
            console.print(f"{algorithm}, at {place}: norm {norm:.1f}, signal to noise {ratio:.1e}", highlight=False)


def signal_to_noise(learner: Learner, episodes: Indexed, batches: int) -> tuple[float, float]:
    """The mean norm of a batch's meta-gradient; and |mean|^2 / variance, without the part of the noise in the mean."""
    rows = []
    for number in range(batches):
        learner.zero_grad()
        learner(episodes[number]).mean().backward()
        rows.append(torch.cat([p.grad.flatten() for p in learner.parameters() if p.grad is not None]))
    gradients = torch.stack(rows)
    noise = gradients.var(0).sum()
    signal = gradients.mean(0).square().sum() - noise / batches
    return float(gradients.norm(dim=1).mean()), float(signal / noise)


if __name__ == "__main__":
    main(tyro.cli(Options))
