"""The paper's multi-task ablation (Finn et al. 2017, appendix C): one regressor per task, their parameters averaged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from fewstep.data.episodes import Episodes
from fewstep.functional import Loss

Regulariser = Literal["none", "l2", "mean"]


def average_of_tasks(
    build: Callable[[], nn.Module],
    loss: Loss,
    episodes: Episodes,
    *,
    regulariser: Regulariser,
    strength: float,
    groups: int = 20,
    iterations: int = 2000,
    lr: float = 1e-2,
) -> tuple[nn.Module, float]:
    """Train one net on each task of the first `groups` batches, and return the average of their parameters.

    regulariser : "none"; "l2", strength * |theta|^2; or "mean", strength * |theta - mean|^2 with the mean of the nets
        trained before. The authors train 500 nets one after another; here a batch of tasks is trained at a time, so
        that the mean is updated once per batch.
    Also returns the mean training loss of the nets, to show that each fits its own task.
    """
    total: dict[str, Tensor] = {}
    losses = []
    for group in range(groups):
        (support_x, support_y), (query_x, query_y) = episodes[group]
        x, y = torch.cat([support_x, query_x], 1), torch.cat([support_y, query_y], 1)
        nets = [build() for _ in range(len(x))]
        theta, _ = stack_module_state(nets)
        centre = {name: value / group for name, value in total.items()} if regulariser == "mean" else {}
        optimizer = torch.optim.Adam(theta.values(), lr=lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)

        def one(own: dict[str, Tensor], inputs: Tensor, target: Tensor, net: nn.Module = nets[0]) -> Tensor:
            return loss(functional_call(net, own, (inputs,)), target)

        for _ in range(iterations):
            optimizer.zero_grad()
            fit = vmap(one)(theta, x, y)
            objective = fit.sum()
            if regulariser == "l2" or (regulariser == "mean" and centre):
                for name, value in theta.items():
                    objective = objective + strength * (value - centre.get(name, torch.zeros(()))).square().sum()
            objective.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        losses.append(fit.detach().mean())
        total = {
            name: total.get(name, torch.zeros(())) + value.detach().sum(0) / len(x) for name, value in theta.items()
        }
    average = build()
    average.load_state_dict({name: value / groups for name, value in total.items()})
    return average, torch.stack(losses).mean().item()
