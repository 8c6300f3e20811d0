"""Trajectories of all tasks at once, each task's by a policy with parameters of its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from fewstep.errors import InputError
from fewstep.functional import Tensors
from fewstep.rl.baseline import linear_baseline
from fewstep.rl.environments import Environment
from fewstep.rl.experience import Experience, Trajectories
from fewstep.rl.policies import Policy
from fewstep.rl.returns import discounted, generalised_advantages, standardised
from fewstep.rl.watchdog import no_longer_than


@contextmanager
def _one_thread() -> Iterator[None]:
    """Inside, PyTorch computes on one thread: its others would spin on the cores that the physics needs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
@_one_thread()
def rollout(policy: Policy, theta: Tensors, environment: Environment, tasks: Tensor, trajectories: int,
            generators: Sequence[torch.Generator], limit: float | None = None) -> Trajectories:  # fmt: skip
    """`trajectories` of each of the tasks [K, ...].

    theta : the policy's parameters by name, each with a task axis [K, ...]
    generators : one for each task, from which all of its chance comes: how the tasks are cut changes nothing
    limit : seconds that the environment may take for a step of all, see `no_longer_than`
    What is not finite is handed on to nobody: there it ends.
    """
    act, state, shape = policy.acting(theta), None, (len(tasks), trajectories)
    noise = torch.stack([policy.noise((environment.horizon, trajectories), own) for own in generators], 1)
    like = next(iter(theta.values()))
    with no_longer_than(limit):
        seen = environment.reset(tasks, trajectories, generators)
    _check("reset gives observations", seen, (*shape, environment.observations))
    seen = seen.to(like, copy=True)  # it may write there again
    alive = torch.ones(shape, dtype=torch.bool, device=seen.device)
    steps: list[tuple[Tensor, ...]] = []
    for chance in noise.to(seen):
        outputs, state = act(seen, state)
        actions = policy.act(outputs, chance)
        if seen.isfinite().all() and outputs.isfinite().all():
            with no_longer_than(limit):
                following, rewards, ended = _parts(environment.step(actions))
            _check("step gives observations", following, (*shape, environment.observations))
            _check("step gives rewards", rewards, shape)
            _check("step says what has ended", ended, shape, torch.bool)
        else:
            following, rewards, ended = seen, seen.new_zeros(alive.shape), alive
        steps.append((seen, actions, torch.where(alive, rewards.to(like), 0.0), outputs, alive))
        alive = alive & ~ended.to(alive.device)
        seen = torch.where(alive[..., None], following.to(like), 0.0)  # whatever follows the end, NaN too
        if not alive.any():
            break
    seen, actions, rewards, outputs, mask = [torch.stack(part, 2) for part in zip(*steps, strict=True)]
    lived = seen, actions, rewards, policy.log_prob(outputs, actions), outputs, mask
    return Trajectories(*[_as_long_as(part, environment.horizon) for part in lived])


def _parts(given: object) -> tuple[Tensor, Tensor, Tensor]:
    if not isinstance(given, tuple | list) or len(given) != 3:
        count = f"{len(given)} values" if isinstance(given, tuple | list) else f"a {type(given).__name__}"
        raise InputError(f"the environment's step must give (observations, rewards, ended), but {count} came")
    return given[0], given[1], given[2]


def _check(what: str, given: Tensor, shape: tuple[int, ...], kind: torch.dtype | None = None) -> None:
    """Raise `InputError` unless a tensor of this shape came: what can be broadcast would be so without a word."""
    if isinstance(given, Tensor) and given.shape == shape and kind in (None, given.dtype):
        return
    of = f" of {kind}" if kind else ""
    raise InputError(
        f"the environment's {what} for tasks and trajectories: a tensor{of} {list(shape)} is expected, but "
        f"{shape_of(given)} came"
    )


def shape_of(given: object) -> str:
    """What came, in an error's words."""
    return f"{given.dtype} {list(given.shape)}" if isinstance(given, Tensor) else f"a {type(given).__name__}"


def learned_from(lived: Trajectories, discount: float, decay: float) -> Experience:
    """Advantages over a linear baseline that is fitted to the same trajectories, standardised in each task."""
    values = linear_baseline(lived.observations, discounted(lived.rewards, discount), lived.mask)
    values = torch.where(lived.mask, values, 0.0)
    advantages = standardised(generalised_advantages(lived.rewards, values, discount, decay), lived.mask)
    returns = lived.rewards.sum(-1)
    return Experience(
        lived.observations, lived.actions, advantages, lived.log_probs, lived.outputs, lived.mask, returns
    )


def _as_long_as(part: Tensor, horizon: int) -> Tensor:
    """Filled up with zeros where all trajectories ended early: [K, M, H, ...]."""
    missing = horizon - part.shape[2]
    if not missing:
        return part
    return torch.cat([part, part.new_zeros(*part.shape[:2], missing, *part.shape[3:])], 2)
