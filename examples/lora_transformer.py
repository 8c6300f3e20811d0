"""A large model: few-shot text classification with a frozen transformer of Hugging Face, adapted by low-rank adapters.

Each task has topics of its own, known by four words each, which half the words of a text are drawn from. Tasks adapt
the adapters and the head. The base, GPT-2 with random weights (so that nothing is downloaded), is frozen, and kept once
for all tasks. Needs `pip install transformers`. With `--size base` it has GPT-2's real shape, 124 million parameters.

    python examples/lora_transformer.py --iterations 30
    python examples/lora_transformer.py --size base --lr 0.01 --iterations 1
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
import transformers
import tyro
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fewstep
from fewstep.engine import Engine
from fewstep.footprint import footprint

SHAPES: dict[str, dict[str, Any]] = {"tiny": {"n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 500}, "base": {}}
T = TypeVar("T")


class Classifier(nn.Module):
    """GPT-2 and a linear head on the mean of its last states. tokens [K, length] -> [K, ways]"""

    def __init__(self, size: str, ways: int) -> None:
        super().__init__()
        # Its fused attention would work as well, but has no second derivative: fewstep takes the math kernel and warns.
        options: dict[str, Any] = {
            "attn_implementation": "eager",
            "use_cache": False,
            "bos_token_id": 0,
            "eos_token_id": 0,
        }
        config = transformers.GPT2Config(**SHAPES[size], **options)
        self.body = transformers.GPT2Model(config).train(False)  # without dropout
        self.head = nn.Linear(config.n_embd, ways)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(tokens).last_hidden_state.mean(1))
        return logits


@dataclass(frozen=True, kw_only=True)
class Topics(fewstep.data.Episodes):
    """tokens [tasks, 4 texts for each topic, length] and the topics, the labels [tasks, as many]"""

    ways: int = 4
    length: int = 12
    vocabulary: int = 500

    def draw(self, generator: torch.Generator) -> fewstep.Task:
        words = torch.randint(self.vocabulary, (self.tasks, self.ways, 4), generator=generator)
        return fewstep.Task(self._texts(words, generator), self._texts(words, generator))

    def _texts(self, words: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        labels = torch.arange(4 * self.ways).remainder(self.ways)
        shape = (self.tasks, len(labels), self.length)
        topical = words[:, labels].gather(2, torch.randint(4, shape, generator=generator))
        common = torch.randint(self.vocabulary, shape, generator=generator)
        texts = torch.where(torch.rand(shape, generator=generator) < 0.5, topical, common)
        return texts, labels.expand(self.tasks, -1).clone()


def measured(part: str, run: Callable[[], T]) -> T:
    """Run it, and print how far the process grew at its highest, where Linux can say so, and its processor time."""
    results: list[T] = []
    start = time.process_time()
    grown = footprint(lambda: results.append(run()), torch.device("cpu"))
    print(f"{part:48} {(grown or 0) / 2**20:8.1f} MiB {time.process_time() - start:8.2f} s")
    return results[0]


def main(
    iterations: int = 30,
    size: Literal["tiny", "base"] = "tiny",
    tasks: int = 8,
    steps: int = 3,
    length: int = 12,
    rank: int = 8,
    lr: float = 0.1,
    method: Literal["vmap", "loop"] = "vmap",
    chunk: int | None = None,
    compile: bool = False,
) -> None:
    """Measure the memory of a meta-step, part by part; train; adapt to new tasks."""
    torch.manual_seed(0)
    episodes, new = (Topics(tasks=tasks, length=length, seed=seed) for seed in (0, 1))
    model = Classifier(size, episodes.ways)
    fewstep.models.add_lora(model, "body.*", rank=rank)
    model.head.requires_grad_(True)
    engine = Engine(method=method, chunk=chunk, compile="pieces" if compile else "no")
    learner = fewstep.maml(model, cross_entropy, lr=lr, steps=steps, engine=engine)
    tell_memory(learner, episodes[0])
    optimizer = torch.optim.Adam([value for value in learner.parameters() if value.requires_grad], lr=1e-3)
    for step in range(iterations):
        optimizer.zero_grad()
        learner(episodes[step]).mean().backward()
        optimizer.step()
    path = learner.path(new[0])
    before, after = path[0].loss.mean(), path[-1].loss.mean()
    print(f"query loss of {tasks} new tasks: {before:.3f} before adaptation, {after:.3f} after {steps} steps")


def tell_memory(learner: fewstep.Learner, tasks: fewstep.Task) -> None:
    """Print what a meta-step holds, and what its parts need beside that while they run."""
    values = list(learner.parameters())
    frozen, adapted = (sum(v.nbytes for v in values if v.requires_grad is own) / 2**20 for own in (False, True))
    kept = f"the same, of {tasks.size} tasks and {learner.steps} steps"
    print(f"{'the frozen base, once':48} {frozen:8.1f} MiB")
    print(f"{'adapters and head, once':48} {adapted:8.1f} MiB")
    print(f"{kept:48} {adapted * tasks.size * learner.steps:8.1f} MiB")
    measured("an inner step: the gradient of the support loss", lambda: learner.path(tasks, steps=1))
    loss = measured("forward pass: all steps, and the query gradient", lambda: learner(tasks).mean())
    measured("backward pass: a Hessian-vector product a step", lambda: loss.backward())
    learner.zero_grad()


if __name__ == "__main__":
    tyro.cli(main)
