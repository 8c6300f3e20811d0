"""A protocol: everything that decides what a number means."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fewstep.data.episodes import ClassEpisodes, Episodes
from fewstep.ensemble import Ensemble
from fewstep.errors import InputError
from fewstep.evaluate import Evaluation, Judged, Metric, evaluate
from fewstep.learner import Learner
from fewstep.normalisation import MEANINGS, Policy


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How learners are judged.

    name : in a few words
    tasks : which are judged; of `ClassEpisodes` these are ways, shots, queries per class and augmentation
    about : what else there is to tell of the tasks and the inner loop in plain values, for tables and files
    episodes : how many of the tasks;  steps : inner steps
    normalisation : by which statistics batch norm goes; None where there is none
    checkpoints : how many of a run answer together;  which : the best validated ones, or the last ones
    permutations : in how many orders of the labels each of them adapts, see `fewstep.ensemble.Ensemble`
    seen_by : what makes of a learner that which is judged: a policy has to explore, for example
    """

    name: str
    tasks: Episodes
    about: Mapping[str, Any]
    episodes: int = 600
    steps: int = 10
    normalisation: Policy | None = None
    checkpoints: int = 1
    which: Literal["best", "last"] = "best"
    permutations: int = 1
    seen_by: Callable[[Learner], Judged] = lambda learner: learner

    @property
    def plain(self) -> dict[str, Any]:
        """What a number has to be told with."""
        own: dict[str, Any] = {}
        if isinstance(self.tasks, ClassEpisodes):
            own |= {"ways": self.tasks.ways, "shots": self.tasks.shots, "queries_per_class": self.tasks.queries}
            if self.tasks.views > 1:
                own["augmentation"] = f"the support set and {self.tasks.views - 1} changed copies of it"
            elif self.tasks.augment is not None:
                own["augmentation"] = "all pictures are changed"
        if self.normalisation is not None:
            own["normalisation"] = MEANINGS[self.normalisation]
        if self.checkpoints > 1:
            own["checkpoints"] = f"mean logits of the {self.checkpoints} {self.which} checkpoints"
        if self.permutations > 1:
            own["permutations"] = f"mean logits over {self.permutations} turns of the labels"
        return {**self.about, **own}

    def judge(self, learners: Sequence[Learner], metric: str | Metric, at: Collection[int] | None = None,
              view: Callable[[Episodes], Episodes] = lambda tasks: tasks) -> Evaluation:  # fmt: skip
        """Judge the learners together.

        at : after which inner steps; by default each;  view : turns the tasks into what the learners are given
        """
        if len(learners) != self.checkpoints:
            raise InputError(f"this protocol judges {self.checkpoints} learners together, but {len(learners)} came")
        before = [learner.normalisation for learner in learners]
        plain = len(learners) == self.permutations == 1
        judged = self.seen_by(learners[0]) if plain else Ensemble(learners, self.permutations)
        try:
            for learner in learners:
                learner.normalisation = self.normalisation or learner.normalisation
            return evaluate(judged, view(self.tasks), metric=metric, steps=self.steps, count=self.episodes, at=at,
                            protocol=self.plain)  # fmt: skip
        finally:
            for learner, policy in zip(learners, before, strict=True):
                learner.normalisation = policy
