"""What a graph computes for nothing.

In: a graph after Inductor's own passes. Out: the same graph without it.

Under tensor parallelism PyTorch's partitioner computes the amaxes of a weight's columns in the forward, saves the
scales, and may leave a copy of the amaxes and of their all-reduce in the backward, which nothing uses. PyTorch never
removes a collective by itself, as another rank may use the result (pytorch#146045). Of these copies none can: what
needs no gradient, and is marked as to be saved, is in the forward of every rank, and no backward uses it anew.
"""

from __future__ import annotations

import torch
from torch.fx import Graph, Node
from torch.utils.checkpoint import CheckpointPolicy

from fp8gate.casts.pattern import WAIT

COLLECTIVES = "_c10d_functional"
ALL_REDUCE = torch.ops._c10d_functional.all_reduce.default
CONVERT, AMAX = torch.ops.prims.convert_element_type.default, torch.ops.aten.amax.default
VIEWS_AND_ABS = (
    torch.ops.aten.abs.default,
    torch.ops.aten.permute.default,
    torch.ops.aten.reshape.default,
    torch.ops.aten.view.default,
)


def erase_unused_amaxes(graph: Graph) -> int:
    """Erase the amaxes of all ranks that nothing uses. Returns how many there were."""
    waits = [node for node in graph.nodes if _is_unused_amax(node)]
    for wait in waits:
        (reduced,) = wait.all_input_nodes
        (local,) = reduced.all_input_nodes
        graph.erase_node(wait)
        graph.erase_node(reduced)
        erase_unused(graph, local)
    return len(waits)


def erase_unused(graph: Graph, node: Node) -> None:
    """Erase a node that nothing uses, and what only it used; collectives stay."""
    unused, erased = [node], set()
    while unused:
        one = unused.pop()
        if one in erased or one.op != "call_function" or one.users:
            continue
        if getattr(one.target, "namespace", "") != COLLECTIVES:
            unused += one.all_input_nodes
            graph.erase_node(one)
            erased.add(one)


def _is_unused_amax(wait: Node) -> bool:
    if wait.target is not WAIT or wait.users:
        return False
    (reduced,) = wait.all_input_nodes
    if reduced.target is not ALL_REDUCE or len(reduced.users) > 1 or reduced.args[1] != "max":
        return False
    if any(node.meta.get("recompute") is not CheckpointPolicy.MUST_SAVE for node in (wait, reduced)):
        return False
    (local,) = reduced.all_input_nodes
    if local.target is CONVERT and local.args[1] is torch.float64:
        (local,) = local.all_input_nodes
    return local.target is AMAX and _is_of_an_input(local)


def _is_of_an_input(amax: Node) -> bool:
    """Whether the graph is given what the amax is of, such as a weight; not a gradient."""
    (of,) = amax.all_input_nodes
    while of.target in VIEWS_AND_ABS:
        (of,) = of.all_input_nodes
    return of.op == "placeholder" and not of.name.startswith("tangents")
