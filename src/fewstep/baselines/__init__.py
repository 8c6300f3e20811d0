"""What meta-learning has to beat: the same net trained without it and fine-tuned with the same budget."""

from fewstep.baselines.contender import Contender, tuned
from fewstep.baselines.multitask import average_of_tasks
from fewstep.baselines.pretrain import pretrain_on_classes, pretrain_on_tasks

__all__ = ["Contender", "average_of_tasks", "pretrain_on_classes", "pretrain_on_tasks", "tuned"]
