"""Named methods: each file makes one choice along the six axes and explains it."""

from fewstep.algorithms.alfa import alfa
from fewstep.algorithms.anil import anil
from fewstep.algorithms.bmg import bmg
from fewstep.algorithms.boil import boil
from fewstep.algorithms.cavia import cavia
from fewstep.algorithms.fomaml import fomaml
from fewstep.algorithms.hf_maml import hf_maml
from fewstep.algorithms.imaml import imaml
from fewstep.algorithms.l2f import l2f
from fewstep.algorithms.maml import maml
from fewstep.algorithms.maml_pp import maml_pp
from fewstep.algorithms.meta_curvature import meta_curvature
from fewstep.algorithms.meta_sgd import meta_sgd
from fewstep.algorithms.proto_maml import proto_maml
from fewstep.algorithms.reptile import reptile
from fewstep.algorithms.sharp_maml import sharp_maml
from fewstep.algorithms.t_net import t_net
from fewstep.algorithms.unicorn_maml import unicorn_maml
from fewstep.algorithms.warp_grad import warp_grad

__all__ = [
    "alfa",
    "anil",
    "bmg",
    "boil",
    "cavia",
    "fomaml",
    "hf_maml",
    "imaml",
    "l2f",
    "maml",
    "maml_pp",
    "meta_curvature",
    "meta_sgd",
    "proto_maml",
    "reptile",
    "sharp_maml",
    "t_net",
    "unicorn_maml",
    "warp_grad",
]
