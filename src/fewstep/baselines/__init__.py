"""What meta-learning has to beat: nets trained without it and fine-tuned, and learners that compare features."""

from fewstep.baselines.contender import Baseline, Contender, contend, trained_net
from fewstep.baselines.features import features_of
from fewstep.baselines.finetune import fine_tune_all, fine_tune_head, linear_probe
from fewstep.baselines.matching import MatchingNet
from fewstep.baselines.metric import MetricLearner
from fewstep.baselines.multitask import average_of_tasks
from fewstep.baselines.nearest import NearestNeighbour
from fewstep.baselines.pretrain import CosineHead, pretrain_on_classes, pretrain_on_tasks
from fewstep.baselines.protonet import ProtoNet

__all__ = [
    "Baseline",
    "Contender",
    "CosineHead",
    "MatchingNet",
    "MetricLearner",
    "NearestNeighbour",
    "ProtoNet",
    "average_of_tasks",
    "contend",
    "features_of",
    "fine_tune_all",
    "fine_tune_head",
    "linear_probe",
    "pretrain_on_classes",
    "pretrain_on_tasks",
    "trained_net",
]
