"""A pass of Inductor that lets kernels cast what torchao's rowwise recipe casts along its columns.

Inductor's casts to the column form, or to both forms of one operand, reach 28 to 56 % of a copy's bandwidth on an
H100, the kernels of benchmarks/rowwise_casts_kernel.py 54 to 66 % (LOG.md). The pass comes after autograd and after
Inductor's own passes, so that FSDP and recomputation need nothing else: it sees the graphs of the forward and of the
backward, finds torchao's casts in them (benchmarks/cast_pattern.py) and puts an operator (benchmarks/cast_op.py) in
their place. The row form alone stays with Inductor, which reaches 70 to 95 %. A pattern that is not exactly torchao's
is left alone: under DTensor's tensor parallelism too, where the amaxes over a divided dimension are those of all ranks.
Each graph's counts are a line of the logger "cast_pass", at level INFO.

With `emulate_precision_casts`, as torchtitan has it for rowwise, results are equal bit for bit to those without the
pass (tests/test_cast_pass.py: on a CPU, and with -m gpu on a GPU). Without it, Inductor does not round an operand to
bf16 that it computes while it casts; the kernels read it rounded, as eager torch does.

Off by default. On from here, while models compile, their backwards too:

    enable()                         or, for a while:    with casts_replaced(): ...

or by the environment: FP8GATE_CAST_PASS=1, in programs that call `enable_if_asked()`: benchmarks/train_llama.py does.

It lies in benchmarks/ while it is not known whether it pays in a layer: benchmarks/block_settings.py measures that.
What pays is to become src/fp8gate/casts, beside src/fp8gate/torchtitan, since training code imports it.
"""

from __future__ import annotations

import contextlib
import logging
import operator
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import cast_op
import cast_pattern
import torch
from cast_pattern import Cast, UnknownPatternError, float8_nodes, read_cast
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node
from torch.fx.node import map_arg

Operands = Literal["in memory", "in both forms", "any"]
"""Which operands the kernels cast. Those that are in memory anyway, those too that are cast to both forms, or any: an
operand that Inductor could compute while it casts is then written for the kernels, which a layer has to show to pay."""

LEAST_ELEMENTS = 4096 * 4096
"""Of an operand: from this size on the kernels were measured to be faster; at 8192 x 1024 they win little."""
ALIGNMENT = 16  # the kernels take multiples of it alone, and so does torch._scaled_mm
VARIABLE = "FP8GATE_CAST_PASS"

aten, prims = torch.ops.aten, torch.ops.prims
PRODUCTS = frozenset(
    {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten._scaled_mm.default}
)
ATTENTION = "_scaled_dot_product_"  # the names of its operators begin so
VIEWS = frozenset({aten.reshape.default, aten.view.default, aten.permute.default, operator.getitem})
SOURCES = (__file__, str(cast_pattern.__file__), str(cast_op.__file__))  # kernels are no part of a graph

log = logging.getLogger(__name__)
GraphPass = Callable[[Graph], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """The float8 casts of one graph. left: how many were left to Inductor, by reason."""

    replaced: int
    left: Mapping[str, int]

    @property
    def seen(self) -> int:
        return self.replaced + sum(self.left.values())

    def __str__(self) -> str:
        left = "; ".join(f"{count} {reason}" for reason, count in sorted(self.left.items()))
        return f"{self.replaced} of {self.seen} float8 casts replaced" + (f"; left to Inductor: {left}" if left else "")


class CastPass(CustomGraphPass):
    """The pass. before: what runs first."""

    def __init__(self, *, operands: Operands, least_elements: int, before: GraphPass | None) -> None:
        self.operands, self.least_elements, self.before = operands, least_elements, before

    def __call__(self, graph: Graph) -> None:
        if self.before:
            self.before(graph)
        counts = replace_casts(graph, operands=self.operands, least_elements=self.least_elements)
        if counts.seen:
            log.info("%s", counts)

    def uuid(self) -> object | None:
        """Part of the key in Inductor's cache of graphs. None, for no caching, if the pass before this has none."""
        own = get_hash_for_files(SOURCES, f"{self.operands} {self.least_elements}")
        if self.before is None:
            return own
        before = self.before.uuid() if isinstance(self.before, CustomGraphPass) else None
        return (own, before) if before else None


def enable(*, operands: Operands = "in memory", least_elements: int = LEAST_ELEMENTS) -> None:
    """Turn the pass on for all that compiles from now on.

    Raises ValueError if it is on already, or if Inductor has a pass that it cannot follow.
    """
    inductor_config.post_grad_custom_post_pass = _joined(operands, least_elements)


@contextlib.contextmanager
def casts_replaced(*, operands: Operands = "in memory", least_elements: int = LEAST_ELEMENTS) -> Iterator[None]:
    """Turn the pass on inside. A backward compiles when it first runs, so let it run inside.

    Raises as `enable` does.
    """
    with inductor_config.patch({"post_grad_custom_post_pass": _joined(operands, least_elements)}):
        yield


def enable_if_asked(environment: Mapping[str, str] = os.environ) -> bool:
    """Turn the pass on if FP8GATE_CAST_PASS is 1. Raises ValueError for what is neither 1, nor 0, nor empty."""
    value = environment.get(VARIABLE, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{VARIABLE}: expected 1, or 0; got {value!r}")
    if value == "1":
        enable()
    return value == "1"


def _joined(operands: Operands, least_elements: int) -> CastPass:
    """The pass, after the one that Inductor has already."""
    before: Any = inductor_config.post_grad_custom_post_pass
    if isinstance(before, CastPass):
        raise ValueError("post_grad_custom_post_pass: the casts are replaced already")
    if before is not None and not _takes_a_graph_alone(before):
        raise ValueError(f"post_grad_custom_post_pass: expected a pass that takes a graph; got {before!r}")
    return CastPass(operands=operands, least_elements=least_elements, before=before)


def _takes_a_graph_alone(one: Any) -> bool:
    """Newer releases also have lists of passes, and passes that are told whether they see an inference."""
    return callable(one) and not any(kind.__name__ == "CustomInferenceAwareGraphPass" for kind in type(one).__mro__)


def replace_casts(graph: Graph, *, operands: Operands, least_elements: int) -> Counts:
    """Replace the casts that the kernels do better, and count."""
    left: Counter[str] = Counter()
    forms: defaultdict[tuple[Node, int, int, bool], list[Cast]] = defaultdict(list)
    for node in float8_nodes(graph):
        try:
            cast = read_cast(node)
        except UnknownPatternError as error:
            left[f"unknown: {error}"] += 1
            continue
        forms[cast.operand, cast.m, cast.k, cast.powers_of_two].append(cast)
    replaced = 0
    order = {node: position for position, node in enumerate(graph.nodes)}
    for casts in forms.values():
        if why := _why_left(casts, operands, least_elements):
            left[why] += len(casts)
            continue
        _replace(graph, casts, before=min((cast.amax for cast in casts), key=order.__getitem__))
        replaced += len(casts)
    return Counts(replaced=replaced, left=left)


def _why_left(casts: list[Cast], operands: Operands, least_elements: int) -> str | None:
    """Why Inductor casts an operand better, or as well; None if the kernels do."""
    one = casts[0]
    if all(cast.form == "row" for cast in casts):
        return "of the row form alone"
    if one.m * one.k < least_elements:
        return f"of fewer than {least_elements} elements"
    if one.m % ALIGNMENT or one.k % ALIGNMENT:
        return f"of sizes that are no multiples of {ALIGNMENT}"
    if not cast_op.has_operators(one.operand.meta["val"].device):
        return "on a device without kernels for them"
    computed_too = operands == "any" or (operands == "in both forms" and any(cast.form == "row" for cast in casts))
    if not computed_too and not is_in_memory(one.operand):
        return "of an operand that Inductor can compute while it casts"
    return None


def is_in_memory(operand: Node) -> bool:
    """Whether the operand is in memory whatever casts it: then the kernels add no write of it.

    It is if it comes from outside the graph, or from what Inductor does not write as a loop of its own, or goes there.
    """
    source = operand
    while source.target in VIEWS:
        source = source.args[0]  # type: ignore[assignment]
    return _is_opaque(source) or any(map(_is_opaque, _users_behind_views(operand)))


def _users_behind_views(node: Node) -> Iterator[Node]:
    for user in node.users:
        if user.target in VIEWS:
            yield from _users_behind_views(user)
        else:
            yield user


def _is_opaque(node: Node) -> bool:
    """An input or output of the graph, a product, attention, a collective, or any operator from outside torch."""
    if node.op != "call_function":
        return True
    if not isinstance(node.target, torch._ops.OpOverload):
        return isinstance(node.target, torch._ops.HigherOrderOperator)
    namespace, name = node.target.namespace, node.target._opname
    return namespace not in ("aten", "prims") or node.target in PRODUCTS or name.startswith(ATTENTION)


def _replace(graph: Graph, casts: list[Cast], before: Node) -> None:
    """Let one operator do the casts of an operand."""
    one = casts[0]
    new: dict[Node, Node] = {}
    with graph.inserting_before(before):
        data, amaxes = _put_operator(graph, one, both=any(cast.form == "row" for cast in casts))
        for cast in casts:
            shape = list(cast.amax.meta["val"].shape)
            new[cast.amax] = _call(graph, aten.reshape.default, amaxes[cast.form], shape)
        for cast in casts:
            new.update((stored, _in_shape_of(graph, cast, data[cast.form])) for stored in cast.stored)
    for old, instead in new.items():
        _exchange(graph, old, instead)


def _put_operator(graph: Graph, cast: Cast, *, both: bool) -> tuple[dict[str, Node], dict[str, Node]]:
    """The operator, and what it gives for each form: the data, and the amaxes in bf16."""
    operator_ = torch.ops.fp8gate.cast_both_forms if both else torch.ops.fp8gate.cast_column_form
    operand = _call(graph, aten.reshape.default, cast.operand, [cast.m, cast.k])
    results = _call(graph, operator_.default, operand, cast.powers_of_two)
    parts = {"row": cast.m, "column": cast.k} if both else {"column": cast.k}
    data = {form: _call(graph, operator.getitem, results, i) for i, form in enumerate(parts)}
    bits = _call(graph, operator.getitem, results, len(parts))
    bits = _call(graph, prims.convert_element_type.default, bits, torch.int16)
    found = _call(graph, aten.view.dtype, bits, torch.bfloat16)
    amaxes, start = {}, 0
    for form, length in parts.items():
        amaxes[form] = _call(graph, aten.slice.Tensor, found, 0, start, start + length)
        start += length
    return data, amaxes


def _in_shape_of(graph: Graph, cast: Cast, data: Node) -> Node:
    """Data (M, K), or transposed data (K, M), as what they replace has them."""
    if cast.form == "column":
        return data
    if cast.is_transposed:
        return _call(graph, aten.permute.default, data, [1, 0])
    return _call(graph, aten.reshape.default, data, list(cast.data.meta["val"].shape))


def _call(graph: Graph, target: Callable[..., Any], *args: Any) -> Node:
    """A call, and what is known of its result."""
    node = graph.call_function(target, args)
    node.meta["val"] = target(*map_arg(args, lambda argument: argument.meta["val"]))
    return node


def _exchange(graph: Graph, old: Node, new: Node) -> None:
    """Let all that uses the old node use the new one, and erase what nothing uses any more."""
    old.replace_all_uses_with(new)
    unused, erased = [old], set()
    while unused:
        node = unused.pop()
        if node.op == "call_function" and not node.users and node not in erased:
            unused += node.all_input_nodes
            graph.erase_node(node)
            erased.add(node)
