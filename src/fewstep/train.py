"""The outer loop: Adam on the meta-parameters, with checkpoints from which a run goes on to the identical result."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch

from fewstep.data.episodes import Ahead, Episodes
from fewstep.diagnose import where_not_finite
from fewstep.distributed import (
    average_gradients,
    deserted,
    from_first,
    gathered,
    is_first,
    own_random_numbers,
    rank,
    ranks,
    share,
    start_alike,
)
from fewstep.errors import DivergenceError
from fewstep.evaluate import Evaluation
from fewstep.learner import Learner
from fewstep.meta_step import MetaStep
from fewstep.run import Run, checkpoint_name
from fewstep.task import Task

Event = dict[str, Any]
Best = list[dict[str, Any]]
Step = Callable[[Task, float], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Training:
    """How the meta-parameters are trained.

    lr : beta, Adam's learning rate;  schedule : constant, or a cosine from lr down to 0 at the last iteration
    clip : each element of the meta-gradient is cut to [-clip, clip]; None leaves it
    check_every : iterations between two validations, each followed by a checkpoint;  log_every : between two log lines
    keep : how many of the best validated weights, and of the last ones, are kept; beyond one under `checkpoints/`
    """

    iterations: int
    lr: float = 1e-3
    schedule: Literal["constant", "cosine"] = "constant"
    clip: float | None = None
    check_every: int = 1000
    log_every: int = 100
    keep: int = 1

    def lr_at(self, step: int) -> float:
        if self.schedule == "constant":
            return self.lr
        return self.lr * (1 + math.cos(math.pi * step / self.iterations)) / 2


def train(
    learner: Learner,
    episodes: Episodes,
    training: Training,
    run: Run,
    *,
    validate: Callable[[Learner], Evaluation],
    step_of: Callable[[Learner, Step], Step] = lambda learner, adam: adam,
    report: Callable[[Event], None] = lambda event: None,
) -> None:
    """Algorithm 2 of Finn et al. 2017, up to `training.iterations`, starting where the run's last checkpoint stands.

    step_of : makes of the learner, and of Adam's step along its meta-gradient, what takes an iteration
    Where several processes work together (`fewstep.distributed`), all have to call it, and they share the tasks.
    Raises `KeyboardInterrupt` after saving where Ctrl-C or SIGTERM came, and `DivergenceError`, without saving, where
    a loss or a gradient is not finite.
    """
    optimizer = torch.optim.Adam(learner.parameters(), lr=training.lr)
    step, best, seconds = _resume(learner, optimizer, run)
    started = time.monotonic() - seconds
    device = next(learner.parameters()).device
    ahead = Ahead(episodes, device) if device.type == "cuda" else nullcontext(episodes)
    with _stop_requested() as stop, ahead as drawn:
        together = _Together(learner, stop)
        adam = MetaStep(learner, optimizer, training.clip, together.average if ranks() > 1 else None)
        meta_step = step_of(learner, adam)
        while step < training.iterations:  # line 2
            learner.iteration = step
            tasks = drawn[step]  # lines 3, 5, 8
            with _divergence_explained(learner, tasks if meta_step is adam else None, step):
                loss = meta_step(share(tasks), training.lr_at(step))  # lines 4, 6, 7, 9 and 10, by Adam
            stopped = together.to_stop(told=meta_step is adam)
            step += 1

            at_end = step == training.iterations
            if step % training.log_every == 0 or at_end:
                about = getattr(meta_step, "about", {})  # what else there is to tell of it
                seconds = round(time.monotonic() - started, 2)
                _log(run, report, {"step": step, "loss": loss.item(), "seconds": seconds, **about})
            if step % training.check_every == 0 or at_end:
                result = validate(learner)
                best = _with_best(learner, run, best, {"step": step, "worth": result.worth}, training.keep)
                by_step = [point["mean"] for point in result.to_json()["by_step"]]
                _log(run, report, {"step": step, f"validation_{result.metric}": by_step, "best_step": best[0]["step"]})
            if step % training.check_every == 0 or at_end or stopped:
                _save(learner, optimizer, run, step, best, time.monotonic() - started)
            if stopped:
                raise KeyboardInterrupt


def _with_best(learner: Learner, run: Run, best: Best, now: dict[str, Any], keep: int) -> Best:
    """The best few validated weights and the last few, the best first, each with its file in the run."""
    ranked = sorted([*best, now], key=lambda each: -each["worth"])  # of equals, the earlier one stays ahead
    last = sorted(each["step"] for each in ranked)[-keep:]
    kept = [each for place, each in enumerate(ranked) if place < keep or each["step"] in last]
    if ranked[0] is now:
        run.save_weights("best.safetensors", learner.state_dict(), now["step"])
    if keep > 1:
        run.save_weights(checkpoint_name(now["step"]), learner.state_dict(), now["step"])
    for each in ranked:
        if each not in kept:
            run.delete(checkpoint_name(each["step"]))
    return kept


def _log(run: Run, report: Callable[[Event], None], event: Event) -> None:
    run.log(event)
    if is_first():
        report(event)


def _save(learner: Learner, optimizer: torch.optim.Optimizer, run: Run, step: int, best: Best, seconds: float) -> None:
    device = next(learner.parameters()).device
    state: dict[str, Any] = {
        "step": step,
        "best": best,
        "seconds": seconds,
        "learner": learner.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": torch.stack(gathered(torch.get_rng_state())),  # of each rank
    }
    if device.type == "cuda":
        state["cuda_random"] = gathered(torch.cuda.get_rng_state(device))
    run.save_state(state)
    run.save_weights("model.safetensors", learner.state_dict(), step)
    gathered(None)  # from here on every rank can rely on the files


def _resume(learner: Learner, optimizer: torch.optim.Optimizer, run: Run) -> tuple[int, Best, float]:
    """Set everything to the run's last checkpoint: its step, best validation result and seconds spent."""
    state = from_first(run.load_state)
    if state is None:
        start_alike(learner)
        run.forget_metrics_after(-1)
        return 0, [], 0.0
    learner.load_state_dict(state["learner"])
    optimizer.load_state_dict(state["optimizer"])
    _resume_random(state, next(learner.parameters()).device)
    run.forget_metrics_after(state["step"])
    best = state["best"] if isinstance(state["best"], list) else [state["best"]]  # of before there were several
    return state["step"], [each for each in best if each], state["seconds"]


def _resume_random(state: dict[str, Any], device: torch.device) -> None:
    """Go on with this rank's random numbers; a rank that the run did not have before starts its own."""
    random = state["random"].reshape(-1, torch.get_rng_state().numel())
    if rank() >= len(random):
        own_random_numbers()
        return
    torch.set_rng_state(random[rank()].clone())
    if "cuda_random" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda_random"][rank()], device)


class _Together:
    """What several processes agree on, with Adam in the one message that averages the gradients."""

    def __init__(self, learner: Learner, stop: threading.Event) -> None:
        self.learner, self.stop = learner, stop
        self._stopped = False

    def average(self, loss: torch.Tensor, tasks: int) -> torch.Tensor:
        """Average gradients and loss; from then on all know whether one of them is to stop."""
        loss, stopped = average_gradients(self.learner.parameters(), tasks, loss, self._asked())
        self._stopped = bool(stopped)
        return loss

    def to_stop(self, told: bool) -> bool:
        """Whether one of the processes is to stop. told : `average` has been called for that"""
        if ranks() == 1:
            return self.stop.is_set()
        return self._stopped if told else any(gathered(self._asked()))

    def _asked(self) -> bool:
        return self.stop.is_set() or deserted()


@contextmanager
def _divergence_explained(learner: Learner, tasks: Task | None, step: int) -> Iterator[None]:
    """Say what was not finite, in the words of all tasks, so that several processes say the same.

    tasks : None where they are lived through, and gone
    """
    try:
        yield
    except DivergenceError as error:
        if tasks is None:
            raise DivergenceError(f"iteration {step}: {error}; the last checkpoint is intact") from error
        raise DivergenceError(
            f"iteration {step}: {where_not_finite(learner, tasks)}; the last checkpoint is intact. "
            "Lower the inner or the outer learning rate, or clip the meta-gradient"
        ) from error


@contextmanager
def _stop_requested() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set, so that the step at hand ends whole. A second Ctrl-C stops at once.

    With several processes it does not: their launcher passes Ctrl-C on, so that each may see it twice.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def request(signum: int, frame: Any) -> None:
        if stop.is_set() and ranks() == 1:
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
