"""What meta-learning has to beat: the same net trained without it and fine-tuned with the same budget."""

from fewstep.baselines.contender import Baseline, Contender, contend
from fewstep.baselines.multitask import average_of_tasks
from fewstep.baselines.pretrain import pretrain_on_classes, pretrain_on_tasks

__all__ = ["Baseline", "Contender", "average_of_tasks", "contend", "pretrain_on_classes", "pretrain_on_tasks"]
