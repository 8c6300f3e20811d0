"""Losses whose reduction is declared."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from fewstep.errors import InputError
from fewstep.losses import summed_over_ways


def test_it_is_the_authors_where_classes_are_of_one_size() -> None:
    prediction, target = torch.randn(15, 5, dtype=torch.float64), torch.arange(5).repeat(3)
    wanted = functional.cross_entropy(prediction, target, reduction="sum") / 3
    torch.testing.assert_close(summed_over_ways(prediction, target), wanted)
    torch.testing.assert_close(summed_over_ways(prediction[:1], target[:1]),
                               5 * functional.cross_entropy(prediction[:1], target[:1]))  # fmt: skip


def test_a_class_with_more_examples_counts_no_more() -> None:
    prediction, target = torch.randn(3, 3, dtype=torch.float64), torch.arange(3)
    often = torch.tensor([0, 1, 1, 2, 2, 2, 2])
    torch.testing.assert_close(summed_over_ways(prediction[often], target[often]), summed_over_ways(prediction, target))
    more = torch.cat([prediction, prediction]), torch.tensor([0, 1, 2, -100, -100, -100])
    torch.testing.assert_close(summed_over_ways(*more), summed_over_ways(prediction, target))
    with pytest.raises(InputError, match=r"labels must be whole numbers \[examples\], but torch.float64 \[3, 3\] came"):
        summed_over_ways(prediction, prediction.softmax(-1))
    both = torch.vmap(summed_over_ways)(torch.stack([prediction, -prediction]), torch.stack([target, target]))
    torch.testing.assert_close(both[0], summed_over_ways(prediction, target))
