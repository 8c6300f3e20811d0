"""The networks of the paper. Any other `nn.Module` works as well."""

from fewstep.models.conv4 import conv4
from fewstep.models.mlp import mlp

__all__ = ["conv4", "mlp"]
