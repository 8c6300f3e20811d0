"""TorchOpt (Ren et al. 2023): its MetaSGD, as in its own MAML example, and its functional interface."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from benchmarks.contenders.with_torch import TorchContender
from benchmarks.workloads import Workload, one_by_one

NEEDS = "torchopt"


def variants(workload: Workload) -> dict[str, dict[str, Any]]:
    """Both interfaces."""
    return {"MetaSGD": {"functional": False}, "functional": {"functional": True}}


def build(workload: Workload, functional: bool) -> TorchContender:
    """One task after another, and a backward pass for each."""
    return TorchContender(workload, _functional(workload) if functional else _meta_sgd(workload))


def _meta_sgd(workload: Workload) -> Any:
    import torchopt

    model = workload.model
    # MetaSGD adapts all that a module owns: hand it a list of the modules whose parameters adapt.
    names = set(workload.adapted)
    prefixes = {name.rpartition(".")[0] for name in names}
    adapting = model if names == set(dict(model.named_parameters())) else nn.ModuleList(
        [module for name, module in model.named_modules() if name in prefixes]
    )  # fmt: skip

    def backward() -> None:
        start = torchopt.extract_state_dict(model, by="reference", detach_buffers=True)
        for (support_x, support_y), (query_x, query_y) in one_by_one(workload.tasks):
            optimizer = torchopt.MetaSGD(adapting, lr=workload.lr)
            for _ in range(workload.steps):
                optimizer.step(workload.loss(model(support_x), support_y))
            workload.loss(model(query_x), query_y).backward()  # type: ignore[no-untyped-call]
            torchopt.recover_state_dict(model, start)

    return backward


def _functional(workload: Workload) -> Any:
    import torchopt

    model, names = workload.model, workload.adapted
    rule = torchopt.sgd(lr=workload.lr)

    def backward() -> None:
        own: dict[str, Tensor] = dict(model.named_parameters())
        for (support_x, support_y), (query_x, query_y) in one_by_one(workload.tasks):
            moving = tuple(own[name] for name in names)
            state = rule.init(moving)
            for _ in range(workload.steps):
                theta = {**own, **dict(zip(names, moving, strict=True))}
                value = workload.loss(functional_call(model, theta, (support_x,)), support_y)
                grads = torch.autograd.grad(value, moving, create_graph=True)
                updates, state = rule.update(grads, state, params=moving, inplace=False)
                moving = torchopt.apply_updates(moving, updates, inplace=False)
            theta = {**own, **dict(zip(names, moving, strict=True))}
            workload.loss(functional_call(model, theta, (query_x,)), query_y).backward()  # type: ignore[no-untyped-call]

    return backward
