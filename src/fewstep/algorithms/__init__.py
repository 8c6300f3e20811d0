"""Named methods: each file makes one choice along the six axes and explains it."""

from fewstep.algorithms.bmg import bmg
from fewstep.algorithms.cavia import cavia
from fewstep.algorithms.fomaml import fomaml
from fewstep.algorithms.hf_maml import hf_maml
from fewstep.algorithms.imaml import imaml
from fewstep.algorithms.maml import maml
from fewstep.algorithms.maml_pp import maml_pp
from fewstep.algorithms.t_net import t_net
from fewstep.algorithms.warp_grad import warp_grad

__all__ = ["bmg", "cavia", "fomaml", "hf_maml", "imaml", "maml", "maml_pp", "t_net", "warp_grad"]
