"""Adapters: exact at the start, exact gradients, and a base that no task copies."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from benchmarks.memory import peak_allocated
from fewstep import FallbackWarning, InputError, Learner, Task, maml
from fewstep.models import add_lora, merge_lora, trained_state_dict
from fewstep.models.lora import LoRA
from fewstep.task import map_tensors
from tests.reference import meta_gradient, naive_losses, relative_error
from tests.test_attention import ENGINES, every_engine


class Conv1D(nn.Module):
    """As in transformers: a linear layer whose weight is [in, out]."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) / nx**0.5)
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


class Transformer(nn.Module):
    """One layer, with weights in both layouts. tokens [K, time] -> [K, 3]"""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.tokens = nn.Embedding(10, width)
        self.norm = nn.LayerNorm(width)
        self.qkv, self.out = Conv1D(3 * width, width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width, bias=False)
        self.head = nn.Linear(width, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.out((q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v)
        x = x + self.down(functional.gelu(self.up(self.norm(x))))
        result: Tensor = self.head(x.mean(1))
        return result


def adapted_model(width: int = 8) -> nn.Module:
    """Adapters on all layers but the head, away from their start at zero; the head is trained too."""
    torch.manual_seed(0)
    model = add_lora(Transformer(width).double(), "~head", rank=2, alpha=4.0)
    for name, value in model.named_parameters():
        if "lora_b" in name:
            value.data.normal_(std=0.3)
    model.get_submodule("head").requires_grad_(True)
    return model


@pytest.fixture
def tasks() -> Task:
    torch.manual_seed(1)
    x = torch.randint(10, (2, 3, 6, 5))
    y = torch.arange(6).remainder(3).expand(3, -1)
    return Task((x[0], y), (x[1], y))


def test_the_start_is_the_model_itself() -> None:
    torch.manual_seed(0)
    model, x = Transformer().double(), torch.randint(10, (6, 5))
    before = model(x)
    assert add_lora(model, rank=3) is model
    assert torch.equal(model(x), before)
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert trained == {f"{layer}.lora_{ab}" for layer in ("qkv", "out", "up", "down", "head") for ab in "ab"}
    assert all(value.dtype == torch.float64 for value in model.parameters())


@every_engine
@pytest.mark.parametrize("adapt", ["*lora*", "*"])
def test_exact_equals_the_naive_loop(engine: str, adapt: str, tasks: Task) -> None:
    model = adapted_model()
    own = [name for name, value in model.named_parameters() if value.requires_grad]
    learner = maml(model, functional.cross_entropy, lr=0.5, steps=3, adapt=adapt, engine=ENGINES[engine])
    names = [name for name in own if adapt == "*" or "lora" in name]
    naive = naive_losses(model, functional.cross_entropy, tasks, lr=0.5, steps=3, adapted=names)
    parameters = [model.get_parameter(name) for name in own]
    assert len(names) == (10 if adapt == "*" else 8)  # two adapters in each of four layers, and the head
    assert relative_error(meta_gradient(learner(tasks), parameters), meta_gradient(naive, parameters)) < 1e-9


class PaddedGPT2(nn.Module):
    """A small GPT-2 of Hugging Face with fused attention; token 0 is padding. tokens [K, time] -> [K, 3]"""

    def __init__(self, batched: bool) -> None:
        super().__init__()
        transformers = pytest.importorskip("transformers")
        shape = {"n_layer": 2, "n_embd": 8, "n_head": 2, "vocab_size": 10, "n_positions": 8}
        config = transformers.GPT2Config(**shape, use_cache=False, bos_token_id=0, eos_token_id=0)
        self.body = transformers.GPT2Model(config).eval()
        self.head = nn.Linear(8, 3)
        self.batched = batched

    def forward(self, tokens: Tensor) -> Tensor:
        keep = tokens != 0
        mask = keep.long()
        if self.batched:  # as docs/large-models.md says
            seen = keep[:, None, None, :] & torch.ones(5, 5, dtype=torch.bool).tril()
            lowest = torch.finfo(torch.float64).min
            mask = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, lowest)
        states = self.body(tokens, attention_mask=mask).last_hidden_state
        result: Tensor = self.head((states * keep[..., None]).sum(1))
        return result


@every_engine
def test_a_transformer_of_hugging_face_with_padding(engine: str, tasks: Task) -> None:
    """Its own mask, by plain autograd, against the final form of the mask that vmap can take."""
    torch.manual_seed(0)
    model = add_lora(PaddedGPT2(batched=True), "body.*", rank=2).double()
    trained = [name for name, value in model.named_parameters() if value.requires_grad]
    assert len(trained) == 2 * 4 * 2  # four Conv1D in each of two layers
    for name in trained:
        model.get_parameter(name).data.add_(0.1 * torch.randn_like(model.get_parameter(name)))
    tasks = Task(*((x.clamp_min(1).index_fill(2, torch.tensor([4]), 0), y) for x, y in tasks))
    learner = maml(model, functional.cross_entropy, lr=0.5, steps=2, adapt="*lora*", engine=ENGINES[engine])
    parameters = [model.get_parameter(name) for name in trained]
    with pytest.warns(FallbackWarning, match="math kernel"):
        ours = meta_gradient(learner(tasks), parameters)
    model.batched = False  # type: ignore[assignment]
    with sdpa_kernel(SDPBackend.MATH):
        naive = naive_losses(model, functional.cross_entropy, tasks, lr=0.5, steps=2, adapted=trained)
        assert relative_error(ours, meta_gradient(naive, parameters)) < 1e-9


def peak(learner: Learner, tasks: Task) -> int:
    """Bytes that a meta-step allocates at its highest."""
    learner(tasks).sum().backward()  # the look, the gradients: once
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        learner(tasks).sum().backward()
    return peak_allocated(profiler)


def repeated(tasks: Task, times: int) -> Task:
    return map_tensors(lambda leaf: leaf[:1].repeat(times, *[1] * (leaf.dim() - 1)), tasks)  # type: ignore[no-any-return]


@pytest.mark.parametrize("frozen", [True, False])
def test_no_task_has_a_copy_of_the_base(frozen: bool, tasks: Task) -> None:
    """What one more task costs is far less than the base; and more where the base adapts itself."""
    model = adapted_model(width=256) if frozen else Transformer(256).double()
    learner = maml(model, functional.cross_entropy, lr=0.5, steps=2, adapt="*lora*" if frozen else "*")
    base = sum(value.nbytes for name, value in model.named_parameters() if "lora" not in name)
    tasks = map_tensors(lambda leaf: leaf[:, :2, ...], tasks)  # few texts, so that activations are small
    each = (peak(learner, repeated(tasks, 10)) - peak(learner, repeated(tasks, 2))) / 8
    assert each < 0.5 * base if frozen else each > 2 * base


def saved_numbers(loss: Tensor) -> dict[int, int]:
    """The tensors that the graph of `loss` keeps: how many numbers, by address."""
    found: dict[int, int] = {}
    seen: set[Any] = set()
    nodes: list[Any] = [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found.update({t.data_ptr(): t.numel() for t in getattr(node, "saved_tensors", ()) if t is not None})
            nodes += [parent for parent, _ in node.next_functions]
    return found


def test_a_frozen_base_gets_no_gradient_and_nothing_of_it_is_kept(tasks: Task) -> None:
    model = adapted_model()
    learner = maml(model, functional.cross_entropy, lr=0.5, steps=3, adapt="*lora*")
    few, many = (saved_numbers(learner(repeated(tasks, times))) for times in (2, 12))
    frozen = {name: value for name, value in model.named_parameters() if not value.requires_grad}
    assert not {value.data_ptr() for value in frozen.values()} & {*few, *many}
    adapters = sum(value.numel() for name, value in model.named_parameters() if "lora" in name)
    head = sum(value.numel() for value in model.get_submodule("head").parameters())
    batch = 6 * 5 + 6
    # A step keeps the adapters that it started from, but the first, which are shared; the query loss its gradient.
    each = 2 * adapters + adapters + head + batch
    assert sum(many.values()) - sum(few.values()) == pytest.approx(10 * each, rel=0.1)
    learner(tasks).sum().backward()
    assert all(value.grad is None for value in frozen.values())
    assert all(value.grad is not None for value in model.parameters() if value.requires_grad)


def test_an_adapted_model_shares_the_base_and_can_be_merged(tasks: Task) -> None:
    model = adapted_model()
    before = copy.deepcopy(model.state_dict())
    learner = maml(model, functional.cross_entropy, lr=0.5, steps=3, adapt="*lora*")
    x, y = tasks.support[0][0], tasks.support[1][0]
    adapted = learner.adapt((x, y))
    for name, value in adapted.named_parameters():
        assert (value.data_ptr() == model.get_parameter(name).data_ptr()) is (not value.requires_grad)
    assert functional.cross_entropy(adapted(x), y) < functional.cross_entropy(model(x), y)
    expected = adapted(x)
    merged = merge_lora(adapted)
    torch.testing.assert_close(merged(x), expected)
    assert [name for name, _ in merged.named_parameters()] == [name for name, _ in Transformer().named_parameters()]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_layer_used_twice_has_one_adapter_and_a_tied_weight_stays() -> None:
    torch.manual_seed(0)
    layer, embedding = nn.Linear(4, 4).double(), nn.Embedding(4, 4).double()
    last = nn.Linear(4, 4, bias=False).double()
    last.weight = embedding.weight
    model = nn.Sequential(embedding, layer, nn.Tanh(), layer, last)
    add_lora(model, rank=2)
    adapters = [module for module in model if isinstance(module, LoRA)]
    assert len(adapters) == 3
    assert adapters[0] is adapters[1]
    for adapter in adapters:
        adapter.lora_b.data.normal_()
    x, words = torch.arange(4), embedding.weight.clone()
    expected = model(x)
    torch.testing.assert_close(merge_lora(model)(x), expected)
    assert model[1] is model[3] is layer
    assert torch.equal(embedding.weight, words)


@pytest.mark.parametrize("training", [True, False])
def test_modules_that_read_a_layers_weight_see_the_adapter(training: bool) -> None:
    """PyTorch's own transformer layer reads weights past the layers' forward, in eval mode all of them."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    plain = copy.deepcopy(model).train(training)
    add_lora(model, rank=2).train(training)
    for name, value in model.named_parameters():
        if "lora_b" in name:
            value.data.normal_()
    x = torch.randn(3, 5, 8)
    with torch.no_grad():
        result = model(x)
        torch.testing.assert_close(merge_lora(model)(x), result)
        assert (plain(x) - result).abs().max() > 0.01


def test_only_what_is_trained_is_saved(tasks: Task) -> None:
    learner = maml(adapted_model(), functional.cross_entropy, lr=0.5, adapt="*lora*")
    state = trained_state_dict(learner)
    assert set(state) == {name for name, value in learner.named_parameters() if value.requires_grad}
    other = maml(adapted_model(), functional.cross_entropy, lr=0.5, adapt="*lora*")
    for value in other.model.parameters():
        if value.requires_grad:
            value.data.zero_()
    assert other.load_state_dict(state, strict=False).unexpected_keys == []
    assert torch.equal(other(tasks), learner(tasks))


def test_adapters_of_a_base_in_half_precision_are_in_single_precision() -> None:
    torch.manual_seed(0)
    model = add_lora(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)).bfloat16())
    x, y = torch.randn(2, 5, 4).bfloat16(), torch.arange(5).remainder(3).expand(2, 5)
    learner = maml(model, lambda p, y: functional.cross_entropy(p.float(), y), lr=0.1, adapt="*lora*")
    learner(Task((x, y), (x, y))).sum().backward()
    assert {value.dtype for value in model.parameters() if value.requires_grad} == {torch.float32}
    assert model(x).dtype == torch.bfloat16
    assert all(value.dtype == torch.bfloat16 for value in merge_lora(model).parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patterns": "attn*"}, r"'attn\*' matches no linear layer; there are: 0, 2"),
        ({"patterns": "~*"}, "leave no linear layer"),
        ({"rank": 0}, "rank must be at least 1 and alpha above 0 and finite, but 0 and 0.0 came"),
        ({"alpha": float("inf")}, "but 8 and inf came"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        add_lora(nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)), **options)


def test_adapters_go_on_once_and_only_those_that_are_on_come_off() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(InputError, match="no adapters to merge"):
        merge_lora(model)
    with pytest.raises(InputError, match=r"has adapters already; take them in with merge_lora\(model\) first"):
        add_lora(add_lora(model))
