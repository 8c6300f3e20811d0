"""The networks of the paper, and adapters for large ones. Any other `nn.Module` works as well."""

from fewstep.models.conv4 import conv4
from fewstep.models.lora import add_lora, merge_lora, trained_state_dict
from fewstep.models.mlp import mlp

__all__ = ["add_lora", "conv4", "merge_lora", "mlp", "trained_state_dict"]
