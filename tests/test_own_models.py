"""Models that people have: that take derivatives themselves, are mixed, pruned, tied or scripted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fewstep import Task, anil, maml
from fewstep.engine import Engine
from fewstep.errors import InputError
from tests.reference import relative_error
from tests.small import LOOP, Net, draw, gradient, learned, naive_gradient, pruned


class Force(nn.Module):
    """A force field: the slope of an energy."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.energy = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1, bias=False)).double()

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0][:, :2]


def test_a_model_may_take_derivatives_itself() -> None:
    """A leaf that a forward pass makes is no parameter that would be lost."""
    model, tasks = Force(), draw()
    expected = naive_gradient(model, tasks, [name for name, _ in model.named_parameters()])
    assert relative_error(gradient(learned(model, LOOP)), expected) < 1e-12


def test_parts_of_different_precision() -> None:
    class Mixed(Net):
        def forward(self, x: Tensor) -> Tensor:
            hidden: Tensor = self.a(x.float()).tanh()
            return self.head(hidden.double())

    mixed = Mixed()
    mixed.a.float()
    got = gradient(learned(mixed, adapt="b.*"))
    assert relative_error(got.double(), gradient(learned(Net(), adapt="b.*"))) < 1e-5


@pytest.mark.filterwarnings("ignore::fewstep.FallbackWarning")
def test_transformer_layers_in_eval_mode() -> None:
    """Where only the head adapts, nothing tells PyTorch under vmap that their fused path has no second derivative."""

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).double()
            self.out = nn.Linear(4, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.out(self.layer(x).mean(1))
            return result

    tasks = draw()
    x = torch.randn(3, 5, 6, 4, dtype=torch.float64)
    tasks = Task(support=(x, tasks.support[1]), query=(x.flip(1), tasks.query[1]))
    grads = [gradient(learned(Encoder().eval(), engine, adapt="out.*"), tasks) for engine in (Engine(), LOOP)]
    assert relative_error(*grads) < 1e-12


def test_clear_words_for_models_and_rates_that_do_not_go() -> None:
    with pytest.raises(InputError, match=r"fewstep\.meta_sgd"):
        maml(Net(), functional.mse_loss, lr=torch.tensor(0.1))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"torch.jit.*hand in the module"):
        maml(torch.jit.script(nn.Sequential(nn.Linear(4, 2))), functional.mse_loss, lr=0.1)
    with pytest.raises(InputError, match=r"'weight' is complex.*view_as_real"):
        maml(nn.Linear(4, 2, dtype=torch.complex64), functional.mse_loss, lr=0.1)
    model = nn.Module()
    model.embedding, model.head = nn.Embedding(7, 4), nn.Linear(4, 7)
    model.head.weight = model.embedding.weight
    with pytest.raises(InputError, match=r"'head\.weight' of the head is a parameter of the body as well"):
        anil(model, functional.cross_entropy, lr=0.1)
    with pytest.raises(
        InputError, match=r"'head\.weight' is the same parameter as 'embedding\.weight', which does not"
    ):
        maml(model, functional.cross_entropy, lr=0.1, adapt="head.*")


def test_a_pruned_model_adapts() -> None:
    model = pruned(Net())
    learner, tasks = learned(model), draw()
    assert gradient(learner).isfinite().all()
    x, y = tasks.support
    adapted = learner.adapt((x[0], y[0]))
    expected = learner.path(Task(tasks.support, tasks.support))[-1].prediction
    assert expected is not None
    assert torch.allclose(adapted(x[0]), expected[0])
