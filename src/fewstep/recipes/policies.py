"""Reinforcement learning (Finn et al. 2017, section 5.3): what all worlds have in common."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from math import gcd
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fewstep.baselines import Baseline
from fewstep.data.episodes import Episodes
from fewstep.data.layouts import Split
from fewstep.errors import InputError
from fewstep.evaluate import Judged
from fewstep.functional import Loss
from fewstep.learner import Learner, last_step
from fewstep.protocol import Protocol
from fewstep.recipes.base import Recipe
from fewstep.recipes.policy_baselines import policy_baselines
from fewstep.rl import (
    TRPO,
    Ascent,
    EnvironmentEpisodes,
    Explorer,
    InContext,
    Policy,
    ProximalPenalty,
    RecurrentPolicy,
    TrustRegion,
    policy_of,
)
from fewstep.rl.environments import Environment, Told
from fewstep.rl.sampling import SamplingCorrection
from fewstep.rl.surrogates import INNER, Clipped, likelihood_ratio
from fewstep.starts import HeadStart
from fewstep.task import Task
from fewstep.train import Step
from fewstep.updates import Slowed


@dataclass(frozen=True, kw_only=True)
class PolicyRecipe(Recipe):
    """A policy 100-100, REINFORCE inside and TRPO outside. At test, steps beyond those in training are shorter."""

    iterations: int = 500
    meta_batch: int = 40
    inner_lr: float = 0.1
    test_steps: int = 3
    trajectories: int = 20
    """Trajectories of a task before each inner step, and after the last."""
    later_rate: float = 0.5
    """At test, the rate of steps beyond those in training, as a part of the inner rate."""
    test_trajectories: int = 20
    """The same in evaluation."""
    horizon: int = 200
    """Steps of a trajectory at most."""
    skip_failures: bool = False
    """Training goes on without tasks in which the environment raises, gives NaN or never ends; else they stop it."""
    step_limit: float | None = 300.0
    """Seconds that the environment may take for a step of all trajectories; a task that takes longer has failed."""
    discount: float = 0.99
    """Of later rewards (gamma)."""
    decay: float = 1.0
    """Of what is credited to an action later on (lambda of generalised advantages); below 1: less variance, a bias."""
    surrogate: Literal["reinforce", "lvc", "dice"] = "reinforce"
    """The inner loss; ppo has its own, which goes by how likely actions have become."""
    correction: float = 0.0
    """How much it counts what is learned from what the policy does before adaptation (E-MAML's is 1)."""
    outer: Literal["trpo", "ppo", "adam"] = "trpo"
    """How the meta-parameters move: the paper's TRPO; or Adam, in several epochs of a clipped loss, or in one step."""
    epochs: int = 5
    """Steps of ppo on what was lived through."""
    ratio_clip: float = 0.2
    """How far ppo follows an action's probability, as a part of what it was (ProMP's is 0.3)."""
    kl_penalty: float = 0.0
    """How much ppo counts that the policy before adaptation moves away from the one that acted (ProMP's is 0.0005)."""
    delta: float = 0.01
    """The most that a meta-update of trpo may change the adapted policies (KL divergence)."""
    conjugate_steps: int = 10
    """Of conjugate gradient, for the direction of trpo; fewer are nearer to the plain gradient, and fit less noise."""
    damping: float = 1e-2
    """Added to the curvature of that."""
    stride: int = 11
    """The divergence's curvature is taken from one of so many steps lived through."""
    inner_stride: int = 11
    """The inner steps' part in it, in the same way; 1 is exact, and takes longer."""
    check_every: int = 10
    log_every: int = 1
    validation_episodes: int = 40
    test_episodes: int = 40
    pretrain_iterations: int = 500
    """Iterations of the baselines that are trained on all tasks."""
    recurrent_iterations: int = 0
    """Iterations of RL^2, a recurrent policy that adapts by its memory, as one more baseline; 0 leaves it out."""
    first_order_iterations: int = 0
    """Iterations of first-order MAML, as one more baseline; 0 leaves it out."""
    plan: bool = False
    chunk: int | None = 5
    """Tasks at a time in learning; fewer stay in the cache."""

    metric: ClassVar[str] = "return"
    has_oracle: ClassVar[bool] = True
    """Whether a policy can be told what the task is."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("trajectories", "test_trajectories", "horizon"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} must be at least 1, but {getattr(self, name)} came")
        for name in ("discount", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"--{name} must be from 0 to 1, but {getattr(self, name)} came")
        if self.plan:
            raise InputError("engines are not planned for policies yet; choose with --method, --chunk and --compile")
        for name in ("pretrain_iterations", "recurrent_iterations", "first_order_iterations"):
            if getattr(self, name) < 0:
                raise InputError(f"--{name.replace('_', '-')} must be at least 0, but {getattr(self, name)} came")
        if self.first_order_iterations and (self.derivative == "none" or self.algorithm == "fomaml"):
            raise InputError("--first-order-iterations is for comparison, but the run itself is first-order MAML")
        if self.correction and self.meta_batch < 2:
            raise InputError("--correction compares tasks with each other: --meta-batch must be at least 2")
        if self.correction and self.kl_penalty:
            raise InputError("--correction and --kl-penalty are outer objectives of their own; leave one of them out")
        if self.epochs < 1:
            raise InputError(f"--epochs must be at least 1, but {self.epochs} came")
        if not 0 < self.later_rate <= 1:
            raise InputError(f"--later-rate must be above 0 and at most 1, but {self.later_rate} came")
        of_ppo = ["epochs", "ratio_clip", "kl_penalty"]
        idle = {"trpo": ["meta_lr", "schedule", "clip", *of_ppo], "ppo": ["surrogate"], "adam": of_ppo}[self.outer]
        idle = [name for name in idle if not (self.recurrent_iterations and name in ("meta_lr", "epochs"))]  # of RL^2
        known = {field.name: field.default for field in fields(self)}
        if changed := [name for name in idle if getattr(self, name) != known[name]]:
            option, value, default = f"--{changed[0].replace('_', '-')}", getattr(self, changed[0]), known[changed[0]]
            raise InputError(
                f"{option} {value} has no part in --outer {self.outer}; leave it out, or give {option} {default} where "
                "the recipe brings it along"
            )
        self.region  # noqa: B018  raises where its settings are wrong
        if self.outer == "trpo":
            for name in ("stride", "inner_stride"):
                if gcd(value := getattr(self, name), self.trajectories) > 1:
                    about = f"--{name.replace('_', '-')} {value} and --trajectories {self.trajectories}"
                    raise InputError(f"{about} have a common divisor")

    @property
    def summary(self) -> str:
        return (
            f"{self.world}, {self.inner_surrogate} inside and {self.outer} outside: inner rate {self.inner_lr}, "
            f"{self.meta_batch} tasks, {self.trajectories} trajectories"
        )

    @property
    def inner_surrogate(self) -> str:
        """The loss of the inner step: where PPO goes away from the policy that acted, its ratio is what counts."""
        return "likelihood_ratio" if self.outer == "ppo" else self.surrogate

    @property
    @abstractmethod
    def world(self) -> str:
        """The environment, in a few words."""

    @property
    @abstractmethod
    def environment(self) -> Environment:
        """The environment in which it is trained."""

    def environment_of(self, split: Split) -> Environment:
        """The environment whose tasks are those of a split."""
        return self.environment

    @property
    def region(self) -> TrustRegion:
        """How far a meta-update goes."""
        return TrustRegion(delta=self.delta, iterations=self.conjugate_steps, damping=self.damping, stride=self.stride,
                           inner_stride=self.inner_stride)  # fmt: skip

    def model(self) -> nn.Module:
        return policy_of(self.environment)

    @property
    def loss(self) -> Loss:
        return Clipped(self.ratio_clip) if self.outer == "ppo" else likelihood_ratio

    @property
    def learner_options(self) -> dict[str, Any]:
        return {"inner_loss": INNER.get(self.inner_surrogate, likelihood_ratio), "stream": True}

    @property
    def outer_objective(self) -> tuple[str, Callable[[Any, Task], Tensor]] | None:
        """What is minimised in place of the loss after adaptation, and the option that wants it."""
        if self.correction:
            return "correction", SamplingCorrection(self.correction)
        return ("kl-penalty", ProximalPenalty(self.kl_penalty)) if self.kl_penalty else None

    def learner(self, model: nn.Module | None = None) -> Learner:
        learner = super().learner(model)
        if outer := self.outer_objective:
            name, objective = outer
            if learner.outer is not last_step:
                raise InputError(f"--algorithm {self.algorithm} has its own outer objective; leave out --{name}")
            learner.outer = objective
            learner.engine = learner.engine  # what it does is another function now
        return learner

    def check(self, learner: Learner, episodes: Episodes) -> None:
        if self.outer == "trpo" and self.compile == "step":  # it takes the learner's parts, never a whole meta-step
            raise InputError("--compile step has no part in --outer trpo; give --compile pieces")
        if isinstance(learner.start, HeadStart):
            raise InputError(
                f"--algorithm {self.algorithm} starts the head by classes, which policies lack; take another"
            )
        self.step_of(learner, lambda tasks, lr: torch.zeros(()))

    def episodes(self, split: Split) -> EnvironmentEpisodes:
        tasks = self.meta_batch if split == "train" else 20
        return EnvironmentEpisodes(
            tasks=tasks, seed=self.seed_of(split), device=self.device, environment=self.environment_of(split)
        )

    def step_of(self, learner: Learner, adam: Step) -> Step:
        explorer = self.explorer(learner, self.environment, self.trajectories)
        if self.outer != "trpo":
            return Ascent(explorer, adam, self.epochs if self.outer == "ppo" else 1)
        return TRPO(explorer, self.region)

    def explorer(self, learner: Learner, world: Environment, trajectories: int) -> Explorer:
        """Gives a learner what it lives through in a world."""
        return Explorer(learner, world, trajectories=trajectories, discount=self.discount, decay=self.decay,
                        skip_failures=self.skip_failures, limit=self.step_limit)  # fmt: skip

    def seen_by(self, learner: Learner) -> Judged:
        policy, world = learner.model, self.environment
        assert isinstance(policy, Policy)
        if isinstance(policy, RecurrentPolicy):
            return InContext(learner, world, self.test_trajectories, skip_failures=self.skip_failures,
                             limit=self.step_limit)  # fmt: skip
        if policy.observations > world.observations:
            world = Told(world, policy.observations - world.observations)
        judged = copy.deepcopy(learner)
        # As the authors test all their policies, the baselines too, whose learner has all steps from the start.
        judged.update = Slowed(judged.update, self.later_rate, after=max(1, self.inner_steps))
        return self.explorer(judged, world, self.test_trajectories)

    def protocols(self) -> list[Protocol]:
        about = {
            "world": self.world,
            "trajectories": self.test_trajectories,
            "inner_lr": self.inner_lr,
            "later_rate": self.later_rate,
            "steps_at_full_rate": max(1, self.inner_steps),
            "surrogate": self.inner_surrogate,
            "discount": self.discount,
            "decay": self.decay,
            "horizon": self.horizon,
            "evaluation_seed": self.evaluation_seed,
        }
        return [Protocol(name="return", tasks=self.episodes("test"), about=about, episodes=self.test_episodes,
                         steps=self.test_steps, seen_by=self.seen_by)]  # fmt: skip

    def baselines(self) -> list[Baseline]:
        return policy_baselines(self)
