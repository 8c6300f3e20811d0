"""The workloads' models in JAX, with PyTorch's parameters by PyTorch's names. Imported only where JAX is installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax

from benchmarks.workloads import Workload

Array = Any
Model = Callable[[dict[str, Array], Array, Array], Array]
CONVOLUTION = {"NHWC": ("NHWC", "OIHW", "NHWC"), "NCHW": ("NCHW", "OIHW", "NCHW")}


def to_jax(model: torch.nn.Module) -> dict[str, Array]:
    """The parameters as they are: a convolution's weight stays OIHW, XLA transposes it where it wants to."""
    return {name: jnp.array(value.detach().numpy()) for name, value in model.named_parameters()}


def to_torch(value: Array) -> torch.Tensor:
    """A copy."""
    return torch.from_numpy(np.array(value))


def mlp(workload: Workload, layout: str) -> Model:
    """Linear layers with ReLU between them, and the mean squared error."""
    names = [name.rpartition(".")[0] for name, _ in workload.model.named_parameters() if name.endswith("weight")]

    def loss(theta: dict[str, Array], x: Array, y: Array) -> Array:
        for name in names[:-1]:
            x = jax.nn.relu(linear(theta, name, x))
        return ((linear(theta, names[-1], x) - y) ** 2).mean()

    return loss


def conv4(workload: Workload, layout: str) -> Model:
    """Four blocks and a head, and N times the mean cross-entropy."""
    pool = workload.model.blocks[0].norm.pool  # type: ignore[union-attr, index]
    last = layout != "NCHW"  # channels

    def block(theta: dict[str, Array], i: int, x: Array) -> Array:
        x = convolve(x, theta[f"blocks.{i}.conv.weight"], 1 if pool else 2, layout)
        bias, offset = theta[f"blocks.{i}.conv.bias"], theta[f"blocks.{i}.norm.offset"]
        x = x + (bias if last else bias[:, None, None])
        axes = (0, 1, 2) if last else (0, 2, 3)
        mean, variance = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
        x = (x - mean) * lax.rsqrt(variance + 1e-3) + (offset if last else offset[:, None, None])
        window = (1, 2, 2, 1) if last else (1, 1, 2, 2)
        x = jax.nn.relu(x)
        return lax.reduce_window(x, -jnp.inf, lax.max, window, window, "VALID") if pool else x

    def loss(theta: dict[str, Array], x: Array, y: Array) -> Array:
        x = x.transpose(0, 2, 3, 1) if last else x
        for i in range(4):
            x = block(theta, i, x)
        if pool:
            x = (x.transpose(0, 3, 1, 2) if last else x).reshape(x.shape[0], -1)
        else:
            x = x.mean((1, 2) if last else (2, 3))
        logits = linear(theta, "head", x)
        return cross_entropy(logits, y) * logits.shape[-1]

    return loss


def convolve(x: Array, weight: Array, stride: int, layout: str) -> Array:
    """A 3x3 convolution with SAME padding; "patches" is a matrix product with the nine shifted pictures."""
    if layout != "patches":
        return lax.conv_general_dilated(x, weight, (stride, stride), "SAME", dimension_numbers=CONVOLUTION[layout])
    n, height, width, channels = x.shape
    out = [-(-side // stride) for side in (height, width)]
    total = [max((o - 1) * stride + 3 - side, 0) for o, side in zip(out, (height, width), strict=True)]
    x = jnp.pad(x, ((0, 0), *[(t // 2, t - t // 2) for t in total], (0, 0)))
    shifted = [
        x[:, i : i + (out[0] - 1) * stride + 1 : stride, j : j + (out[1] - 1) * stride + 1 : stride]
        for i in range(3)
        for j in range(3)
    ]
    patches = jnp.concatenate(shifted, -1).reshape(-1, 9 * channels)
    matrix = weight.transpose(2, 3, 1, 0).reshape(9 * channels, -1)
    return (patches @ matrix).reshape(n, *out, -1)


def transformer(workload: Workload, layout: str) -> Model:
    """As `benchmarks.transformer`, and the mean cross-entropy."""
    layers, heads = len(workload.model.layers), workload.model.layers[0].heads  # type: ignore[arg-type, index, union-attr]

    def attend(theta: dict[str, Array], name: str, x: Array) -> Array:
        batch, length, width = x.shape
        qkv = linear(theta, f"{name}.qkv", x).reshape(batch, length, 3, heads, width // heads)
        q, k, v = qkv.transpose(2, 0, 3, 1, 4)
        scores = jnp.einsum("bhqd,bhkd->bhqk", q, k) / jnp.sqrt(float(width // heads))
        mixed = jnp.einsum("bhqk,bhkd->bhqd", jax.nn.softmax(scores), v)
        return linear(theta, f"{name}.out", mixed.transpose(0, 2, 1, 3).reshape(batch, length, width))

    def loss(theta: dict[str, Array], tokens: Array, y: Array) -> Array:
        x = theta["token.weight"][tokens] + theta["place"]
        for i in range(layers):
            name = f"layers.{i}"
            x = x + attend(theta, name, norm(theta, f"{name}.norm1", x))
            wide = jax.nn.gelu(linear(theta, f"{name}.wide", norm(theta, f"{name}.norm2", x)), approximate=False)
            x = x + linear(theta, f"{name}.narrow", wide)
        return cross_entropy(linear(theta, "head", norm(theta, "norm", x).mean(1)), y)

    return loss


def linear(theta: dict[str, Array], name: str, x: Array) -> Array:
    return x @ theta[f"{name}.weight"].T + theta[f"{name}.bias"]


def norm(theta: dict[str, Array], name: str, x: Array) -> Array:
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    return (x - mean) * lax.rsqrt(variance + 1e-5) * theta[f"{name}.weight"] + theta[f"{name}.bias"]


def cross_entropy(logits: Array, y: Array) -> Array:
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1).mean()


MODELS: dict[str, Callable[[Workload, str], Model]] = {"sequential": mlp, "conv4": conv4, "transformer": transformer}
