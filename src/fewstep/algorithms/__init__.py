"""Named methods: each file makes one choice along the six axes and explains it."""

from fewstep.algorithms.fomaml import fomaml
from fewstep.algorithms.hf_maml import hf_maml
from fewstep.algorithms.maml import maml

__all__ = ["fomaml", "hf_maml", "maml"]
