"""The outer loop: Adam on the meta-parameters, with checkpoints from which a run goes on to the identical result."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from fewstep.data.episodes import Episodes
from fewstep.diagnose import where_not_finite
from fewstep.errors import DivergenceError
from fewstep.evaluate import Evaluation
from fewstep.learner import Learner
from fewstep.run import Run

Event = dict[str, Any]
Best = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Training:
    """How the meta-parameters are trained.

    lr : beta, Adam's learning rate;  schedule : constant, or a cosine from lr down to 0 at the last iteration
    clip : each element of the meta-gradient is cut to [-clip, clip]; None leaves it
    check_every : iterations between two validations, each followed by a checkpoint;  log_every : between two log lines
    """

    iterations: int
    lr: float = 1e-3
    schedule: Literal["constant", "cosine"] = "constant"
    clip: float | None = None
    check_every: int = 1000
    log_every: int = 100

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
    report: Callable[[Event], None] = lambda event: None,
) -> None:
    """Algorithm 2 of Finn et al. 2017, up to `training.iterations`, starting where the run's last checkpoint stands.

    Raises `KeyboardInterrupt` after saving where Ctrl-C or SIGTERM came, and `DivergenceError`, without saving, where
    a loss or a gradient is not finite.
    """
    optimizer = torch.optim.Adam(learner.parameters(), lr=training.lr)
    step, best, seconds = _resume(learner, optimizer, run)
    started = time.monotonic() - seconds
    with _stop_requested() as stop:
        while step < training.iterations:  # line 2
            tasks = episodes[step]  # lines 3, 5, 8
            optimizer.zero_grad()
            loss = learner(tasks).mean()  # lines 4-9
            loss.backward()  # line 10: the gradient ...
            _check_finite(learner, tasks, loss, step)
            if training.clip is not None:
                torch.nn.utils.clip_grad_value_(learner.parameters(), training.clip)
            for group in optimizer.param_groups:
                group["lr"] = training.lr_at(step)
            optimizer.step()  # ... and the step, by Adam
            step += 1

            at_end = step == training.iterations
            if step % training.log_every == 0 or at_end:
                _log(run, report, {"step": step, "loss": loss.item(), "seconds": round(time.monotonic() - started, 2)})
            if step % training.check_every == 0 or at_end:
                result = validate(learner)
                if best is None or result.worth > best["worth"]:
                    best = {"step": step, "worth": result.worth}
                    run.save_weights("best.safetensors", learner.state_dict(), step)
                by_step = [point["mean"] for point in result.to_json()["by_step"]]
                _log(run, report, {"step": step, f"validation_{result.metric}": by_step, "best_step": best["step"]})
            if step % training.check_every == 0 or at_end or stop.is_set():
                _save(learner, optimizer, run, step, best, time.monotonic() - started)
            if stop.is_set():
                raise KeyboardInterrupt


def _log(run: Run, report: Callable[[Event], None], event: Event) -> None:
    run.log(event)
    report(event)


def _save(
    learner: Learner, optimizer: torch.optim.Optimizer, run: Run, step: int, best: Best | None, seconds: float
) -> None:
    state: dict[str, Any] = {
        "step": step,
        "best": best,
        "seconds": seconds,
        "learner": learner.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda_random"] = torch.cuda.get_rng_state_all()
    run.save_state(state)
    run.save_weights("model.safetensors", learner.state_dict(), step)


def _resume(learner: Learner, optimizer: torch.optim.Optimizer, run: Run) -> tuple[int, Best | None, float]:
    """Set everything to the run's last checkpoint: its step, best validation result and seconds spent."""
    state = run.load_state()
    if state is None:
        run.forget_metrics_after(-1)
        return 0, None, 0.0
    learner.load_state_dict(state["learner"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"])
    if "cuda_random" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda_random"])
    run.forget_metrics_after(state["step"])
    return state["step"], state["best"], state["seconds"]


def _check_finite(learner: Learner, tasks: Any, loss: torch.Tensor, step: int) -> None:
    gradients = [value.grad.sum() for value in learner.parameters() if value.grad is not None]
    if not torch.stack([loss.detach(), *gradients]).sum().isfinite():
        raise DivergenceError(
            f"iteration {step}: {where_not_finite(learner, tasks)}; the last checkpoint is intact. "
            "Lower the inner or the outer learning rate, or clip the meta-gradient"
        )


@contextmanager
def _stop_requested() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set, so that the step at hand ends whole. A second Ctrl-C stops at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def request(signum: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
