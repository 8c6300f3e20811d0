"""The networks of the paper, and adapters for large ones. Any other `nn.Module` works as well."""

from fewstep.models.authors import load_authors_conv4
from fewstep.models.beside import Beside
from fewstep.models.context import add_context
from fewstep.models.conv4 import conv4
from fewstep.models.lora import add_lora, merge_lora, trained_state_dict
from fewstep.models.mlp import mlp
from fewstep.models.resnet12 import resnet12
from fewstep.models.warp import add_warp

__all__ = [
    "Beside", "add_context", "add_lora", "add_warp", "conv4", "load_authors_conv4", "merge_lora", "mlp", "resnet12",
    "trained_state_dict",
]  # fmt: skip
