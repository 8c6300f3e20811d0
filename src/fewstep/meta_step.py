"""One iteration of Algorithm 2 (Finn et al. 2017): the meta-gradient of a batch of tasks, and Adam's step along it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from fewstep.cuda_graph import Recording
from fewstep.errors import DivergenceError
from fewstep.learner import Learner
from fewstep.task import Task, quickly_flat
from fewstep.unrolled import Unrolled

Average = Callable[[Tensor, int], Tensor]
Gradient = Callable[[Sequence[Tensor]], Sequence[Tensor]]


class MetaStep:
    """`loss = meta_step(tasks, lr)`: the mean query loss after adaptation, a number; the parameters have moved.

    clip : each element of the meta-gradient is cut to [-clip, clip]; None leaves it
    average : `loss = average(loss, number of tasks)`, called once the gradients are there, to average both over several
        processes

    With an engine that compiles the whole step and takes all tasks at once, the step of a plain Adam is part of the
    compiled call, and with one that records a CUDA graph, of the graph: no parameter has a `grad` then, and hooks on
    gradients do not run.

    >>> import fewstep
    >>> model = torch.nn.Linear(1, 1, bias=False)          # L = (w x - y)^2, so w' = w - 2 alpha x (w x - y)
    >>> _ = torch.nn.init.constant_(model.weight, 1.0)
    >>> learner = fewstep.maml(model, torch.nn.functional.mse_loss, lr=0.1)
    >>> step = MetaStep(learner, torch.optim.Adam(learner.parameters()))
    >>> x, y = torch.ones(1, 1, 1), torch.zeros(1, 1, 1)   # w' = 0.8 w; Adam's first step is the rate itself
    >>> tasks = Task(support=(x, y), query=(x, y))
    >>> [round(step(tasks, lr=0.1).item(), 4) for _ in range(2)]
    [0.64, 0.5184]
    """

    def __init__(self, learner: Learner, optimizer: torch.optim.Optimizer, clip: float | None = None,
                 average: Average | None = None) -> None:  # fmt: skip
        self.learner, self.optimizer, self.clip, self.average = learner, optimizer, clip, average
        self._about: Any = None  # what the next four hold for
        self._own: list[Tensor] = []
        self._trained: list[Tensor] = []
        self._flags: list[bool] = []
        self._step: tuple[Any, Callable[..., tuple[Tensor, ...]]] | None = None
        self._counts, self._steps = np.zeros(0), list[Tensor]()

    def __call__(self, tasks: Task, lr: float) -> Tensor:
        """Raises `DivergenceError`, before anything has moved, where the loss or a gradient is not finite."""
        if self.learner.iteration is None:
            self.learner.iteration = 0
        loss = self._moved(tasks, lr)
        self.learner.iteration += 1
        return loss

    def _moved(self, tasks: Task, lr: float) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self._is_one_call(tasks) and (known := self._one_call(tasks, lr)) is not None:
            return known
        self.optimizer.zero_grad()
        loss = self.backward(tasks)
        if self.average is not None:
            loss = self.average(loss, tasks.size)
        gradients = [value.grad.sum() for value in self.learner.parameters() if value.grad is not None]
        _check_finite(torch.stack([loss, *gradients]).sum().isfinite())
        if self.clip is not None:
            torch.nn.utils.clip_grad_value_(self.learner.parameters(), self.clip)
        self.optimizer.step()
        return loss

    def backward(self, tasks: Task) -> Tensor:
        """The mean loss; its gradient is then with each parameter."""
        if self.learner.engine.compile != "step":
            loss = self.learner(tasks).mean()  # lines 4-9
            loss.backward()  # line 10
            return loss.detach()  # type: ignore[no-any-return]
        with self.learner.checked(tasks):
            problem, tensors = self.learner.unrolled(tasks)
            wanted = tuple(i for i in range(len(problem.names)) if tensors[i].requires_grad)
            losses, *gradients = problem.gradient(tensors, wanted, total=True)
        for i, gradient in zip(wanted, gradients, strict=True):
            before, mean = tensors[i].grad, gradient / len(losses)
            tensors[i].grad = mean if before is None else before + mean  # a rule may share a parameter with the model
        return losses.mean()

    def _is_one_call(self, tasks: Task) -> bool:
        whole = self._is_recorded() or self._is_compiled(tasks)
        return whole and self.average is None and _is_plain(self.optimizer)

    def _is_recorded(self) -> bool:
        """Whether the step is a CUDA graph: only what is a function of tensors alone can be."""
        wanted = self.learner.engine.graph and self.learner.unrollable
        return wanted and next(self.learner.parameters()).device.type == "cuda"

    def _is_compiled(self, tasks: Task) -> bool:
        """Whether gradient and Adam are one compiled function."""
        engine = self.learner.engine
        whole = engine.compile == "step" and engine.method == "vmap"
        return whole and (engine.chunk is None or engine.chunk >= tasks.size)

    def _one_call(self, tasks: Task, lr: float) -> Tensor | None:
        """None where the optimizer does not have what is trained, all and nothing else, and alike."""
        with self.learner.checked(tasks) as moment, torch.no_grad():
            group = self.optimizer.param_groups[0]
            beta1, beta2 = group["betas"]
            constants = (beta1, beta2, group["eps"])
            known = self.learner.known(tasks)
            params = [*map(id, group["params"])]
            about = (moment, self.learner.runner, self.learner.steps, known, self.clip, constants, params)
            # Whatever can be found again is: all of this takes longer than the step of a small model.
            if about != self._about or self._flags != [parameter.requires_grad for parameter in self._own]:
                self._record(tasks, about, constants)
            if self._step is None:
                return None
            states = [self._moments(parameter) for parameter in self._trained]
            counts = self._counts_of(states)
            if len(done := {*counts.tolist()}) > 1:  # one was frozen for a while
                return None
            now = done.pop() + 1
            rates = self._own[0].new_tensor([lr / (1 - beta1**now), (1 - beta2**now) ** 0.5])
            averages = [state[key] for key in ("exp_avg", "exp_avg_sq") for state in states]
            tensors = [*self._own, *quickly_flat(tasks)[0], *averages, rates]
            loss, finite = self._run(tensors)
        _check_finite(finite)
        counts += 1
        return loss

    def _record(self, tasks: Task, about: Any, constants: tuple[float, float, float]) -> None:
        """Find what one call is made of; `_step` is None where it cannot be."""
        problem, tensors = self.learner.unrolled(tasks)
        self._own = tensors[: len(problem.names)]
        self._flags = [parameter.requires_grad for parameter in self._own]
        wanted = tuple(i for i, is_trained in enumerate(self._flags) if is_trained)
        self._trained = [self._own[i] for i in wanted]
        # A parameter of the caller's own, behind the loss or the rule, has a gradient in the usual way only.
        held = {id(value) for value in self.optimizer.param_groups[0]["params"] if value.requires_grad}
        once, trained = len(set(map(id, self._own))) == len(self._own), set(map(id, self._trained))
        whole = once and wanted and trained <= held <= trained | set(map(id, self.learner.parameters()))
        gradients_of = self._gradients_of(problem, tasks, wanted)
        adam = partial(_adam, gradients_of, len(tensors), wanted, self.clip, *constants)
        key = ("adam", wanted, self.clip, constants, problem.key)
        step = partial(self._compiled, key, adam) if self._is_compiled(tasks) else adam
        self._step = (key, step) if whole else None
        self._about = about

    def _gradients_of(self, problem: Unrolled, tasks: Task, wanted: tuple[int, ...]) -> Gradient:
        """The losses [B] and their total gradient as a function of the problem's tensors, the way the engine says."""
        if self._is_compiled(tasks):
            return partial(problem.over_tasks, wanted=wanted)
        if self.learner.engine.compile == "step":
            return partial(problem.gradient, wanted=wanted, total=True)
        form = tree_flatten(tasks)[1]

        def by_pieces(tensors: Sequence[Tensor]) -> list[Tensor]:
            own = [tensors[i] for i in wanted]
            with torch.enable_grad():
                losses = self.learner.outer(self.learner, tree_unflatten(tensors[len(problem.names) :], form))
                total = losses.sum()
            return [losses.detach(), *torch.autograd.grad(total, own, allow_unused=True, materialize_grads=True)]

        return by_pieces

    def _compiled(self, key: Any, step: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
        return self.learner.runner.call(key, step, tensors, "step")

    def _run(self, tensors: list[Tensor]) -> tuple[Tensor, ...]:
        """The step in one call, recorded where the engine says so and it can be."""
        assert self._step is not None
        key, step = self._step
        if not self._is_recorded():
            return step(*tensors)
        fresh = [*range(len(self._own), len(tensors) - 1 - 2 * len(self._trained)), len(tensors) - 1]
        averages = tensors[fresh[-2] + 1 : -1]
        # What a graph reads and writes has to be where it was.
        places = [part.data_ptr() for part in (*self.learner.parameters(), *self.learner.buffers(), *averages)]
        record = partial(Recording, step, tensors, fresh)
        known = self.learner.runner.recorded("a CUDA graph", (key, *places), tensors, record)
        return (known or step)(*tensors)

    def _counts_of(self, states: Sequence[dict[str, Any]]) -> Any:
        """How many steps each of Adam's states has seen: one NumPy array, of which theirs are views from now on."""
        if [*map(id, own := [state["step"] for state in states])] != [*map(id, self._steps)]:
            steps = torch.stack(own).cpu()  # whoever loads an optimizer may put them elsewhere
            self._counts, self._steps = steps.numpy(), [*steps]
            for state, step in zip(states, self._steps, strict=True):
                state["step"] = step
        return self._counts

    def _moments(self, parameter: Tensor) -> dict[str, Tensor]:
        """Adam's state of a parameter; where there is none yet, as Adam itself starts it."""
        state: dict[str, Tensor] = self.optimizer.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state.update({key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")})
        return state


def _is_plain(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer is Adam as in the paper."""
    if type(optimizer) is not torch.optim.Adam or len(optimizer.param_groups) != 1:
        return False
    group = optimizer.param_groups[0]
    extras = ("weight_decay", "amsgrad", "maximize", "capturable", "fused", "differentiable")
    hooks = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    return not hooks and not any(group[name] for name in extras)


def _check_finite(finite: Tensor) -> None:
    if not finite:
        raise DivergenceError(
            "the loss or the meta-gradient is not finite; lower the inner or the outer learning rate, or clip the "
            "meta-gradient"
        )


def _adam(gradients_of: Gradient, count: int, wanted: tuple[int, ...], clip: float | None, beta1: float, beta2: float,
          eps: float, *inputs: Tensor) -> tuple[Tensor, ...]:  # fmt: skip
    """The loss and whether all is finite, after `torch.optim.Adam`'s step in place (Kingma and Ba 2015, Algorithm 1).

    gradients_of : gives the losses [B] and their total gradient by the tensors at `wanted`
    inputs : the problem's tensors, `count` of them; the moving averages of the gradients by those at `wanted`, and of
        their squares; and the two numbers lr / (1 - beta1^t) and sqrt(1 - beta2^t)
    """
    tensors, averages, rates = inputs[:count], inputs[count:-1], inputs[-1]
    losses, *gradients = gradients_of(tensors)
    loss = losses.mean()
    finite = torch.stack([loss, *[gradient.sum() for gradient in gradients]]).sum().isfinite()
    for i, total, mean, square in zip(wanted, gradients, averages[: len(wanted)], averages[len(wanted) :], strict=True):
        gradient = total / len(losses)
        if clip is not None:
            gradient = gradient.clamp(-clip, clip)
        new_mean = mean.lerp(gradient, 1 - beta1)
        new_square = beta2 * square + (1 - beta2) * gradient * gradient
        new = tensors[i] - rates[0] * new_mean / (new_square.sqrt() / rates[1] + eps)
        for old, value in ((tensors[i], new), (mean, new_mean), (square, new_square)):
            old.copy_(torch.where(finite, value, old))
    return loss, finite
