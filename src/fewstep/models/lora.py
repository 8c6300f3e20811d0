"""Low-rank adapters (LoRA; Hu et al. 2021, arXiv 2106.09685): a large model adapts by few numbers.

The base is frozen, so a learner takes it as a constant: all tasks read the one copy, and only adapters get a task axis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from fewstep.errors import InputError
from fewstep.functional import Tensors
from fewstep.patterns import matching


class LoRA(nn.Module):
    """A linear layer and its adapter: base(x) + alpha / rank * lora_b lora_a x. At the start lora_b = 0.

    x [..., in] -> [..., out];  lora_a [rank, in];  lora_b [out, rank]
    """

    def __init__(self, base: nn.Module, rank: int, alpha: float) -> None:
        super().__init__()
        weight = _weight(base)
        outputs, inputs = weight.shape
        # Half precision would lose small inner steps: adapters of such a base are kept in single precision.
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.base = base
        self.lora_a = nn.Parameter(torch.empty(rank, inputs, dtype=dtype, device=weight.device))
        self.lora_b = nn.Parameter(torch.zeros(outputs, rank, dtype=dtype, device=weight.device))
        self.scale = alpha / rank
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))  # as in the authors' code

    def forward(self, x: Tensor) -> Tensor:
        plain: Tensor = self.base(x)
        low = functional.linear(x.to(self.lora_a.dtype), self.lora_a)
        return plain + (self.scale * functional.linear(low, self.lora_b)).to(plain.dtype)

    @property
    def weight(self) -> Tensor:
        """The weight of the merged layer, for code that reads it past `forward`, as `nn.MultiheadAttention` does."""
        change = self.scale * self.lora_b @ self.lora_a
        weight = _weight(self.base)
        merged = (weight + change).to(weight.dtype)
        return merged.mT if _is_transposed(self.base) else merged

    @property
    def bias(self) -> Tensor | None:
        """The bias of the base."""
        bias: Tensor | None = self.base.bias  # type: ignore[assignment]
        return bias


def add_lora(
    model: nn.Module, patterns: str | Sequence[str] = "*", *, rank: int = 8, alpha: float | None = None
) -> nn.Module:
    """Freeze `model`, put an adapter on each linear layer whose name matches, in place, and return the model.

    At the start it computes what it did before. Then `maml(model, loss, lr=..., adapt="*lora*")` adapts the adapters
    only. The layers are `nn.Linear` and the `Conv1D` of transformers' GPT-2. A module that reads `layer.weight` itself
    (`nn.MultiheadAttention` reads that of out_proj) gets the merged weight, which is right, but one for each task.

    patterns : names of layers, as for `adapt`: `*` and `?` as in file names, `~` takes names away
    rank : of the change of a weight
    alpha : the change counts alpha / rank; by default alpha is the rank

    >>> model = add_lora(nn.Sequential(nn.Linear(100, 50), nn.Tanh(), nn.Linear(50, 1)), "0", rank=4)
    >>> {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    {'0.lora_a': 400, '0.lora_b': 200}
    """
    alpha = float(rank) if alpha is None else alpha
    if rank < 1 or not 0 < alpha < math.inf:
        raise InputError(f"rank must be at least 1 and alpha above 0 and finite, but {rank} and {alpha} came")
    if any(isinstance(module, LoRA) for module in model.modules()):
        raise InputError("the model has adapters already; take them in with merge_lora(model) first")
    layers = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if name and (isinstance(module, nn.Linear) or _is_transposed(module))
    }
    chosen = matching(list(layers), patterns, "linear layer")
    model.requires_grad_(False)
    adapters = {id(layers[name]): LoRA(layers[name], rank, alpha) for name in chosen}  # one for a layer used twice
    for name in chosen:
        model.set_submodule(name, adapters[id(layers[name])])
    return model


@torch.no_grad()
def merge_lora(model: nn.Module) -> nn.Module:
    """Take each adapter into the weight of its layer, in place, and return the model, which has its old names again.

    The merged weights are new tensors: models that share the old ones, as adapted copies do, keep theirs.

    >>> model = add_lora(nn.Sequential(nn.Linear(3, 2)))
    >>> [name for name, _ in merge_lora(model).named_parameters()]
    ['0.weight', '0.bias']
    """
    adapters = {n: m for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, LoRA)}
    if not adapters:
        raise InputError("the model has no adapters to merge; add_lora(model) puts them on")
    for adapter in set(adapters.values()):
        adapter.base.weight = nn.Parameter(adapter.weight, requires_grad=False)
    for name, adapter in adapters.items():
        model.set_submodule(name, adapter.base)
    return model


def trained_state_dict(module: nn.Module) -> Tensors:
    """The part of `module.state_dict()` that is trained: small files for a large frozen model.

    It goes back with `module.load_state_dict(state, strict=False)`.

    >>> list(trained_state_dict(add_lora(nn.Sequential(nn.Linear(3, 2)))))
    ['0.lora_a', '0.lora_b']
    """
    return {name: value.detach() for name, value in module.named_parameters() if value.requires_grad}


def _is_transposed(module: nn.Module) -> bool:
    """Whether a layer is the `Conv1D` of transformers, a linear layer whose weight is [in, out]."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _weight(layer: nn.Module) -> Tensor:
    """The weight of a linear layer as [out, in]."""
    weight = layer.get_parameter("weight")
    return weight.mT if _is_transposed(layer) else weight
