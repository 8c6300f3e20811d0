"""Two graphs out of one: what can be computed at once, and the rest later, with what is kept in between.

Kept is what matrix products, convolutions, random generators and operators of other libraries gave, and what is small.
All else is cheap to compute and dear to write and read, so the later graph computes it again.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

SMALL = 4096  # numbers
_ATEN = torch.ops.aten
DEAR = {_ATEN.mm, _ATEN.bmm, _ATEN.addmm, _ATEN.baddbmm, _ATEN.convolution, _ATEN.convolution_backward}


def split(graph: fx.GraphModule, late: range, early_outputs: int) -> tuple[fx.GraphModule, fx.GraphModule]:
    """`early(*known) -> (outputs, kept)` and `later(*inputs, *kept) -> the other outputs`.

    late : the positions of the inputs that are not known at first
    early_outputs : how many of the outputs, the first ones, are computed at first, from the known inputs only
    The graph writes to nothing in place, and nodes have their shapes in `meta["val"]`, as `make_fx` leaves them.
    """
    ends: Any = next(node for node in graph.graph.nodes if node.op == "output").args[0]
    outputs: list[fx.Node] = list(ends)
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    calls = [node for node in graph.graph.nodes if node.op == "call_function"]
    if written := [str(node.target) for node in calls if _is_mutable(node)]:
        raise RuntimeError(f"the model writes to a tensor of its own ({', '.join(written)}), which cannot be split")
    dependent = _after(graph, {node for number, node in enumerate(inputs) if number in late})
    random = [node for node in calls if _is_random(node) and node not in dependent]  # each draws once, and at first
    kept: dict[fx.Node, None] = {}
    at_once = _behind([*outputs[:early_outputs], *random], lambda node: False, {})
    if at_once & dependent:
        raise RuntimeError("the inner gradient depends on the direction in which its derivative is taken")
    later = _behind(outputs[early_outputs:], lambda node: node in at_once and _is_dear(node), kept)
    order = {node: number for number, node in enumerate(graph.graph.nodes)}
    saved = sorted(kept, key=order.__getitem__)
    known = [node for number, node in enumerate(inputs) if number not in late]
    early = _part(graph, known, at_once, [*outputs[:early_outputs], *saved])
    rest = _part(graph, [*inputs, *saved], later, outputs[early_outputs:])
    return early, rest


def _after(graph: fx.GraphModule, late: set[fx.Node]) -> set[fx.Node]:
    """What depends on `late`. Differentiation starts from `ones_like`, which needs a shape only, and is made so."""
    found = set(late)
    for node in list(graph.graph.nodes):
        if node.target is _ATEN.ones_like.default and node.args[0] in found:
            value = node.meta["val"]
            about = {"dtype": value.dtype, "device": value.device}
            with graph.graph.inserting_before(node):
                ones = graph.graph.call_function(_ATEN.full.default, (list(value.shape), 1), about)
            ones.meta["val"] = value
            node.replace_all_uses_with(ones)
        elif any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _behind(ends: Sequence[fx.Node], is_end: Callable[[fx.Node], bool], found: dict[fx.Node, None]) -> set[fx.Node]:
    """What `ends` are computed from, up to nodes at which `is_end` says that it stops: those go to `found`."""
    seen: set[fx.Node] = set()
    waiting = list(ends)
    while waiting:
        node = waiting.pop()
        if node in seen or node in found:
            continue
        if is_end(node):
            found[node] = None
        else:
            seen.add(node)
            waiting += node.all_input_nodes
    return seen


def _is_dear(node: fx.Node) -> bool:
    """Whether the tensor is rather kept than computed again. Of an operator with several results each is asked for."""
    value = node.meta.get("val")
    if node.op != "call_function" or not isinstance(value, torch.Tensor):
        return False
    source: Any = node.args[0] if node.target is operator.getitem else node
    foreign = getattr(source.target, "namespace", "") not in ("aten", "prims")  # it may draw numbers and not say so
    dear = getattr(source.target, "overloadpacket", None) in DEAR
    return foreign or dear or _is_random(source) or value.numel() <= SMALL


def _is_random(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _is_mutable(node: fx.Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(schema.is_mutable)


def _part(graph: fx.GraphModule, inputs: Sequence[fx.Node], nodes: set[fx.Node],
          outputs: Sequence[fx.Node]) -> fx.GraphModule:  # fmt: skip
    part = fx.Graph()
    copies = {node: part.placeholder(node.name) for node in inputs}
    for node in graph.graph.nodes:
        if node in nodes and node not in copies:
            copies[node] = part.node_copy(node, copies.__getitem__)
    part.output(tuple(copies[node] for node in outputs))
    return fx.GraphModule(graph, part)
