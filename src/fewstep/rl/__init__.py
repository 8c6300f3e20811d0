"""Meta-reinforcement learning: the same learner, with experience as its batches."""

from fewstep.rl.ascent import Ascent
from fewstep.rl.explorer import EnvironmentEpisodes, Explorer
from fewstep.rl.policies import CategoricalPolicy, GaussianPolicy, Policy
from fewstep.rl.sampling import SamplingCorrection
from fewstep.rl.trpo import TRPO, TrustRegion

__all__ = [
    "TRPO",
    "Ascent",
    "CategoricalPolicy",
    "EnvironmentEpisodes",
    "Explorer",
    "GaussianPolicy",
    "Policy",
    "SamplingCorrection",
    "TrustRegion",
]
