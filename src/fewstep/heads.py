"""Where the last layer of a trained learner starts, for as many classes as in training or for others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from fewstep.engine import Engine
from fewstep.errors import InputError
from fewstep.learner import Learner
from fewstep.starts import HeadStart, Prototypes, ZeroHead

Head = Literal["auto", "trained", "prototypes", "zero"]


def start_head(learner: Learner, head: Head, trained: int, ways: int) -> Head:
    """Set where the learner's head starts; returns what was chosen.

    head : "trained" needs as many classes as in training, unless the method has a start of its own; "prototypes" and
        "zero" take any; "auto" takes the trained one, or prototypes for another number of classes
    """
    start: object = learner.start
    if isinstance(start, HeadStart) and head in ("auto", "trained"):
        return "trained"  # the method's own start, which takes any number of classes
    if start is not None and not isinstance(start, HeadStart) and ways != trained:
        raise InputError(f"this method was trained for {trained} classes and takes no other number; {ways} came")
    if head == "auto":
        head = "trained" if ways == trained else "prototypes"
    if head == "trained" and ways != trained:
        raise InputError(
            f"the head was trained for {trained} classes, but {ways} came; take --head prototypes or --head zero"
        )
    if head != "trained":
        learner.start = Prototypes(learner.model) if head == "prototypes" else ZeroHead(learner.model)
        learner.engine = Engine()
    return head


@contextmanager
def other_ways(method: str, trained: int, ways: int, steps: int) -> Iterator[None]:
    """Say what to do where a method cannot adapt to another number of classes than in training."""
    try:
        yield
    except InputError as error:
        if ways == trained:
            raise
        raise InputError(
            f"{method} cannot adapt to {ways} classes by {steps} steps where it was trained for {trained} ({error}); "
            f"take prototypes and --steps 0, if that is not what failed, or train with --ways {ways}"
        ) from error


def steps_from(head: Head, at_test: int) -> int:
    """How many inner steps to take unless told: as many as the recipe takes at test.

    None from prototypes that the net was not trained with: on validation classes its rate, made for the trained head,
    then made answers worse.
    """
    return 0 if head == "prototypes" else at_test
