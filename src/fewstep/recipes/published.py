"""Returns that the authors of MAML published, which runs in their worlds are to be compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Returns = Mapping[str, tuple[Sequence[float], Sequence[float]]]

# After 0, 1, 2, 3 gradient steps: means over 40 test tasks, and half the widths of their 95 % intervals; out of
# cbfinn/maml_rl at 9c8e2eb, icml/*_results_*.pkl.
PUBLISHED: dict[tuple[str, int], Returns] = {
    ("2D navigation", 100): {
        "MAML": ((-40.407, -11.68, -3.328, -3.23), (4.005, 2.164, 0.551, 0.578)),
        "pre-trained": ((-40.806, -19.727, -11.717, -8.475), (4.039, 2.989, 1.645, 0.532)),
        "random": ((-82.659, -57.964, -53.838, -46.809), (2.16, 1.836, 1.622, 1.282)),
        "oracle": ((-2.288,), (0.143,)),
    },
    ("half-cheetah velocity, paper physics", 200): {
        "MAML": ((-129.53, -78.566, -66.62, -60.778), (16.535, 9.851, 8.935, 8.617)),
        "pre-trained": ((-158.004, -135.388, -128.466, -133.611), (17.351, 15.051, 13.977, 16.443)),
        "random": ((-254.829, -254.332, -246.788, -230.827), (35.713, 34.644, 35.362, 34.167)),
        "oracle": ((-54.472,), (6.934,)),
    },
    ("half-cheetah direction, paper physics", 200): {
        "MAML": ((-50.688, 293.193, 313.482, 315.653), (5.745, 17.013, 15.768, 13.846)),
        "pre-trained": ((-43.026, -24.749, -12.849, 19.568), (11.612, 9.314, 8.55, 11.219)),
        "random": ((-35.735, 21.83, 62.322, 86.185), (1.267, 2.899, 5.031, 9.726)),
        "oracle": ((442.691,), (8.378,)),
    },
    ("ant velocity, paper physics", 200): {
        "MAML": ((30.577, 96.742, 100.057, 101.408), (30.028, 20.737, 21.46, 21.038)),
        "pre-trained": ((-1.831, 6.108, 8.475, 9.469), (34.195, 34.355, 34.451, 36.518)),
        "random": ((-78.636, -62.812, -48.545, -35.565), (34.392, 34.716, 34.082, 29.894)),
        "oracle": ((107.886,), (19.969,)),
    },
    ("ant direction, paper physics", 200): {
        "MAML": ((8.659, 499.147, 500.679, 499.111), (14.215, 32.103, 31.54, 32.526)),
        "pre-trained": ((3.159, 1.269, 6.509, 6.865), (15.207, 13.532, 13.768, 11.692)),
        "random": ((3.108, 9.247, 15.96, 26.115), (4.071, 4.364, 3.499, 0.112)),
        "oracle": ((524.797,), (12.397,)),
    },
}


def published(protocol: Mapping[str, Any]) -> Returns:
    """The authors' returns in the world of a protocol, and half their intervals, by the names of their curves.

    None for other worlds or horizons.

    Other settings may differ: theirs are in the docstring of each recipe, or the paper's.

    >>> published({"world": "2D navigation", "horizon": 100})["oracle"]
    ((-2.288,), (0.143,))
    >>> published({"world": "2D navigation", "horizon": 50})
    {}
    """
    return PUBLISHED.get((protocol.get("world", ""), protocol.get("horizon", 0)), {})
