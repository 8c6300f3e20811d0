"""A metric learner trained and judged as `benchmarks.methods` does with a method, into a folder like that of a run.

python -m benchmarks.metric_learners protonet RECIPE --iterations N --validation N --episodes N --out FOLDER
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, cast

import tyro
from torch import nn

from fewstep.baselines import MatchingNet, MetricLearner, NearestNeighbour, ProtoNet, features_of
from fewstep.evaluate import evaluate
from fewstep.learner import Learner
from fewstep.protocol import Protocol
from fewstep.recipes import RECIPES
from fewstep.run import Run
from fewstep.train import train

KINDS: dict[str, Callable[[nn.Module], MetricLearner]] = {
    "protonet": lambda model: ProtoNet(features_of(model)),
    "matching_net": lambda model: MatchingNet(features_of(model)),
    "nearest_pixels": lambda model: NearestNeighbour(nn.Flatten()),  # not trained
}


@dataclass(frozen=True)
class Options:
    """What to train, and how long."""

    kind: Annotated[str, tyro.conf.Positional]
    """One of protonet, matching_net, nearest_pixels."""
    recipe: Annotated[str, tyro.conf.Positional]
    """Its network, tasks and outer loop are taken."""
    out: Path
    """The folder."""
    iterations: int = 1000
    """Meta-updates of 4 tasks each."""
    validation: int = 60
    """Validation episodes, twice in a training."""
    episodes: int = 600
    """Test episodes."""


def main(options: Options) -> None:
    """Train, and judge the best validated weights by the recipe's first protocol, which has one query a class."""
    recipe = replace(RECIPES[options.recipe], meta_batch=4, inner_steps=0, iterations=options.iterations,
                     check_every=max(options.iterations // 2, 1), validation_episodes=options.validation,
                     test_episodes=options.episodes)  # fmt: skip
    learner, run = KINDS[options.kind](recipe.initial_model()), Run(options.out)
    judged = cast(Learner, learner)  # it goes where a learner goes
    run.write_json("config.json", {"iterations": options.iterations, "inner_steps": 0})
    if any(value.requires_grad for value in learner.parameters()):
        check = partial(evaluate, episodes=recipe.episodes("validation"), metric="accuracy", steps=0,
                        count=options.validation)  # fmt: skip
        train(judged, recipe.episodes("train"), recipe.training(), run, validate=check, report=print)
        run.restore("best.safetensors", learner)
    protocol: Protocol = replace(recipe.protocols()[0], steps=0)
    result = protocol.judge([judged], "accuracy").to_json()
    run.write_json("evaluation.json", {**result, "seed": recipe.seed})


if __name__ == "__main__":
    main(tyro.cli(Options, config=(tyro.conf.OmitArgPrefixes,)))
