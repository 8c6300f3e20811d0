"""Named methods: each file makes one choice along the six axes and explains it."""

from fewstep.algorithms.alfa import alfa
from fewstep.algorithms.anil import anil
from fewstep.algorithms.boil import boil
from fewstep.algorithms.fomaml import fomaml
from fewstep.algorithms.hf_maml import hf_maml
from fewstep.algorithms.l2f import l2f
from fewstep.algorithms.maml import maml
from fewstep.algorithms.meta_curvature import meta_curvature
from fewstep.algorithms.meta_sgd import meta_sgd
from fewstep.algorithms.proto_maml import proto_maml
from fewstep.algorithms.reptile import reptile
from fewstep.algorithms.sharp_maml import sharp_maml
from fewstep.algorithms.unicorn_maml import unicorn_maml

__all__ = [
    "alfa",
    "anil",
    "boil",
    "fomaml",
    "hf_maml",
    "l2f",
    "maml",
    "meta_curvature",
    "meta_sgd",
    "proto_maml",
    "reptile",
    "sharp_maml",
    "unicorn_maml",
]
