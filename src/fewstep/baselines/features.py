"""The features of a trained network: what goes into its head."""

from __future__ import annotations

from torch import Tensor, nn

from fewstep.errors import InputError


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
    return _Features(model, name_of_head(model, head))


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


def name_of_head(model: nn.Module, head: str | None) -> str:
    """The name of the submodule `head`, or of the last `nn.Linear`; `InputError` where there is none."""
    modules: dict[str, nn.Module] = dict(model.named_modules())
    if head is None:
        linear: list[str] = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
        if not linear:
            raise InputError(f"{type(model).__name__} has no nn.Linear to take for its head; name a submodule")
        return linear[-1]
    if head not in modules:
        raise InputError(f"the model has no submodule '{head}'; there are: {', '.join(filter(None, modules))}")
    return head


def linear_head(model: nn.Module, head: str | None) -> tuple[str, nn.Linear]:
    """The name of the head, found as by `name_of_head`, and the layer; `InputError` unless it is an `nn.Linear`."""
    name = name_of_head(model, head)
    if not isinstance(module := model.get_submodule(name), nn.Linear):
        raise InputError(f"the head must be an nn.Linear, but '{name}' is a {type(module).__name__}")
    return name, module
