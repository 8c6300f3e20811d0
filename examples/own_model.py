"""A model, a loss and a batch of your own: regression that says how sure it is, from readings of known noise.

Each task is a line that was measured with noise of a size that differs from reading to reading. The model gives a mean
and a log-variance, the batch is a dict, and `loss(model, batch)` is a Gaussian negative log-likelihood.

    python examples/own_model.py --iterations 300
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import tyro
from torch import Tensor, nn

import fewstep


class Curve(nn.Module):
    """A shared body, and two heads: mean and log-variance. x [K, 1] -> [K, 1] each."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh())
        self.mean, self.log_variance = nn.Linear(32, 1), nn.Linear(32, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(x)
        return self.mean(features), self.log_variance(features)


def likelihood(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """-log N(y; mean, variance + noise^2), averaged over one task's readings."""
    mean, log_variance = model(batch["x"])
    variance = log_variance.exp() + batch["noise"].square()
    value: Tensor = ((batch["y"] - mean).square() / variance + variance.log()).mean() / 2
    return value


@dataclass(frozen=True, kw_only=True)
class NoisyLines(fewstep.data.Episodes):
    """Lines of random slope and offset: a dict of x, y and noise, each [tasks, 10, 1]."""

    def draw(self, generator: torch.Generator) -> fewstep.Task:
        slope, offset = torch.randn(2, self.tasks, 1, 1, generator=generator)
        support, query = (self._readings(slope, offset, generator) for _ in range(2))
        return fewstep.Task(support, query)

    def _readings(self, slope: Tensor, offset: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        x, noise = 4 * torch.rand(2, self.tasks, 10, 1, generator=generator)
        noise = noise / 8
        y = slope * (x - 2) + offset + noise * torch.randn(noise.shape, generator=generator)
        return {"x": x - 2, "y": y, "noise": noise}


def main(iterations: int = 300) -> None:
    """Train for some iterations, then adapt to tasks that were not trained on."""
    torch.manual_seed(0)
    learner = fewstep.maml(Curve(), likelihood, lr=0.05, steps=3)
    optimizer = torch.optim.Adam(learner.parameters(), lr=1e-3)
    episodes = NoisyLines(tasks=8, seed=0)
    for step in range(iterations):
        optimizer.zero_grad()
        learner(episodes[step]).mean().backward()
        optimizer.step()
    path = learner.path(NoisyLines(tasks=200, seed=1)[0])
    before, after = path[0].loss.mean(), path[-1].loss.mean()
    print(f"query loss of 200 new tasks: {before:.3f} before adaptation, {after:.3f} after {len(path) - 1} steps")


if __name__ == "__main__":
    tyro.cli(main)
