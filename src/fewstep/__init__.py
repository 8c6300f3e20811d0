"""fewstep: models that learn in a few gradient steps. MAML and its family for any PyTorch module and loss."""

from importlib.metadata import version

from fewstep import data, losses, models
from fewstep.algorithms import (
    alfa,
    anil,
    bmg,
    boil,
    cavia,
    fomaml,
    hf_maml,
    imaml,
    l2f,
    maml,
    maml_pp,
    meta_curvature,
    meta_sgd,
    proto_maml,
    reptile,
    sharp_maml,
    t_net,
    unicorn_maml,
    warp_grad,
)
from fewstep.calibrate import calibrate
from fewstep.engine import Engine
from fewstep.errors import DivergenceError, FallbackWarning, FewstepError, InputError
from fewstep.learner import Learner
from fewstep.meta_step import MetaStep
from fewstep.normalisation import use_batch_statistics
from fewstep.planner import Plan, plan
from fewstep.ragged import masked, pad_tasks
from fewstep.streams import AlongTheWay
from fewstep.task import Point, Task

__version__ = version("fewstep")

__all__ = [
    "AlongTheWay",
    "DivergenceError",
    "Engine",
    "FallbackWarning",
    "FewstepError",
    "InputError",
    "Learner",
    "MetaStep",
    "Plan",
    "Point",
    "Task",
    "alfa",
    "anil",
    "bmg",
    "boil",
    "calibrate",
    "cavia",
    "data",
    "fomaml",
    "hf_maml",
    "imaml",
    "l2f",
    "losses",
    "maml",
    "maml_pp",
    "masked",
    "meta_curvature",
    "meta_sgd",
    "models",
    "pad_tasks",
    "plan",
    "proto_maml",
    "reptile",
    "sharp_maml",
    "t_net",
    "unicorn_maml",
    "use_batch_statistics",
    "warp_grad",
]
