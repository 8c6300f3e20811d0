"""Meta-gradients against the naive float64 loop, finite differences and closed forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from fewstep import Learner, Task, maml
from fewstep.functional import matching
from tests.cases import CASES, Case
from tests.reference import meta_gradient, naive_losses, relative_error

ENGINES: dict[str, dict[str, Any]] = {
    "batched": {},
    "looped": {"engine": "loop"},
    "chunked": {"chunk": 2},
}
by_name = {"ids": lambda value: getattr(value, "name", None)}


def both_gradients(
    case: Case, steps: int, first_order: bool = False, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ours and the naive one, by all parameters of the model."""
    model, tasks = case.build(), case.tasks()
    parameters = list(model.parameters())
    learner = maml(model, case.loss, lr=case.lr, steps=steps, adapt=case.adapt, **options)
    adapted = matching([name for name, _ in model.named_parameters()], case.adapt)
    naive = naive_losses(model, case.loss, tasks, lr=case.lr, steps=steps, adapted=adapted, first_order=first_order)
    return meta_gradient(learner(tasks), parameters), meta_gradient(naive, parameters)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("steps", [0, 1, 3, 10])
@pytest.mark.parametrize("case", CASES, **by_name)
def test_exact_meta_gradient_equals_the_naive_loop(case: Case, steps: int, engine: str) -> None:
    if not case.batched and engine != "looped":
        pytest.skip(f"vmap has no rule for {case.name}: the loop engine is for it")
    ours, naive = both_gradients(case, steps, **ENGINES[engine])
    assert relative_error(ours, naive) < 1e-9
