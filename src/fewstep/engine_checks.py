"""What an engine asks of the learner that it computes: `InputError` where the two cannot go together."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from fewstep.engine import Engine
from fewstep.errors import FallbackWarning, InputError
from fewstep.long_loop import Memory
from fewstep.updates.common import evaluations

SLOW = "this processor has no units for bfloat16, which takes far longer than float32 here"


def check_engine(engine: Engine, learner: Any) -> None:
    """Raise `InputError` where a `Learner` cannot be computed in this way."""
    if engine.compile == "step" and not learner.unrollable:
        raise InputError(
            "finite differences, segment and offload, and outer objectives other than the last step's work step "
            "by step: use compile='pieces'"
        )
    if engine.keep and learner.memory != Memory():
        raise InputError("segment and offload keep less for the backward pass, the engine's keep=True more: choose")
    if engine.precision == "full":
        return
    if learner.derivative == "finite_difference":
        raise InputError("finite differences of bfloat16 are noise; use another derivative or precision='full'")
    own = learner.objective.parameters(learner.objective.adapted)
    if any(value.dtype == torch.float64 for value in own):
        raise InputError("autocast leaves float64 as it is: take model.float(), or precision='full'")
    warn_if_slow(own[0].device)


def warn_if_slow(device: torch.device) -> None:
    """Say so where bfloat16 has no units of its own."""
    known = torch.cpu.get_capabilities()
    if device.type == "cpu" and not any(known.get(name, True) for name in ("avx512_bf16", "amx_bf16")):
        warnings.warn(SLOW, FallbackWarning, stacklevel=4)


def check_rule(learner: Any) -> None:
    """Raise `InputError` where an update rule depends on a parameter that it does not hold.

    A whole step as one function of tensors would have no derivative by it.
    """
    rule, adapted = learner.update, learner.objective.adapted
    start = {name: value.detach() for name, value in zip(adapted, learner.objective.parameters(adapted), strict=True)}
    gradient = {name: torch.zeros_like(value).unsqueeze(0) for name, value in start.items()}
    theta, state = start, None
    own = {name: value.detach() for name, value in rule.named_parameters()} if isinstance(rule, nn.Module) else {}
    with torch.enable_grad():
        for step in range(learner.steps):
            for _ in range(evaluations(rule, step)):
                given = (theta, gradient, state, step)
                theta, state = functional_call(rule, own, given) if isinstance(rule, nn.Module) else rule(*given)
                theta = learner.objective.in_order(theta, start, 1)
    if any(value.requires_grad for value in theta.values()):
        raise InputError(
            "the update rule depends on a parameter that it does not hold, whose gradient compile='step' would lose; "
            "make the rule an nn.Module that holds it, or use compile='pieces'"
        )
