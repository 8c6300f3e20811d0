"""N-way K-shot classification (Finn et al. 2017, section 5.2), whatever the pictures."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fewstep import models
from fewstep.baselines import Baseline, pretrain_on_classes
from fewstep.data.augment import Augment
from fewstep.data.decode import Form
from fewstep.data.episodes import ClassEpisodes
from fewstep.data.layouts import Split
from fewstep.data.table import ImageTable
from fewstep.distributed import from_first
from fewstep.engine import Precision
from fewstep.errors import InputError
from fewstep.functional import Loss
from fewstep.losses import summed_over_ways
from fewstep.patterns import head_of
from fewstep.progress import narrate
from fewstep.protocol import Protocol
from fewstep.recipes.base import Recipe
from fewstep.run import Run

PRETRAINED = "pre-trained on all classes, fine-tuned"
RATES = (0.01, 0.03, 0.1, 0.3, 1.0)
MANY = (600, 2_000, 10_000)


@dataclass(frozen=True, kw_only=True)
class ClassificationRecipe(Recipe):
    """The inner rate acts on the cross-entropy summed over ways, N x its mean, as in the authors' code."""

    ways: int = 5
    """Classes of a task (N)."""
    shots: int = 1
    """Support examples of each class (K)."""
    queries: int | None = None
    """Query examples of each class in training; None takes as many as shots."""
    test_queries: int | None = None
    """Query examples of each class in validation and test; None takes as many as shots, as the authors do."""
    network: Literal["conv", "mlp", "context"] = "conv"
    """Four convolutions, or fully connected layers 256-128-64-64; or the convolutions, of which nothing adapts but a
    further channel of the input."""
    filters: int = 64
    """Of each convolution."""
    pool: bool = False
    """Convolutions pool 2x2 and hand all features to the head; else they have stride 2 and hand on the mean."""
    rms_norm: bool = False
    """Bring the features of each picture to one length before the head, so that the first step goes by cosines; for
    convolutions."""
    inner_lr: float = 0.4
    pretrain_iterations: int = 20_000
    """Iterations of the baseline that is trained on all classes, 64 pictures each."""
    pretrain_precision: Precision = "full"
    """Of that training; bfloat16 takes half of the time where the processor has units for it."""

    metric: ClassVar[str] = "accuracy"
    rotate: ClassVar[bool] = False
    channels: ClassVar[int] = 1
    side: ClassVar[int] = 28
    invert: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rms_norm and self.network not in ("conv", "context"):
            raise InputError(f"--rms-norm is for --network conv, but {self.network} came; give --no-rms-norm")

    @abstractmethod
    def images(self, split: Split) -> Tensor | ImageTable:
        """The pictures of a split by class, as `ClassEpisodes` takes them."""

    @property
    def adapting(self) -> str:
        """Which parameters adapt."""
        return "context" if self.network == "context" else "~*.offset"

    @property
    def changes(self) -> Augment | None:
        """What is done to the pictures of training."""
        return None

    @property
    def form(self) -> Form:
        """What the user's own pictures become for the net."""
        return Form(self.side, self.channels, crop=True, invert=self.invert)

    @property
    def summary(self) -> str:
        return (
            f"{self.ways}-way {self.shots}-shot classification, {self.network} net: inner rate {self.inner_lr}, "
            f"inner steps {self.inner_steps}, {self.meta_batch} tasks"
        )

    def model(self) -> nn.Module:
        return self._network(self.ways)

    def _network(self, ways: int) -> nn.Module:
        if self.network == "mlp":
            return models.mlp(self.channels * self.side**2, ways, (256, 128, 64, 64), norm=True)
        conv = partial(models.conv4, ways, size=self.side, filters=self.filters, pool=self.pool,
                       rms_norm=self.rms_norm)  # fmt: skip
        if self.network == "context":
            return models.Beside(conv(channels=self.channels + 1), (1, self.side, self.side))
        return conv(channels=self.channels)

    @property
    def loss(self) -> Loss:
        return summed_over_ways

    def episodes(self, split: Split) -> ClassEpisodes:
        queries = self.queries if split == "train" else self.test_queries
        images = ImageTable.of(self.images(split)).to(self.device)
        try:
            return ClassEpisodes(
                tasks=self.meta_batch if split == "train" else 20,
                seed=self.seed_of(split),
                device=self.device,
                images=images,
                ways=self.ways,
                shots=self.shots,
                queries=self.shots if queries is None else queries,
                rotate=self.rotate,
                augment=self.changes if split == "train" else None,
            )
        except InputError as error:
            raise InputError(f"{split}: {error}") from error

    def protocols(self) -> list[Protocol]:
        test = self.episodes("test")
        counts = dict.fromkeys((test.queries, self._most_queries(test)))
        return [self._protocol(replace(test, queries=count)) for count in counts]

    def all_protocols(self, most: int | None = None) -> list[Protocol]:
        test = self.episodes("test")
        most_queries = self._most_queries(test)
        few, many = (self._protocol(replace(test, queries=n)) for n in (min(self.shots, most_queries), most_queries))
        counts = sorted({count if most is None else min(count, most) for count in MANY})
        found = []
        for base, sizes in ((few, counts[:1]), (many, counts)):
            for policy in ("batch", "support"):
                found += [replace(base, normalisation=policy, episodes=size) for size in sizes]
        last = replace(many, episodes=counts[0])
        together = [replace(last, checkpoints=self.keep)] if self.keep > 1 else []
        return [*found, *together, replace(last, permutations=self.ways)]

    def _most_queries(self, test: ClassEpisodes) -> int:
        return min(15, test.table.fewest - self.shots)

    def _protocol(self, tasks: ClassEpisodes) -> Protocol:
        about = {
            "ways": tasks.ways,
            "shots": tasks.shots,
            "queries_per_class": tasks.queries,
            "class_rotations": tasks.rotate,
            "inner_lr": self.inner_lr,
            "loss": "cross-entropy summed over ways (N x mean)",
            "evaluation_seed": self.evaluation_seed,
        }
        name = f"{tasks.queries} {'query' if tasks.queries == 1 else 'queries'} per class"
        return Protocol(name=name, tasks=tasks, about=about, episodes=self.test_episodes, steps=self.test_steps,
                        normalisation="batch")  # fmt: skip

    def baselines(self) -> list[Baseline]:
        if self.network == "context":
            return []  # what is trained on all classes has no task to tell it
        return [self.pretrained(PRETRAINED, self.pretrain_iterations)]

    def pretrained(self, name: str, iterations: int) -> Baseline:
        """The net with the body of a classifier of all training classes, to be fine-tuned."""
        settings: dict[str, Any] = {"iterations": iterations, "seed": self.seed, "head": "cosine"}
        if self.changes:
            settings["augment"] = True
        if self.pretrain_precision != "full":
            settings["precision"] = self.pretrain_precision
        train = partial(self._pretrain, iterations=iterations)
        return Baseline(name, self.initial_model, train, settings, self.test_steps, RATES)

    def _pretrain(self, model: nn.Module, run: Run, iterations: int) -> dict[str, Any]:
        """Give `model` the body of a classifier of all training classes, and a head of zeros."""

        def trained_weights() -> dict[str, Tensor]:
            narrate(f"training on all classes together first, {iterations:,} iterations, in {run.path}")
            images = ImageTable.of(self.images("train")).to(self.device)
            classifier = self.seeded(lambda: self._network(len(images)))
            pretrain_on_classes(classifier, images, iterations=iterations, seed=self.seed, rotate=self.rotate,
                                augment=self.changes, precision=self.pretrain_precision, run=run)  # fmt: skip
            return {name: value.cpu() for name, value in classifier.state_dict().items()}

        trained = from_first(trained_weights)
        head = f"{head_of(model)}."
        for name, value in model.state_dict().items():
            value.copy_(torch.zeros_like(value) if name.startswith(head) else trained[name])
        return {}
