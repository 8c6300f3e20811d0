"""Augmentation: what changes, how far, and that it goes by the episode's number alone."""

from __future__ import annotations

import pytest
import torch

from fewstep.data import ClassEpisodes
from fewstep.data.augment import Augment
from fewstep.errors import InputError


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_shifts_keep_what_stays_inside() -> None:
    x = torch.zeros(400, 1, 9, 9)
    x[:, :, 4, 4] = 1
    places = Augment(crop=3, flip=False, jitter=0)(x, generator()).flatten(1).argmax(1)
    rows, columns = places // 9, places % 9
    assert set(rows.tolist()) == set(columns.tolist()) == set(range(1, 8))
    assert len(set(places.tolist())) == 49  # the two are independent
    edge = torch.ones(50, 3, 9, 9)
    assert {int(each.sum()) for each in Augment(crop=1, flip=False, jitter=0)(edge, generator())} == {243, 216, 192}


def test_flips_are_whole_and_half_of_the_time() -> None:
    x = torch.rand(400, 2, 5, 7)
    y = Augment(crop=0, flip=True, jitter=0)(x, generator())
    same, mirrored = (y == x).flatten(1).all(1), (y == x.flip(-1)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert 150 < int(same.sum()) < 250


def test_colours_change_by_the_factors_asked_for() -> None:
    grey = torch.full((300, 3, 4, 4), 0.5)
    y = Augment(crop=0, flip=False, jitter=0.4)(grey, generator())
    assert y.flatten(1).std(1).max() < 1e-6  # a grey picture has no contrast and no saturation
    assert 0.3 - 1e-6 <= float(y.min()) < 0.32
    assert 0.68 < float(y.max()) <= 0.7 + 1e-6
    x = torch.rand(20, 3, 6, 6)
    y = Augment(crop=0, flip=False, jitter=0.9)(x, generator())
    assert float(y.min()) >= 0
    assert float(y.max()) <= 1
    assert not torch.allclose(x, y)
    assert Augment(crop=0, flip=False, jitter=0.4)(torch.rand(5, 1, 6, 6), generator()).shape == (5, 1, 6, 6)


def episodes(**options: object) -> ClassEpisodes:
    images = torch.randint(256, (6, 5, 3, 12, 12), generator=generator(), dtype=torch.uint8)
    return ClassEpisodes(**{"images": images, "ways": 3, "shots": 2, "queries": 2, "tasks": 2, **options})  # type: ignore[arg-type]


def test_episodes_are_augmented_by_their_number() -> None:
    plain, changed = episodes(), episodes(augment=Augment(crop=2))
    assert torch.equal(changed[3].support[0], changed[3].support[0])
    assert torch.equal(changed[3].support[1], plain[3].support[1])
    assert not torch.equal(changed[3].support[0], plain[3].support[0])
    assert not torch.equal(changed[3].query[0], plain[3].query[0])


def test_views_add_changed_copies_to_the_support_set() -> None:
    plain, more = episodes()[0], episodes(augment=Augment(crop=2), views=3)[0]
    (x, y), (query, _) = more
    assert x.shape == (2, 18, 3, 12, 12)
    assert torch.equal(query, plain.query[0])
    by_class = x.reshape(2, 3, 6, 3, 12, 12)
    assert torch.equal(by_class[:, :, :2].flatten(1, 2), plain.support[0])
    assert not torch.equal(by_class[:, :, 2:4], by_class[:, :, :2])
    assert y[0].tolist() == [0] * 6 + [1] * 6 + [2] * 6


def test_impossible_augmentation() -> None:
    with pytest.raises(InputError, match="jitter from 0 to below 1"):
        Augment(jitter=1.0)
    with pytest.raises(InputError, match="several need an augment"):
        episodes(views=2)
