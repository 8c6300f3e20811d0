"""Methods that add layers to a model: here they are put in by hand."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from fewstep.functional import Tensors
from tests.naive.given import Given, Truth, leaves, same
from tests.reference import descended, one_by_one, value_of


def concatenated(tensors: Tensors, layer: nn.Linear, args: tuple[Tensor], out: Tensor) -> Tensor:
    """The layer of its input and the context."""
    joined = torch.cat([args[0], tensors["context"].expand(len(args[0]), -1)], 1)
    return functional.linear(joined, torch.cat([layer.weight, tensors["columns"]], 1), layer.bias)


def modulated(tensors: Tensors, layer: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:
    """FiLM: the channels scaled and shifted by linear maps of the context."""
    maps = tensors["film.weight"] @ tensors["context"] + tensors["film.bias"]
    gamma, beta = maps.reshape(2, 1, -1, *[1] * (out.dim() - 2))
    result: Tensor = (1 + gamma) * out + beta
    return result


def with_context(plain: nn.Module, layer: str, tensors: Tensors, x: Tensor) -> Tensor:
    """The prediction with the context in this layer."""
    added = {n.removeprefix(f"{layer}."): v for n, v in tensors.items() if n.startswith(f"{layer}.")}
    own = {n.replace(".base", ""): v for n, v in tensors.items() if n.removeprefix(f"{layer}.") not in added}
    own |= {n.replace("base", layer): v for n, v in added.items() if n.startswith("base.")}
    hook: Any = partial(concatenated if "columns" in added else modulated, added)
    handle = plain.get_submodule(layer).register_forward_hook(hook)
    try:
        prediction: Tensor = functional_call(plain, own, (x,))
        return prediction
    finally:
        handle.remove()


def cavia(given: Given, *, context: int = 5, **_: Any) -> Truth:
    """Zintgraf et al. 2019, equations 6 and 7: the context alone adapts, from 0."""
    name = next(name for name in given.theta if name.endswith("context"))
    layer = name.removesuffix(".context")
    value = value_of(partial(with_context, given.model, layer), given.loss)
    losses = []
    for task in one_by_one(given.tasks):
        theta = {**given.theta, name: torch.zeros(context, requires_grad=True)}
        for _step in range(given.steps):
            theta = descended(value, theta, [name], task.support, given.lr)
        losses.append(value(theta, task.query))
    return same(losses)


def with_warps(plain: nn.Module, tensors: Tensors, x: Tensor) -> Tensor:
    """The prediction where each layer's weight and bias is multiplied by T."""
    own = {name.replace(".base", ""): value for name, value in tensors.items()}
    warps = {name.removesuffix("warp"): own.pop(name) for name in list(own) if name.endswith(".warp")}
    for layer, warp in warps.items():
        for name in (f"{layer}weight", f"{layer}bias"):
            own[name] = torch.tensordot(warp, own[name], dims=([1], [0]))
    prediction: Tensor = functional_call(plain, own, (x,))
    return prediction


def t_net(given: Given, *, adapt: str = "*") -> Truth:
    """Lee & Choi 2018: T does not adapt."""
    value = value_of(partial(with_warps, given.model), given.loss)
    names = [name for name in given.adapted(adapt) if not name.endswith(".warp")]
    losses = []
    for task in one_by_one(given.tasks):
        theta = given.theta
        for _ in range(given.steps):
            theta = descended(value, theta, names, task.support, given.lr)
        losses.append(value(theta, task.query))
    return same(losses)


def warp_grad(given: Given) -> Truth:
    """Flennerhag et al. 2020, equation 8 with 6: warps learn from one step from each point, all else from the last."""
    value = value_of(partial(with_warps, given.model), given.loss)
    warps = {name: value for name, value in given.theta.items() if name.endswith(".warp")}
    names = [name for name in given.theta if name not in warps]
    values, objective = [], []
    for task in one_by_one(given.tasks):
        path = [{**given.theta, **leaves(warps)}]
        for _ in range(given.steps):
            path.append(descended(value, path[-1], names, task.support, given.lr))
        last, along = value(path[-1], task.query), torch.zeros(())
        for theta in path[:-1]:
            here = {**leaves(theta), **warps}
            along = along + value(descended(value, here, names, task.support, given.lr), task.query) / given.steps
        values.append(last)
        objective.append(last + along)
    return Truth(torch.stack(values), torch.stack(objective))
