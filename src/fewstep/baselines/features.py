"""The features of a trained network: what goes into its head."""

from __future__ import annotations

from torch import Tensor, nn

from fewstep.errors import InputError
from fewstep.patterns import head_of


def features_of(model: nn.Module, head: str | None = None) -> nn.Module:
    """A module that gives what goes into the head of `model` instead of what comes out of it.

    For `NearestNeighbour` on features, or `ProtoNet` on a pre-trained classifier. The parameters are those of `model`
    itself, the head's among them, which then have no gradient.

    model : x -> anything;  head : name of a submodule; the last `nn.Linear` unless given
    Raises `InputError` where there is no such submodule, and in the forward pass where the model leaves it out.

    >>> import torch
    >>> model = nn.Sequential(nn.ReLU(), nn.Linear(2, 5))
    >>> features_of(model)(torch.tensor([[-1.0, 3.0]]))
    tensor([[0., 3.]])
    """
    return _Features(model, head_of(model, head))


class _Features(nn.Module):
    def __init__(self, model: nn.Module, head: str) -> None:
        super().__init__()
        self.model, self.head = model, head

    def forward(self, x: Tensor) -> Tensor:
        found: list[Tensor] = []
        # A hook, rather than a model without its head: what comes after the head may need its output.
        handle = self.model.get_submodule(self.head).register_forward_pre_hook(lambda _, given: found.append(given[0]))
        try:
            self.model(x)
        finally:
            handle.remove()
        if not found:
            raise InputError(f"the model did not call its head '{self.head}'; name another submodule")
        return found[-1]
