"""A context beside the input, as the MAML paper compares with (Finn et al. 2017, appendix C.2, after Rei 2015)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fewstep.errors import InputError


class Beside(nn.Module):
    """`net(cat([x, context], 1))`: a network that sees numbers of its own as further channels of each input.

    With `adapt="context"` these alone adapt; they and the network are meta-learned.

    shape : of the context [channels, ...]; it starts at zero. x [batch, others, ...]: the rest has to agree

    >>> model = Beside(nn.Conv2d(3, 2, kernel_size=3), (1, 5, 5))
    >>> model(torch.ones(4, 2, 5, 5)).shape
    torch.Size([4, 2, 3, 3])
    """

    def __init__(self, net: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        if not shape or min(shape) < 1:
            raise InputError(f"the context needs a shape [channels, ...] of at least 1 each, but {shape} came")
        self.net = net
        self.context = nn.Parameter(next(net.parameters()).new_zeros(shape))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2:] != self.context.shape[1:]:
            came, own = list(x.shape[2:]), list(self.context.shape[1:])
            raise InputError(f"inputs of {came} came, but the context beside them is of {own}; resize them")
        result: Tensor = self.net(torch.cat([x, self.context.expand(x.shape[0], *self.context.shape)], 1))
        return result
