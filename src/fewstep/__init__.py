"""fewstep: models that learn in a few gradient steps. MAML and its family for any PyTorch module and loss."""

from importlib.metadata import version

from fewstep import data, losses, models
from fewstep.algorithms import (
    alfa,
    anil,
    boil,
    fomaml,
    hf_maml,
    l2f,
    maml,
    meta_curvature,
    meta_sgd,
    proto_maml,
    reptile,
    sharp_maml,
    unicorn_maml,
)
from fewstep.calibrate import calibrate
from fewstep.engine import Engine
from fewstep.errors import DivergenceError, FallbackWarning, FewstepError, InputError
from fewstep.learner import Learner, Point
from fewstep.meta_step import MetaStep
from fewstep.normalisation import use_batch_statistics
from fewstep.planner import Plan, plan
from fewstep.ragged import masked, pad_tasks
from fewstep.streams import AlongTheWay
from fewstep.task import Task

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
    "boil",
    "calibrate",
    "data",
    "fomaml",
    "hf_maml",
    "l2f",
    "losses",
    "maml",
    "masked",
    "meta_curvature",
    "meta_sgd",
    "models",
    "pad_tasks",
    "plan",
    "proto_maml",
    "reptile",
    "sharp_maml",
    "unicorn_maml",
    "use_batch_statistics",
]
