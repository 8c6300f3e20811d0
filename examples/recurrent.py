"""A recurrent net: a GRU that learns to foretell a wave of a new frequency from five short pieces of it.

`vmap` has no rule for recurrent layers, so the tasks are taken one by one with `engine="loop"`. On a CUDA device the
recurrent layers of cuDNN have no second derivative: take `fewstep.hf_maml` there.

    python examples/recurrent.py --iterations 200
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import tyro
from torch import Tensor, nn
from torch.nn.functional import mse_loss

import fewstep


class NextValue(nn.Module):
    """The value that follows a sequence. x [K, time, 1] -> [K, 1]"""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(1, 16, batch_first=True)
        self.head = nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.gru(x)
        value: Tensor = self.head(states[:, -1])
        return value


@dataclass(frozen=True, kw_only=True)
class Waves(fewstep.data.Episodes):
    """sin(w t + phase), each task with a frequency w of its own, each sequence with a phase of its own.

    x [tasks, 5, time, 1], y [tasks, 5, 1], the value that comes next
    """

    time: int = 6

    def draw(self, generator: torch.Generator) -> fewstep.Task:
        frequency = 0.3 + 2.2 * torch.rand(self.tasks, 1, 1, generator=generator)
        phase = 2 * math.pi * torch.rand(self.tasks, 10, 1, generator=generator)
        waves = torch.sin(frequency * torch.arange(self.time + 1) + phase)[..., None]
        x, y = waves[:, :, :-1], waves[:, :, -1]
        return fewstep.Task(support=(x[:, :5], y[:, :5]), query=(x[:, 5:], y[:, 5:]))


def main(iterations: int = 200) -> None:
    """Train for some iterations, then adapt to waves that were not trained on."""
    torch.manual_seed(0)
    learner = fewstep.maml(NextValue(), mse_loss, lr=0.1, steps=2, engine="loop")
    optimizer = torch.optim.Adam(learner.parameters(), lr=3e-3)
    episodes = Waves(tasks=4, seed=0)
    for step in range(iterations):
        optimizer.zero_grad()
        learner(episodes[step]).mean().backward()
        optimizer.step()
    path = learner.path(Waves(tasks=50, seed=1)[0])
    before, after = path[0].loss.mean(), path[-1].loss.mean()
    print(
        f"mean squared error on 50 new waves: {before:.3f} before adaptation, {after:.3f} after {len(path) - 1} steps"
    )


if __name__ == "__main__":
    tyro.cli(main)
