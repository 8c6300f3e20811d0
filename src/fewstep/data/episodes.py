"""Episodes: an endless, numbered stream of batches of tasks. Batch i needs no history, only the seed and i."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fewstep.data.augment import Augment
from fewstep.data.table import ImageTable
from fewstep.errors import InputError
from fewstep.task import Task


@dataclass(frozen=True, kw_only=True)
class Episodes(ABC):
    """Batches of `tasks` tasks each: `episodes[i]` is batch i, and iterating gives 0, 1, 2, ... without end.

    Two objects with equal fields draw equal episodes, in any order, on any rank and any device: random numbers
    come from the CPU generator, seeded by `(seed, i)`.
    """

    tasks: int
    seed: int = 0
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        if self.tasks < 1:
            raise InputError(f"tasks per batch must be at least 1, but {self.tasks} came")

    @abstractmethod
    def draw(self, generator: torch.Generator) -> Task:
        """One batch of tasks, all randomness taken from `generator`."""

    def __getitem__(self, index: int) -> Task:
        if index < 0:
            raise InputError(f"episodes are numbered from 0, but {index} came")
        with torch.device("cpu"):  # where random numbers come from, whatever the default device
            return self.draw(numbered_generator(self.seed, index))

    def __iter__(self) -> Iterator[Task]:
        index = 0
        while True:
            yield self[index]
            index += 1


def numbered_generator(seed: int, index: int) -> torch.Generator:
    """A generator of its own for each pair of numbers; neighbours are unrelated."""
    digest = hashlib.blake2b(f"{seed} {index}".encode(), digest_size=8).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little") >> 1)


class Ahead:
    """`ahead[i]` is `episodes[i]`; a thread draws the next batch meanwhile, while a GPU is busy with this one.

    >>> from fewstep.data import SinusoidEpisodes
    >>> with Ahead(SinusoidEpisodes(tasks=2)) as ahead:
    ...     torch.equal(ahead[3].query[1], SinusoidEpisodes(tasks=2)[3].query[1])
    True
    """

    def __init__(self, episodes: Episodes, device: torch.device | None = None) -> None:
        """device : the GPU that "cuda" means here, which each thread has to be told"""
        self.episodes = episodes
        chosen: dict[str, Any] = {"initializer": torch.cuda.set_device, "initargs": (device,)} if device else {}
        self._pool = ThreadPoolExecutor(1, **chosen)
        self._next: tuple[int, Future[Task]] | None = None

    def __getitem__(self, index: int) -> Task:
        number, drawn = self._next or (-1, None)
        future = drawn if drawn is not None and number == index else self._drawn(index)
        self._next = index + 1, self._drawn(index + 1)
        return future.result()

    def _drawn(self, index: int) -> Future[Task]:
        return self._pool.submit(self.episodes.__getitem__, index)

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)


@dataclass(frozen=True, kw_only=True)
class ClassEpisodes(Episodes):
    """N-way K-shot classification out of a table of pictures.

    images : uint8 [classes, examples, channels, height, width], 0..255, on any device; or an `ImageTable`, whose
        classes may differ in size
    Each task takes `ways` distinct classes and of each class `shots` + `queries` distinct examples.
    With `rotate`, each class of an episode is turned by 0, 90, 180 or 270 degrees, as the MAML authors do with
    Omniglot. Pictures come as float32 in 0..1; labels 0..ways-1 (int64) are given in random order.

    augment : changes each picture at random;  views : each support picture comes so many times, and then `augment`
        leaves the first of them and all queries as they are

    support : x [tasks, ways*shots*views, channels, height, width], y [tasks, ways*shots*views];  query : likewise
    """

    images: Tensor | ImageTable
    ways: int
    shots: int
    queries: int
    rotate: bool = False
    augment: Augment | None = None
    views: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        classes = len(self.table)
        if not 1 <= self.ways <= classes:
            raise InputError(f"{self.ways} ways asked of {classes} classes; choose 1..{classes}")
        if self.shots < 1 or self.queries < 1 or self.shots + self.queries > self.table.fewest:
            raise InputError(
                f"{self.shots} shots and {self.queries} queries asked, but {self.table.smallest()} has "
                f"{self.table.fewest} examples; both must be at least 1 and together no more than that"
            )
        if self.views < 1 or (self.views > 1 and self.augment is None):
            raise InputError(f"views must be at least 1, and several need an augment, but {self.views} came")
        if self.rotate and self.table.images.shape[-1] != self.table.images.shape[-2]:
            raise InputError(f"only square pictures can be rotated, not {tuple(self.table.images.shape[-2:])}")

    @cached_property
    def table(self) -> ImageTable:
        """The pictures by class."""
        return ImageTable.of(self.images)

    def draw(self, generator: torch.Generator) -> Task:
        table, shape = self.table, (self.tasks, self.ways)
        chosen = torch.rand(self.tasks, len(table), generator=generator).topk(self.ways).indices
        numbers = torch.rand(*shape, int(table.counts.max()), generator=generator)
        absent = torch.arange(numbers.shape[2]) >= table.counts[chosen][..., None]
        picked = numbers.masked_fill(absent, -1).topk(self.shots + self.queries).indices
        turns = torch.randint(4, shape, generator=generator)
        x = table.pick(chosen[..., None], picked).to(self.device)
        if self.rotate:
            x = rotate_quarters(x, turns)
        x = x.float().div_(255)
        if self.augment is not None and self.views == 1:
            x = self.augment(x, generator)
        support, query = x[:, :, : self.shots], x[:, :, self.shots :]
        if self.augment is not None and self.views > 1:
            more = support.repeat(1, 1, self.views - 1, 1, 1, 1)
            support = torch.cat([support, self.augment(more, generator)], 2)
        y = torch.arange(self.ways, device=x.device).expand(self.tasks, self.ways)
        return Task(
            support=(support.flatten(1, 2), y.repeat_interleave(support.shape[2], dim=1)),
            query=(query.flatten(1, 2), y.repeat_interleave(self.queries, dim=1)),
        )


def rotate_quarters(x: Tensor, turns: Tensor) -> Tensor:
    """Turn x [tasks, ways, ..., side, side] by `turns` [tasks, ways] quarters, counter-clockwise. turns : on the CPU"""
    turned = x.clone()
    for quarter in (1, 2, 3):
        where = (turns == quarter).nonzero(as_tuple=True)  # on the CPU, where no GPU has to be waited for
        turned[where] = torch.rot90(x[where], quarter, (-2, -1))
    return turned
