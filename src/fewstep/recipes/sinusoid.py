"""Sinusoid regression (Finn et al. 2017, section 5.1): trained on 10 shots, judged on 5, 10 and 20."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional

from fewstep import models
from fewstep.baselines import Contender, average_of_tasks, pretrain_on_tasks, tuned
from fewstep.data.episodes import Episodes
from fewstep.data.sinusoid import SinusoidEpisodes
from fewstep.errors import InputError
from fewstep.functional import Loss
from fewstep.learner import Learner
from fewstep.recipes.base import Recipe, Split
from fewstep.updates import SGD

RATES = (0.001, 0.003, 0.01, 0.03, 0.1)


@dataclass(frozen=True, kw_only=True)
class SinusoidRecipe(Recipe):
    """A net 1-40-40-1, mean squared error. The paper's inner rate is 0.01; its code's default is 0.001."""

    iterations: int = 70_000
    meta_batch: int = 25
    shots: int = 10
    """Support examples, and as many query examples, of a training task."""
    check_every: int = 2000
    log_every: int = 500
    pretrain_iterations: int | None = None
    """Iterations of the baselines that are trained on all tasks; None takes as many as `iterations`."""
    ablations: bool = True
    """Also train the paper's multi-task ablations (table 2), which takes about two minutes."""

    metric: ClassVar[str] = "mse"

    def model(self) -> nn.Module:
        return models.mlp()

    @property
    def loss(self) -> Loss:
        return functional.mse_loss

    def episodes(self, split: Split) -> SinusoidEpisodes:
        tasks = self.meta_batch if split == "train" else 100
        queries = self.shots if split == "train" else 100
        return SinusoidEpisodes(
            tasks=tasks, seed=self.seed_of(split), device=self.device, shots=self.shots, queries=queries
        )

    def protocols(self) -> dict[str, Episodes]:
        test = self.episodes("test")
        return {f"{shots}-shot": replace(test, shots=shots) for shots in (self.shots, 5, 10, 20)}

    def protocol(self, episodes: Episodes) -> dict[str, Any]:
        if not isinstance(episodes, SinusoidEpisodes):
            raise InputError(f"sinusoid episodes expected, but {type(episodes).__name__} came")
        return {
            "shots": episodes.shots,
            "queries": episodes.queries,
            "trained_on_shots": self.shots,
            "inner_lr": self.inner_lr,
            "loss": "mean squared error",
            "evaluation_seed": self.evaluation_seed,
        }

    def contenders(self) -> list[Contender]:
        return [self._pretrained(), self._oracle(), *(self._multitask() if self.ablations else [])]

    def _tuned(self, name: str, model: nn.Module) -> Contender:
        return tuned(name, model, self.loss, self.episodes("validation"), rates=RATES, steps=self.test_steps,
                     metric=self.metric)  # fmt: skip

    def _pretrained(self) -> Contender:
        model = self.initial_model()
        iterations = self.pretrain_iterations or self.iterations
        pretrain_on_tasks(model, self.loss, self.episodes("train"), iterations=iterations)
        return self._tuned("pre-trained on all tasks, fine-tuned", model)

    def _oracle(self) -> Contender:
        """The net that is given amplitude and phase; it need not adapt."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            model = models.mlp(inputs=3).to(self.device)
        iterations = self.pretrain_iterations or self.iterations
        train = replace(self.episodes("train"), oracle=True)
        pretrain_on_tasks(model, self.loss, train, iterations=iterations)

        def see_more(episodes: Episodes) -> Episodes:
            return replace(episodes, oracle=True) if isinstance(episodes, SinusoidEpisodes) else episodes

        return Contender("oracle", Learner(model, self.loss, SGD(self.inner_lr), steps=0), 0, view=see_more)

    def _multitask(self) -> list[Contender]:
        """The three of the paper's table 2; strengths as high as the single regressors bear."""
        tasks = SinusoidEpisodes(tasks=25, seed=self.seed_of("train"), shots=50, queries=50)
        found = []
        for regulariser, strength in (("mean", 1e-3), ("none", 0.0), ("l2", 1e-3)):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.seed)
                model, fit = average_of_tasks(
                    lambda: models.mlp(init="xavier"), self.loss, tasks, regulariser=regulariser, strength=strength
                )
            contender = self._tuned(f"multi-task, regulariser {regulariser}", model.to(self.device))
            contender.about.update(regressor_loss=fit, strength=strength)
            found.append(contender)
        return found
