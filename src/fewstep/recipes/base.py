"""What every experiment has: how a learner is built, trained and judged, and what it is compared with."""

from __future__ import annotations

import ast
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from fewstep import algorithms
from fewstep.baselines import Baseline
from fewstep.data.episodes import Episodes
from fewstep.data.layouts import Split
from fewstep.engine import Convolution, Engine, Precision
from fewstep.errors import InputError
from fewstep.evaluate import Evaluation, Judged, evaluate
from fewstep.functional import Loss
from fewstep.learner import Learner
from fewstep.problem import Derivative
from fewstep.protocol import Protocol
from fewstep.run import Run
from fewstep.train import Step, Training


@dataclass(frozen=True, kw_only=True)
class Recipe(ABC):
    """One experiment. Each field is an option of `fewstep train`."""

    seed: int = 0
    """Seed of the initial weights and of the training tasks."""
    init_from: Path | None = None
    """A run with whose last weights to begin, or a file of weights; a head of other ways is new."""
    iterations: int = 60_000
    """Meta-updates in all."""
    meta_batch: int = 32
    """Tasks per meta-update."""
    meta_lr: float = 1e-3
    """Adam's learning rate for the meta-parameters (beta)."""
    schedule: Literal["constant", "cosine"] = "constant"
    """How the meta learning rate goes over the iterations."""
    clip: float | None = None
    """Cut each element of the meta-gradient to this size."""
    algorithm: str = "maml"
    """The method, one of `fewstep list algorithms`."""
    algorithm_options: str = ""
    """The method's own options, such as anneal=500,step_norms=False; its page in the documentation tells them."""
    inner_lr: float = 0.01
    """Learning rate of the inner loop (alpha)."""
    inner_steps: int = 1
    """Inner steps in training."""
    test_steps: int = 10
    """Inner steps in evaluation."""
    adapt: str = ""
    """Which parameters adapt, such as head.* or ~*.offset for all but offsets; the recipe's own unless given."""
    derivative: Derivative = "exact"
    """Of the inner gradient: exact is MAML, none is first-order MAML, finite_difference is HF-MAML."""
    plan: bool = True
    """Time ways to compute on the first tasks, and take the fastest of those that the next four options allow."""
    method: Literal["vmap", "loop"] | None = None
    """Tasks batched, or one by one; None leaves it to the plan, and is vmap without one."""
    chunk: int | None = None
    """Tasks at a time, fewer need less memory; None leaves it to the plan, and is all of them without one."""
    compile: Literal["no", "pieces", "step"] | None = None
    """What to compile; None leaves it to the plan, and is no without one."""
    convolution: Convolution | None = None
    """How convolutions run; None leaves it to the plan, and is native without one."""
    precision: Precision = "full"
    """Of the forward passes and their gradients; never left to the plan."""
    plan_seconds: float = 120.0
    """About how long the plan may take."""
    memory_limit: float | None = None
    """GiB that a meta-step may take beyond parameters and tasks; only the plan can keep to it."""
    device: str = "cpu"
    """Device to compute on."""
    check_every: int = 1000
    """Iterations between validations; each ends with a checkpoint."""
    log_every: int = 100
    """Iterations between logged losses."""
    keep: int = 5
    """How many of the best validated weights, and of the last, to keep; some protocols have them answer together."""
    validation_episodes: int = 200
    """Tasks of each validation."""
    test_episodes: int = 600
    """Tasks of the evaluation."""
    evaluation_seed: int = 0
    """Seed of the validation and test tasks; runs with the same one are judged by the same tasks."""

    metric: ClassVar[str]

    def __post_init__(self) -> None:
        counts = ("iterations", "meta_batch", "test_steps", "check_every", "log_every", "keep",
                  "validation_episodes", "test_episodes")  # fmt: skip
        for name in counts:
            least = 2 if name.endswith("episodes") else 1  # an interval needs two
            if getattr(self, name) < least:
                raise InputError(f"--{name.replace('_', '-')} must be at least {least}, but {getattr(self, name)} came")
        for name in ("seed", "evaluation_seed"):
            if not 0 <= getattr(self, name) < 2**60:
                raise InputError(f"--{name.replace('_', '-')} must be from 0 to 2^60, but {getattr(self, name)} came")
        if not 0 < self.meta_lr < inf:
            raise InputError(f"--meta-lr must be above 0 and finite, but {self.meta_lr} came")
        if not 0 < self.plan_seconds < inf:
            raise InputError(f"--plan-seconds must be above 0 and finite, but {self.plan_seconds} came")
        if self.memory_limit is not None and not (0 < self.memory_limit < inf and self.plan):
            raise InputError(f"--memory-limit must be above 0, and goes with a plan; {self.memory_limit} came")
        if self.algorithm not in algorithms.__all__:
            known = ", ".join(algorithms.__all__)
            raise InputError(f"--algorithm must be one of {known}, but {self.algorithm!r} came")
        if self.derivative != "exact" and self.algorithm in ("fomaml", "hf_maml", "reptile"):
            raise InputError(f"--derivative is what makes {self.algorithm} what it is; leave it out, or take maml")
        own_options(self.algorithm, self.algorithm_options)
        self.engine  # noqa: B018  raises where the choices exclude each other
        if self.clip is not None and not self.clip > 0:
            raise InputError(f"--clip must be above 0, but {self.clip} came")
        if not usable(self.device):
            raise InputError(f"--device {self.device!r} cannot be used here; choose another, such as cpu")

    @property
    @abstractmethod
    def summary(self) -> str:
        """The experiment in one line."""

    @abstractmethod
    def model(self) -> nn.Module:
        """The network at its initialisation; drawn from PyTorch's global generator."""

    @property
    @abstractmethod
    def loss(self) -> Loss:
        """The inner and the outer loss, with its reduction."""

    @abstractmethod
    def episodes(self, split: Split) -> Episodes:
        """The tasks for training, for validation and for test."""

    @abstractmethod
    def protocols(self) -> list[Protocol]:
        """How the learner is judged, the paper's own way first."""

    def all_protocols(self, most: int | None = None) -> list[Protocol]:
        """Every way in which people judge such learners, with at most so many episodes."""
        return [replace(each, episodes=min(each.episodes, most or each.episodes)) for each in self.protocols()]

    @abstractmethod
    def baselines(self) -> list[Baseline]:
        """What the learner is compared with."""

    @property
    def adapting(self) -> str:
        """Which parameters adapt, unless `adapt` says it; of baselines in any case."""
        return "*"

    @property
    def begun(self) -> str:
        """What training begins with, in words, if not with new weights."""
        return f"begun with {self.init_from}" if self.init_from else ""

    @property
    def classes(self) -> dict[str, list[str]]:
        """The classes of each split, where a folder of the user's decides about them: a run holds on to them."""
        return {}

    def first_model(self, run: Run) -> nn.Module:
        """The network that meta-training begins with; what it takes to train one is kept in the run."""
        return self.initial_model()

    def seeded(self, build: Callable[[], nn.Module]) -> nn.Module:
        """The network that `build` makes with the recipe's seed, on its device."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return build().to(self.device)

    @property
    def choices(self) -> dict[str, Any]:
        """The fields of the engine that are chosen by hand."""
        fields = {name: getattr(self, name) for name in ("method", "chunk", "compile", "convolution")}
        if self.method == "loop" and self.chunk == type(self).chunk:
            del fields["chunk"]  # the recipe's own, for "vmap"
        return {name: value for name, value in fields.items() if value is not None}

    @property
    def engine(self) -> Engine:
        """How tasks are computed without a plan."""
        return Engine(**self.choices, precision=self.precision)

    def initial_model(self) -> nn.Module:
        """The network before training."""
        return self.seeded(self.model)

    def learner(self, model: nn.Module | None = None) -> Learner:
        """The learner before training; of another network than the one at its initialisation if there is any."""
        build: Callable[..., Learner] = getattr(algorithms, self.algorithm)
        derivative = {} if self.derivative == "exact" else {"derivative": self.derivative}
        own = own_options(self.algorithm, self.algorithm_options)
        model = model or self.initial_model()
        return build(model, self.loss, lr=self.inner_lr, steps=self.inner_steps,
                     adapt=self.adapt or self.adapting, engine=self.engine, **derivative,
                     **{**self.learner_options, **own})  # fmt: skip

    @property
    def learner_options(self) -> dict[str, Any]:
        """What a learner of this network needs beside the fields, whatever the method."""
        return {}

    def training(self) -> Training:
        """The settings of the outer loop."""
        return Training(iterations=self.iterations, lr=self.meta_lr, schedule=self.schedule, clip=self.clip,
                        check_every=self.check_every, log_every=self.log_every, keep=self.keep)  # fmt: skip

    def check(self, learner: Learner, episodes: Episodes) -> None:
        """Raise `InputError` where the learner cannot be trained on these tasks."""
        learner.known(episodes[0])

    def step_of(self, learner: Learner, adam: Step) -> Step:
        """What takes an iteration of training; `adam` is a step along the learner's meta-gradient."""
        return adam

    def seen_by(self, learner: Learner) -> Judged:
        """What of a learner is judged."""
        return learner

    def validate(self, learner: Learner) -> Evaluation:
        """Judge the learner on held-out tasks."""
        episodes = self.episodes("validation")
        return evaluate(
            self.seen_by(learner), episodes, metric=self.metric, steps=self.test_steps, count=self.validation_episodes
        )

    def seed_of(self, split: Split) -> int:
        """Different tasks in each split; those to judge by do not depend on the training seed."""
        return {
            "train": 3 * self.seed,
            "validation": 3 * self.evaluation_seed + 1,
            "test": 3 * self.evaluation_seed + 2,
        }[split]


def own_options(algorithm: str, text: str) -> dict[str, Any]:
    """What "name=value,..." says of a method's own options; `InputError` where it has none of that name.

    >>> own_options("maml_pp", "anneal=500, step_norms=False")
    {'anneal': 500, 'step_norms': False}
    """
    taken = {"model", "loss", "lr", "steps", "adapt", "options"}
    known = [name for name in inspect.signature(getattr(algorithms, algorithm)).parameters if name not in taken]
    found: dict[str, Any] = {}
    for pair in filter(None, text.split(",")):
        name, _, value = map(str.strip, pair.partition("="))
        if name not in known or not value:
            there = ", ".join(known) or "none"
            raise InputError(
                f"--algorithm-options takes NAME=VALUE,..., but {pair.strip()!r} came; {algorithm} has: {there}"
            )
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):  # a plain word
            found[name] = value
    return found


def usable(device: str) -> bool:
    """Whether a tensor can be made on this device here."""
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError):
        return False
    return True
