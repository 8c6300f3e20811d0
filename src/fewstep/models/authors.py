"""The network that the MAML authors trained on Mini-ImageNet and gave out (cbfinn/maml, model59000)."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from fewstep.errors import InputError
from fewstep.models.conv4 import Conv4, conv4


def load_authors_conv4(path: Path | str) -> Conv4:
    """The authors' 5-way 1-shot network for Mini-ImageNet, x [batch, 3, 84, 84] in 0..1, RGB -> [batch, 5].

    path : an .npz of `conv1..4` [out, in, 3, 3], `b1..4` and `beta1..4` [32], `w5` [5, 800] (for features flattened as
        [channel, row, column]) and `b5` [5]: their checkpoint, transposed from TensorFlow's order
    It adapts as theirs does by `fewstep.maml(model, fewstep.losses.summed_over_ways, lr=0.01, steps=5,
    adapt="~*.offset")`, and was judged after 10 steps (48.70 %; Finn et al. 2017, table 1).
    Raises `InputError` where the file is missing, damaged or of another network.
    """
    model = conv4(5, channels=3, size=84, filters=32, pool=True)
    places = {"head.weight": "w5", "head.bias": "b5"}
    for block in range(4):
        own = {"conv.weight": "conv", "conv.bias": "b", "norm.offset": "beta"}
        places |= {f"blocks.{block}.{name}": f"{array}{block + 1}" for name, array in own.items()}
    try:
        with Path(path).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            model.load_state_dict({name: torch.from_numpy(arrays[array]) for name, array in places.items()})
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(
            f"{path} does not hold the authors' network ({' '.join(str(error).split())}); give an .npz with conv1 to "
            "conv4, b1 to b4, beta1 to beta4, w5 and b5"
        ) from error
    return model
