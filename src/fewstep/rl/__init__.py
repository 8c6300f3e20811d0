"""Meta-reinforcement learning: the same learner, with experience as its batches."""

from fewstep.rl.ascent import Ascent
from fewstep.rl.divergence import ProximalPenalty
from fewstep.rl.explorer import EnvironmentEpisodes, Explorer
from fewstep.rl.policies import CategoricalPolicy, GaussianPolicy, Policy, policy_of
from fewstep.rl.recurrent import InContext, RecurrentPolicy
from fewstep.rl.sampling import SamplingCorrection
from fewstep.rl.trpo import TRPO, TrustRegion

__all__ = [
    "TRPO",
    "Ascent",
    "CategoricalPolicy",
    "EnvironmentEpisodes",
    "Explorer",
    "GaussianPolicy",
    "InContext",
    "Policy",
    "ProximalPenalty",
    "RecurrentPolicy",
    "SamplingCorrection",
    "TrustRegion",
    "policy_of",
]
