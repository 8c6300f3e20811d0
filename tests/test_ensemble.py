"""Several learners, or one in several orders of the labels, that answer together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fewstep
from fewstep import InputError, Learner, Task
from fewstep.ensemble import Ensemble

WAYS = 3


def learner_of(seed: int, method: str = "maml", outputs: int = WAYS) -> Learner:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, outputs)).double()
    learner: Learner = getattr(fewstep, method)(model, functional.cross_entropy, lr=0.5, steps=2)
    return learner


def tasks() -> Task:
    torch.manual_seed(9)
    x, y = torch.randn(2, 6, 2, dtype=torch.float64), torch.arange(6).remainder(WAYS).expand(2, 6)
    return Task((x, y), (torch.randn(2, 6, 2, dtype=torch.float64), y))


def logits(learner: Learner | Ensemble, tasks: Task) -> Tensor:
    prediction = learner.path(tasks, 2)[-1].prediction
    assert prediction is not None
    return prediction


def test_several_learners_answer_by_the_mean_of_their_logits() -> None:
    learners = [learner_of(seed) for seed in range(3)]
    mean = torch.stack([logits(learner, tasks()) for learner in learners]).mean(0)
    torch.testing.assert_close(logits(Ensemble(learners), tasks()), mean, rtol=0, atol=1e-12)


def test_it_normalises_as_its_learners_do() -> None:
    learner = learner_of(0)
    learner.normalisation = "support"
    assert Ensemble([learner]).normalisation == "support"


def test_turned_labels_equal_heads_whose_rows_are_turned() -> None:
    """To call class 0 class 1 and so on is to turn the rows of the head the other way round."""
    expected = []
    for turn in range(WAYS):
        learner = learner_of(0)
        for value in learner.model[-1].parameters():  # type: ignore[index]
            value.data = value.data.roll(-turn, 0)  # row c is what class c is called then, c + turn
        expected.append(logits(learner, tasks()))
    assert (expected[0] - expected[1]).abs().max() > 1e-3
    mean = torch.stack(expected).mean(0)
    torch.testing.assert_close(logits(Ensemble([learner_of(0)], WAYS), tasks()), mean, rtol=0, atol=1e-12)


def test_turns_change_nothing_where_all_classes_start_alike() -> None:
    learner = learner_of(0, "unicorn_maml")
    alone, together = logits(learner, tasks()), logits(Ensemble([learner], WAYS), tasks())
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


def test_wrong_numbers_of_turns_and_outputs() -> None:
    with pytest.raises(InputError, match="at least 1 learner"):
        Ensemble([])
    with pytest.raises(InputError, match="3 ways have 3 turns"):
        Ensemble([learner_of(0)], WAYS + 1).path(tasks(), 1)
    with pytest.raises(InputError, match="the model has 4 outputs"):
        Ensemble([learner_of(0, outputs=4)], WAYS).path(tasks(), 1)
