"""The networks are those of the authors, layer by layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fewstep
from fewstep import InputError, Task, models
from fewstep.losses import summed_over_ways
from fewstep.models.layers import OffsetNorm
from fewstep.recipes import RECIPES


def tensorflow_conv(x: Tensor, conv: nn.Conv2d, stride: int) -> Tensor:
    """A convolution with SAME padding, straight from its definition: output i sees input i*stride - before + 0..2."""
    size = x.shape[-1]
    out = -(-size // stride)
    before = max((out - 1) * stride + 3 - size, 0) // 2
    assert conv.bias is not None
    wide = torch.zeros(*x.shape[:2], size + 6, size + 6, dtype=x.dtype)
    wide[..., 3 : 3 + size, 3 : 3 + size] = x
    rows = []
    for i in range(out):
        top = 3 + i * stride - before
        columns = []
        for j in range(out):
            left = 3 + j * stride - before
            patch = wide[..., top : top + 3, left : left + 3]
            columns.append(torch.einsum("bchw,ochw->bo", patch, conv.weight) + conv.bias)
        rows.append(torch.stack(columns, -1))
    return torch.stack(rows, -2)


@pytest.mark.parametrize("rms_norm", [False, True])
@pytest.mark.parametrize(("size", "pool"), [(28, False), (28, True), (17, True), (19, False)])
def test_conv4_equals_its_definition(size: int, pool: bool, rms_norm: bool) -> None:
    torch.manual_seed(0)
    net = models.conv4(5, filters=6, channels=2, size=size, pool=pool, rms_norm=rms_norm).double()
    for value in net.parameters():
        value.data += 0.1 * torch.randn_like(value)
    x = torch.randn(3, 2, size, size, dtype=torch.float64)
    hidden = x
    for block in net.blocks:
        assert isinstance(block, models.conv4.__globals__["Block"])
        y = tensorflow_conv(hidden, block.conv, 1 if pool else 2)
        mean, variance = y.mean((0, 2, 3), keepdim=True), y.var((0, 2, 3), keepdim=True, unbiased=False)
        y = functional.relu((y - mean) / (variance + 1e-3).sqrt() + block.norm.offset[:, None, None])
        hidden = functional.max_pool2d(y, 2) if pool else y
    features = hidden.flatten(1) if pool else hidden.mean((2, 3))
    if rms_norm:
        features = features / (features.square().mean(1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(net(x), net.head(features))


def test_features_of_one_length_make_the_first_step_one_of_cosines() -> None:
    net = models.conv4(4, filters=3, size=32, pool=True, rms_norm=True).double()
    for value in net.head.parameters():
        nn.init.zeros_(value)
    x, query = torch.rand(4, 1, 32, 32, dtype=torch.float64), torch.rand(6, 1, 32, 32, dtype=torch.float64)
    adapted = fewstep.maml(net, summed_over_ways, lr=0.01).adapt((x, torch.arange(4)))
    scores = functional.cosine_similarity(net.blocks(query).flatten(1)[:, None], net.blocks(x).flatten(1)[None], dim=2)
    expected = 0.01 * net.head.in_features * (scores - scores.mean(1, keepdim=True))
    torch.testing.assert_close(adapted(query), expected, rtol=1e-4, atol=1e-6)


def test_sizes_are_those_of_the_authors() -> None:
    assert sum(p.numel() for p in models.conv4(5, channels=3, size=84, filters=32, pool=True).parameters()) == 32_773
    assert models.conv4(5, channels=3, size=84, filters=32, pool=True).head.in_features == 800
    assert models.conv4(20).head.in_features == 64


def test_initialisation_is_that_of_the_authors() -> None:
    torch.manual_seed(0)
    net = models.conv4(20)
    assert net.head.weight.std().item() == pytest.approx(1, abs=0.05)
    bound = (6 / (64 * 9 + 64 * 9)) ** 0.5
    conv = net.get_parameter("blocks.1.conv.weight")
    assert 0.98 * bound < conv.abs().max() <= bound
    assert all(not value.any() for name, value in net.named_parameters() if "bias" in name or "offset" in name)
    hidden = models.mlp(1, 1, (200, 200))[3]
    assert isinstance(hidden, nn.Linear)
    assert hidden.weight.abs().max() <= 0.02
    assert hidden.weight.std().item() == pytest.approx(0.0088, abs=2e-4)  # a normal with sigma 0.01 cut at 2 sigma


def test_the_norm_has_an_offset_and_no_scale() -> None:
    norm = OffsetNorm(3)
    assert [name for name, _ in norm.named_parameters()] == ["offset"]
    assert not list(norm.buffers())


def test_the_net_without_convolutions() -> None:
    net = models.mlp(784, 5, (256, 128, 64, 64), norm=True)
    assert [layer.out_features for layer in net if isinstance(layer, nn.Linear)] == [256, 128, 64, 64, 5]
    assert sum(isinstance(layer, OffsetNorm) for layer in net) == 4
    assert net(torch.rand(3, 1, 28, 28)).shape == (3, 5)


def test_impossible_networks() -> None:
    with pytest.raises(InputError, match="size at least 16, but 5, 1, 64 and 8 came"):
        models.conv4(5, size=8)
    with pytest.raises(InputError, match=r"at least one unit, but the widths are \[1, 0, 1\]"):
        models.mlp(hidden=(0,))


def test_a_context_beside_the_input_is_all_that_adapts() -> None:
    learner = RECIPES["omniglot-5way-1shot-context"].learner()
    assert learner.objective.adapted == ["model.context"]
    torch.manual_seed(0)
    net: Any = learner.model
    x, y = torch.rand(5, 1, 28, 28), torch.arange(5)
    zeros = torch.cat([x, torch.zeros(5, 1, 28, 28)], 1)
    assert torch.equal(net(x), net.net(zeros))
    adapted: Any = learner.adapt((x, y), steps=3)
    assert not torch.equal(adapted.context, torch.zeros(1, 28, 28))
    assert all(torch.equal(a, b) for a, b in zip(adapted.net.parameters(), net.net.parameters(), strict=True))
    learner(Task((x[None], y[None]), (x[None], y[None]))).sum().backward()
    assert all(value.grad is not None and value.grad.any() for value in (net.context, net.net.head.weight))
    batch = ({0: torch.export.Dim("batch")},)
    assert torch.equal(torch.export.export(net, (x,), dynamic_shapes=batch).module()(x[:3]), net(x[:3]))
    with pytest.raises(InputError, match=r"inputs of \[14, 14\] came, but the context beside them is of \[28, 28\]"):
        net(x[..., ::2, ::2])
    with pytest.raises(InputError, match=r"needs a shape \[channels, ...\]"):
        models.Beside(nn.Linear(1, 1), ())


def test_features_of_one_length_are_for_convolutions() -> None:
    with pytest.raises(InputError, match="--rms-norm is for --network conv, but resnet12 came; give --no-rms-norm"):
        replace(RECIPES["miniimagenet-5way-1shot-fast"], network="resnet12")  # type: ignore[call-arg]
