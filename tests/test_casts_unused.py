"""Amaxes of all ranks that nothing uses are erased, and nothing else is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.fx import Graph
from torch.utils.checkpoint import CheckpointPolicy

from fp8gate.casts.graph_pass import replace_casts
from fp8gate.casts.unused import erase_unused_amaxes

aten, prims, c10d = torch.ops.aten, torch.ops.prims, torch.ops._c10d_functional
SAVE, RECOMPUTE = CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE


def make_graph(
    *,
    of: str = "primals_1",
    view: Any = aten.permute.default,
    local: Any = aten.amax.default,
    reduction: str = "max",
    recompute: Any = SAVE,
    is_used: bool = False,
    is_reduction_used: bool = False,
    is_converted: bool = True,
) -> Graph:
    graph = Graph()
    x = graph.placeholder(of)
    found = graph.call_function(local, (graph.call_function(aten.abs.default, (graph.call_function(view, (x,)),)), [1]))
    if is_converted:
        found = graph.call_function(prims.convert_element_type.default, (found, torch.float64))
    reduced = graph.call_function(c10d.all_reduce.default, (found, reduction, "0"))
    wait = graph.call_function(c10d.wait_tensor.default, (reduced,))
    for node in (reduced, wait):
        if recompute is not None:
            node.meta["recompute"] = recompute
    used = [*([wait] if is_used else []), *([reduced] if is_reduction_used else [])]
    graph.output((x, *used))
    return graph


@pytest.mark.parametrize("fields", [{}, {"is_converted": False}, {"view": aten.reshape.default}])
def test_an_amax_of_all_ranks_that_nothing_uses_goes_with_what_it_was_made_of(fields: dict[str, Any]) -> None:
    graph = make_graph(**fields)
    assert erase_unused_amaxes(graph) == 1
    graph.lint()
    assert [node.op for node in graph.nodes] == ["placeholder", "output"]
    assert erase_unused_amaxes(graph) == 0


@pytest.mark.parametrize(
    "fields",
    [
        {"is_used": True},
        {"is_reduction_used": True},
        {"of": "tangents_1"},  # a rank whose weight is not frozen may use it
        {"view": aten.neg.default},  # not of what the graph is given
        {"local": aten.sum.dim_IntList},
        {"reduction": "sum"},
        {"recompute": RECOMPUTE},  # another rank may compute it again, and use it
        {"recompute": None},
    ],
)
def test_any_other_collective_stays(fields: dict[str, Any]) -> None:
    graph = make_graph(**fields)
    before = str(graph)
    assert erase_unused_amaxes(graph) == 0
    assert str(graph) == before


def test_what_others_use_stays_and_so_does_a_collective_that_it_was_made_of() -> None:
    graph = Graph()
    x = graph.placeholder("primals_1")
    size = graph.call_function(aten.abs.default, (x,))
    waits = []
    for _ in range(2):  # both of one operand
        found = graph.call_function(aten.amax.default, (size, [1]))
        waits.append(graph.call_function(c10d.wait_tensor.default, (reduce_max(graph, found),)))
    kept = graph.call_function(aten.amax.default, (size, [0]))
    graph.output((kept,))
    for node in (*waits, *(wait.args[0] for wait in waits)):
        node.meta["recompute"] = SAVE
    assert erase_unused_amaxes(graph) == 2
    graph.lint()
    assert [node.target for node in graph.nodes][1:-1] == [aten.abs.default, aten.amax.default]


def reduce_max(graph: Graph, of: Any) -> Any:
    return graph.call_function(c10d.all_reduce.default, (of, "max", "0"))


def test_the_log_says_how_many() -> None:
    counts = replace_casts(make_graph(), least_elements=0)
    assert str(counts) == "0 of 0 float8 casts replaced; erased: 1 amaxes of all ranks, which nothing uses"
