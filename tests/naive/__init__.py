"""Each method's equations once more, in plain autograd through one task after another: what all of them are held to."""

from __future__ import annotations

from collections.abc import Callable

from tests.naive.descent import anil, boil, fomaml, hf_maml, maml, proto_maml, reptile, unicorn_maml
from tests.naive.given import Given, Truth
from tests.naive.layers import cavia, t_net, warp_grad
from tests.naive.outer import bmg, imaml, maml_pp, sharp_maml
from tests.naive.rules import alfa, l2f, meta_curvature, meta_sgd

NAIVE: dict[str, Callable[..., Truth]] = {
    "alfa": alfa,
    "anil": anil,
    "bmg": bmg,
    "boil": boil,
    "cavia": cavia,
    "fomaml": fomaml,
    "hf_maml": hf_maml,
    "imaml": imaml,
    "l2f": l2f,
    "maml": maml,
    "maml_pp": maml_pp,
    "meta_curvature": meta_curvature,
    "meta_sgd": meta_sgd,
    "proto_maml": proto_maml,
    "reptile": reptile,
    "sharp_maml": sharp_maml,
    "t_net": t_net,
    "unicorn_maml": unicorn_maml,
    "warp_grad": warp_grad,
}
"""`truth = NAIVE[method](given, **options)`, with the options of the method and their defaults."""

__all__ = ["NAIVE", "Given", "Truth"]
