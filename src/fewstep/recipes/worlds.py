"""The worlds that policies are trained in: the paper's (Finn et al. 2017, section 5.3), and small discrete ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal

from fewstep.data.layouts import Split
from fewstep.recipes.policies import PolicyRecipe
from fewstep.rl.environments import Ant, Bandits, Environment, HalfCheetah, Humanoid, Navigation, TabularMDP, Walker

BODIES: dict[str, Callable[..., Environment]] = {
    "half-cheetah": HalfCheetah, "ant": Ant, "walker": Walker, "humanoid": Humanoid,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class NavigationRecipe(PolicyRecipe):
    """The paper's text gives an inner rate of 0.1; the authors' code, and the run behind their figure, have 0.5."""

    iterations: int = 100
    meta_batch: int = 20
    horizon: int = 100
    test_trajectories: int = 40
    pretrain_iterations: int = 100
    stride: int = 7
    inner_stride: int = 7

    @property
    def world(self) -> str:
        return "2D navigation"

    @property
    def environment(self) -> Environment:
        return Navigation(self.horizon)


@dataclass(frozen=True, kw_only=True)
class RunnerRecipe(PolicyRecipe):
    """The paper's own physics by default; its returns do not compare with those of Gymnasium's."""

    body: Literal["half-cheetah", "ant", "walker", "humanoid"] = "half-cheetah"
    """Who runs."""
    task: Literal["velocity", "direction", "mass", "friction"] = "velocity"
    """What is not told: how fast to run, whereto, or what the body's parts weigh and how they slip."""
    flavour: Literal["paper", "gymnasium"] = "paper"
    """Whose physics, observations and start; the paper has no walker and no humanoid."""
    compile: Literal["no", "pieces", "step"] | None = "pieces"
    """What to compile: a minute at first, and a quarter less for each iteration."""

    @property
    def world(self) -> str:
        return f"{self.body} {self.task}, {self.flavour} physics"

    @property
    def environment(self) -> Environment:
        return BODIES[self.body](self.task, self.flavour, self.horizon)


@dataclass(frozen=True, kw_only=True)
class SmallRecipe(PolicyRecipe):
    """Small discrete worlds, whose curvature takes no thinning."""

    iterations: int = 100
    horizon: int = 10
    pretrain_iterations: int = 100
    stride: int = 1
    inner_stride: int = 1


@dataclass(frozen=True, kw_only=True)
class BanditRecipe(SmallRecipe):
    """Slot machines (Duan et al. 2016, section 3.1), by a policy without a memory: it learns by its gradient alone."""

    arms: int = 5
    """Of each slot machine."""

    @property
    def world(self) -> str:
        return f"bandits with {self.arms} arms"

    @property
    def environment(self) -> Environment:
        return Bandits(self.arms, self.horizon)


@dataclass(frozen=True, kw_only=True)
class TabularRecipe(SmallRecipe):
    """Random worlds of a few states (Duan et al. 2016, section 3.2)."""

    states: int = 10
    """Of each world."""
    actions: int = 5
    """To choose from in each state."""

    @property
    def world(self) -> str:
        return f"random worlds of {self.states} states and {self.actions} actions"

    @property
    def environment(self) -> Environment:
        return TabularMDP(self.states, self.actions, self.horizon)


@dataclass(frozen=True, kw_only=True)
class MetaWorldRecipe(PolicyRecipe):
    """Meta-World's ML1, ML10 and ML45 (Yu et al. 2019), stepped one by one: slow. Validation is on training tasks."""

    benchmark: Literal["ML1", "ML10", "ML45"] = "ML1"
    """Goals of one class of tasks, or other classes at test than in training."""
    name: str = "reach-v3"
    """The class of ML1."""
    meta_batch: int = 20
    trajectories: int = 10
    test_trajectories: int = 10
    horizon: int = 500

    has_oracle: ClassVar[bool] = False  # a task is but its number

    @property
    def world(self) -> str:
        return f"Meta-World {self.benchmark}{f' {self.name}' if self.benchmark == 'ML1' else ''}"

    @property
    def environment(self) -> Environment:
        return self.environment_of("train")

    def environment_of(self, split: Split) -> Environment:
        return _meta_world(self.benchmark, self.name, "test" if split == "test" else "train", self.horizon)


@cache  # to make the tasks takes seconds
def _meta_world(benchmark: Any, name: str, split: Any, horizon: int) -> Environment:
    from fewstep.rl.environments.meta_world import MetaWorld
    from fewstep.rl.environments.vectorised import Vectorised

    return Vectorised(lambda: MetaWorld(benchmark, name, split), horizon)
