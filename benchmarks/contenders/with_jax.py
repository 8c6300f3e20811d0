"""JAX: the jitted gradient of the query loss, over the tasks by `vmap`, `lax.map` or a loop of single tasks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.contenders import RATE
from benchmarks.workloads import Workload

NEEDS = "jax"


def variants(workload: Workload) -> dict[str, dict[str, Any]]:
    """Ways over the tasks, and for pictures the layouts of the convolution."""
    over = ["vmap"] if workload.device == "cuda" else ["map", "vmap", "loop"]
    if workload.name in ("sinusoid", "transformer"):
        return {way: {"over": way} for way in over}
    pairs = [(way, "patches") for way in over]
    # Its own convolutions take 4 to 14 times as long in a map or vmap on a CPU, a minute a step for Mini-ImageNet.
    pairs += [("vmap", "NHWC")] if workload.device == "cuda" else [("loop", "NHWC"), ("loop", "NCHW")]
    return {f"{way}, {layout}": {"over": way, "layout": layout} for way, layout in pairs}


class JaxContender:
    """Weights and tasks are copied from the workload once; each call is one jitted function (one a task in a loop)."""

    def __init__(self, workload: Workload, over: str, layout: str) -> None:
        import jax
        import optax

        from benchmarks.contenders.jax_models import MODELS, to_jax, to_torch

        kind = "conv4" if "conv" in type(workload.model).__name__.lower() else type(workload.model).__name__.lower()
        model = MODELS[kind](workload, layout)
        self.names = [name for name, _ in workload.model.named_parameters()]
        self.back = to_torch
        self.theta = to_jax(workload.model)
        (support_x, support_y), (query_x, query_y) = workload.tasks
        self.tasks = tuple(
            jax.numpy.asarray(part.numpy().astype("int32") if part.dtype == torch.int64 else part.numpy())
            for part in (support_x, support_y, query_x, query_y)
        )
        self.gradients: Any
        self.whole: Any
        gradient = jax_gradient(workload, model, over)
        optimizer = optax.adam(RATE)
        self.state = optimizer.init(self.theta)

        def update(gradients: Any, state: Any, theta: Any) -> Any:
            updates, state = optimizer.update(gradients, state, theta)
            return optax.apply_updates(theta, updates), state

        if over == "loop":
            self.single, self.update = jax.jit(gradient), jax.jit(update, donate_argnums=(1, 2))
            add = jax.jit(lambda a, b: jax.tree.map(lambda x, y: x + y, a, b), donate_argnums=0)
            parts = [tuple(part[i] for part in self.tasks) for i in range(workload.tasks.size)]

            def gradients(theta: Any, _: Any) -> Any:
                total = self.single(theta, parts[0])
                for part in parts[1:]:
                    total = add(total, self.single(theta, part))
                return total

            self.gradients = gradients
            self.whole = lambda theta, state, tasks: self.update(gradients(theta, tasks), state, theta)
        else:
            self.gradients = jax.jit(gradient)
            self.whole = jax.jit(
                lambda theta, state, tasks: update(gradient(theta, tasks), state, theta), donate_argnums=(0, 1)
            )

    def gradient(self) -> Tensor:
        found = self.gradients(self.theta, self.tasks)
        return torch.cat([self.back(found[name]).flatten() for name in self.names])

    def meta_gradient(self) -> None:
        import jax

        jax.block_until_ready(self.gradients(self.theta, self.tasks))

    def step(self) -> None:
        import jax

        self.theta, self.state = jax.block_until_ready(self.whole(self.theta, self.state, self.tasks))


def jax_gradient(workload: Workload, model: Any, over: str) -> Any:
    """(theta, tasks) -> the gradient of the summed query losses; of one task for a loop."""
    import jax

    names, lr, steps = workload.adapted, workload.lr, workload.steps

    def query_loss(theta: Any, task: Any) -> Any:
        support_x, support_y, query_x, query_y = task

        def support_loss(moving: Any) -> Any:
            return model({**theta, **moving}, support_x, support_y)

        moving = {name: theta[name] for name in names}
        for _ in range(steps):
            slope = jax.grad(support_loss)(moving)
            moving = {name: value - lr * slope[name] for name, value in moving.items()}
        return model({**theta, **moving}, query_x, query_y)

    def by_vmap(theta: Any, tasks: Any) -> Any:
        return jax.grad(lambda t: jax.vmap(query_loss, in_axes=(None, 0))(t, tasks).sum())(theta)

    def by_map(theta: Any, tasks: Any) -> Any:
        def add(total: Any, task: Any) -> Any:
            return jax.tree.map(lambda a, b: a + b, total, jax.grad(query_loss)(theta, task)), None

        return jax.lax.scan(add, jax.tree.map(jax.numpy.zeros_like, theta), tasks)[0]

    return {"vmap": by_vmap, "map": by_map, "loop": jax.grad(query_loss)}[over]


def build(workload: Workload, over: str, layout: str = "NHWC") -> JaxContender:
    """`layout` matters for pictures only."""
    return JaxContender(workload, over, layout)
