"""A pass over what Inductor compiles for a CPU: what belongs to a channel is computed once a channel.

Inductor writes `(x - mean) / sqrt(variance + eps)` as one loop over the elements of x, and the root goes along into
each loop that reads it: root and division for every element, several times over. Where a small result is spread over
something much larger, it is written to memory here. Imported only to compile: Inductor takes long to import.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from fewstep import mending

TIMES, LARGE = 16, 2**14  # as many times larger, and elements: below, another loop costs more than it spares


class Hoist(CustomGraphPass):
    """Have small results that spread over large ones computed for themselves."""

    def __call__(self, graph: fx.Graph) -> None:
        for node in list(graph.nodes):
            if _spreads(node):
                value = node.meta["val"]
                with graph.inserting_after(node):
                    # As it is; but Inductor gives its argument a place in memory.
                    form = (node, list(value.shape), list(value.stride()), 0)
                    held = graph.call_function(torch.ops.aten.as_strided.default, form)
                held.meta["val"] = value
                node.replace_all_uses_with(held, delete_user_cb=lambda user, own=held: user is not own)

    def uuid(self) -> bytes:
        """What names this pass in the cache of compiled code."""
        return get_hash_for_files((__file__, mending.__file__))  # and what is mended, for which there is no other name


def _spreads(node: fx.Node) -> bool:
    """Whether the node computes, element by element, something small that a larger result is made of."""
    value = node.meta.get("val")
    if torch.Tag.pointwise not in getattr(node.target, "tags", ()) or not isinstance(value, Tensor):
        return False
    least = max(TIMES * value.numel(), LARGE)
    results = [user.meta.get("val") for user in node.users]
    spread = any(isinstance(result, Tensor) and result.numel() >= least for result in results)
    return spread and value.numel() > 1 and value.is_contiguous()
