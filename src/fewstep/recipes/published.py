"""Returns that the authors of MAML published, which runs in their worlds are to be compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Returns = Mapping[str, Sequence[float]]

# After 0, 1, 2, 3 gradient steps; means over 40 test tasks, out of cbfinn/maml_rl at 9c8e2eb, icml/*_results_*.pkl.
PUBLISHED: dict[tuple[str, int], Returns] = {
    ("2D navigation", 100): {
        "MAML": (-40.407, -11.68, -3.328, -3.23),
        "pre-trained": (-40.806, -19.727, -11.717, -8.475),
        "random": (-82.659, -57.964, -53.838, -46.809),
        "oracle": (-2.288,),
    },
    ("half-cheetah velocity, paper physics", 200): {
        "MAML": (-129.53, -78.566, -66.62, -60.778),
        "pre-trained": (-158.004, -135.388, -128.466, -133.611),
        "random": (-254.829, -254.332, -246.788, -230.827),
        "oracle": (-54.472,),
    },
    ("half-cheetah direction, paper physics", 200): {
        "MAML": (-50.688, 293.193, 313.482, 315.653),
        "pre-trained": (-43.026, -24.749, -12.849, 19.568),
        "random": (-35.735, 21.83, 62.322, 86.185),
        "oracle": (442.691,),
    },
    ("ant velocity, paper physics", 200): {
        "MAML": (30.577, 96.742, 100.057, 101.408),
        "pre-trained": (-1.831, 6.108, 8.475, 9.469),
        "random": (-78.636, -62.812, -48.545, -35.565),
        "oracle": (107.886,),
    },
    ("ant direction, paper physics", 200): {
        "MAML": (8.659, 499.147, 500.679, 499.111),
        "pre-trained": (3.159, 1.269, 6.509, 6.865),
        "random": (3.108, 9.247, 15.96, 26.115),
        "oracle": (524.797,),
    },
}


def published(protocol: Mapping[str, Any]) -> Returns:
    """The authors' returns in the world of a protocol, by the names of their curves; none for other worlds or horizons.

    Other settings may differ: theirs are in the docstring of each recipe, or the paper's.

    >>> published({"world": "2D navigation", "horizon": 100})["oracle"]
    (-2.288,)
    >>> published({"world": "2D navigation", "horizon": 50})
    {}
    """
    return PUBLISHED.get((protocol.get("world", ""), protocol.get("horizon", 0)), {})
