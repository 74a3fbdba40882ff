"""The pass of Inductor that puts operators in the place of torchao's rowwise casts.

In: a graph of the forward or the backward, after autograd and after Inductor's own passes, so that FSDP and
recomputation need nothing else. Out: the same graph, where each operand that is cast along its columns is cast to all
its forms by one operator (fp8gate.casts.operators), and what was replaced and what was not (`Counts`), which is logged.
The row form alone stays with Inductor, which reaches 70 to 95 % of a copy's bandwidth. A pattern that is not exactly
torchao's (fp8gate.casts.pattern) is left alone. Where scales come of the amaxes of several ranks, or of another graph,
the graph goes on computing them as it did, and another operator casts with them.

An operand that Inductor could compute while it casts is written to memory for the operator. That pays: in decoder
layers with all linears in float8 it is 10 to 17 % faster than replacing only casts of operands that are there anyway.
"""

from __future__ import annotations

import contextlib
import logging
import operator
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from fp8gate.casts import operators, pattern
from fp8gate.casts.operand import ALIGNMENT
from fp8gate.casts.pattern import Cast, OtherRecipeError, UnknownPatternError, float8_nodes, read_cast
from fp8gate.filter.contract.errors import InputError

LEAST_ELEMENTS = 8192 * 1024
"""Of an operand: from this size on the kernels were measured to be faster: there by 18 % for both forms, by 9 % for the
column form (H100)."""
UNKNOWN = "unknown"
SETTING = "post_grad_custom_post_pass"
"""Inductor's setting that holds a pass."""
SOURCES = (__file__, str(pattern.__file__), str(operators.__file__))
"""What a graph depends on; kernels are no part of it."""

aten, prims = torch.ops.aten, torch.ops.prims
VIEWS = (aten.reshape.default, aten.view.default, aten.view.dtype, aten.permute.default, aten.slice.Tensor)
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

    @property
    def is_doubtful(self) -> bool:
        """Whether nothing was replaced, and not for a good reason: then this is not what was measured."""
        return not self.replaced and any(reason.startswith(UNKNOWN) for reason in self.left)

    def __str__(self) -> str:
        left = "; ".join(f"{count} {reason}" for reason, count in sorted(self.left.items()))
        return f"{self.replaced} of {self.seen} float8 casts replaced" + (f"; left to Inductor: {left}" if left else "")


class CastPass(CustomGraphPass):
    """The pass. before: what runs first. strict: a doubtful graph is an UnknownPatternError."""

    def __init__(self, *, least_elements: int, before: GraphPass | None, strict: bool = False) -> None:
        self.least_elements, self.before, self.strict = least_elements, before, strict

    def __call__(self, graph: Graph) -> None:
        if self.before:
            self.before(graph)
        counts = replace_casts(graph, least_elements=self.least_elements)
        if self.strict and counts.is_doubtful:
            raise UnknownPatternError(str(counts))
        if counts.seen:
            log.log(logging.WARNING if counts.is_doubtful else logging.INFO, "%s", counts)

    def uuid(self) -> object | None:
        """Part of the key in Inductor's cache of graphs. None, for no caching, if the pass before this has none."""
        own = get_hash_for_files(SOURCES, f"{self.least_elements} {self.strict}")
        if self.before is None:
            return own
        before = self.before.uuid() if isinstance(self.before, CustomGraphPass) else None
        return (own, before) if before else None


def enable() -> None:
    """Turn the pass on, if it is off. Raises InputError if Inductor has a pass that it cannot follow."""
    if not is_enabled():
        setattr(inductor_config, SETTING, _after_the_present(LEAST_ELEMENTS))


@contextlib.contextmanager
def replaced(*, strict: bool = False, least_elements: int = LEAST_ELEMENTS) -> Iterator[None]:
    """Turn the pass on inside, if it is off. Raises as `enable` does."""
    if is_enabled():
        yield
        return
    with inductor_config.patch({SETTING: _after_the_present(least_elements, strict)}):
        yield


@contextlib.contextmanager
def not_replaced() -> Iterator[None]:
    """Turn the pass off inside, if it is on. What runs before it stays."""
    present = _present()
    with inductor_config.patch({SETTING: present.before if isinstance(present, CastPass) else present}):
        yield


def is_enabled() -> bool:
    return isinstance(_present(), CastPass)


def _present() -> Any:
    return getattr(inductor_config, SETTING)


def _after_the_present(least_elements: int, strict: bool = False) -> CastPass:
    """The pass, after the one that Inductor has already."""
    before = _present()
    if before is not None and not _takes_a_graph_alone(before):
        raise InputError(
            f"torch._inductor.config.{SETTING}: expected none, or one pass that takes a graph alone; got {before!r}. "
            "Set it to None, or to a function of a graph, before float8 casts are to be replaced"
        )
    return CastPass(least_elements=least_elements, before=before, strict=strict)


def _takes_a_graph_alone(one: Any) -> bool:
    """Newer releases also have lists of passes, and passes that are told whether they see an inference."""
    return callable(one) and not any(kind.__name__ == "CustomInferenceAwareGraphPass" for kind in type(one).__mro__)


def replace_casts(graph: Graph, *, least_elements: int) -> Counts:
    """Replace the casts that the kernels do better, and count."""
    left: Counter[str] = Counter()
    forms: defaultdict[tuple[Node | None, ...], list[Cast]] = defaultdict(list)
    for node in float8_nodes(graph):
        try:
            cast = read_cast(node)
        except OtherRecipeError as error:
            left[str(error)] += 1
            continue
        except UnknownPatternError as error:
            left[f"{UNKNOWN}: {error}"] += 1
            continue
        forms[cast.operand, cast.scale if cast.amax is None else None].append(cast)
    replaced = 0
    for casts in forms.values():
        if why := _why_left(casts, least_elements):
            left[why] += len(casts)
            continue
        if casts[0].amax is None:
            _replace_data(graph, casts)
        else:
            _replace_amaxes_and_data(graph, casts)
        replaced += len(casts)
    return Counts(replaced=replaced, left=left)


def _why_left(casts: list[Cast], least_elements: int) -> str | None:
    """Why Inductor casts an operand better, or as well; None if the kernels do."""
    one = casts[0]
    if all(cast.form == "row" for cast in casts):
        return "along rows alone, which it does well"
    if one.m * one.k < least_elements:
        return f"of fewer than {least_elements} elements"
    if one.m % ALIGNMENT or one.k % ALIGNMENT:
        return f"of sizes that are no multiples of {ALIGNMENT}"
    if any(cast.powers_of_two != one.powers_of_two for cast in casts):
        return "of an operand that is cast both with and without powers of two"
    if _leave_more_than_once(casts):
        return "of data that leave the graph more than once"
    if not operators.has_operators(one.operand.meta["val"].device):
        return "on a device without kernels for them"
    return None


def _leave_more_than_once(casts: list[Cast]) -> bool:
    """Whether several results of a form leave the graph: they are tensors of their own, and would become one."""
    leaving = Counter(cast.form for cast in casts for stored in cast.stored if _leaves(stored))
    return any(count > 1 for count in leaving.values())


def _leaves(node: Node) -> bool:
    return any(user.op == "output" or (user.target in VIEWS and _leaves(user)) for user in node.users)


def _replace_data(graph: Graph, casts: list[Cast]) -> None:
    """Let an operator cast to the column form with the scales that there are."""
    for cast in casts:
        with graph.inserting_before(cast.data):
            operand = _call(graph, aten.reshape.default, cast.operand, [cast.m, cast.k])
            scales = _call(graph, aten.reshape.default, cast.scale, [cast.k])
            data = _call_operator(graph, torch.ops.fp8gate.cast_column_form_with_scales, operand, scales)
        for stored in cast.stored:
            _exchange(graph, stored, data)


def _replace_amaxes_and_data(graph: Graph, casts: list[Cast]) -> None:
    """Let one operator do the casts of an operand."""
    new: dict[Node, Node] = {}
    amax_nodes = {cast.amax: cast.form for cast in casts if cast.amax}
    with graph.inserting_before(next(node for node in graph.nodes if node in amax_nodes)):
        data, amaxes = _put_operator(graph, casts[0], both=any(cast.form == "row" for cast in casts))
        for amax, form in amax_nodes.items():
            new[amax] = _call(graph, aten.reshape.default, amaxes[form], list(amax.meta["val"].shape))
        for cast in casts:
            new.update((stored, _in_shape_of(graph, cast, data[cast.form])) for stored in cast.stored)
    for old, instead in new.items():
        _exchange(graph, old, instead)


def _put_operator(graph: Graph, cast: Cast, *, both: bool) -> tuple[dict[str, Node], dict[str, Node]]:
    """The operator, and what it gives for each form: the data, and the amaxes in bf16."""
    operator_ = torch.ops.fp8gate.cast_both_forms if both else torch.ops.fp8gate.cast_column_form
    operand = _call(graph, aten.reshape.default, cast.operand, [cast.m, cast.k])
    results = _call_operator(graph, operator_, operand, cast.powers_of_two)
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


def _call_operator(graph: Graph, packet: Any, *args: Any) -> Node:
    """A call of one of our operators. Inductor gives it operands in the layout that they have here, contiguous.

    It keeps to that (the tag needs_exact_strides) only where it is told of arguments, as tracing does.
    """
    node = _call(graph, packet.default, *args)
    node.meta["eager_input_vals"] = map_arg(args, lambda argument: argument.meta["val"]), {}
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
