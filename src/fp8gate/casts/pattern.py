"""torchao's rowwise casts in a compiled graph: which nodes each is made of, and what it casts.

In: a graph after Inductor's own passes (post-grad). Out: a `Cast` for each float8 tensor that is made exactly as
torchao's rowwise recipe makes it, and for any other the reason why it is not. Nothing is changed here:
fp8gate.casts.graph_pass replaces what is found.

What is recognized (torchao 0.18.0 as Inductor of torch 2.11 to 2.14 decomposes it), from the amax to the data:

    amax = abs(x).amax(dim, keepdim=True)                                    x in bf16
    scale = (reciprocal(max(float64(amax), 1e-12)) * 448).to(float32)        then exp2(floor(log2(scale))), or not
    data = clamp(float32(x) * scale, -448, 448).to(float8_e4m3fn)

The amax, or the scale, may come from another graph: the forward saves it for the backward. Under DTensor's tensor
parallelism the amaxes over a divided dimension are those of all ranks: a collective stands between amax and scale.

x is a view of a contiguous tensor, the operand. The row form has one scale for each row of the operand, whose rows are
all dimensions but the last. The column form has one for each column, and its data are stored transposed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch.fx import Graph, Node

Form = Literal["row", "column"]

aten, prims = torch.ops.aten, torch.ops.prims
FLOAT8 = torch.float8_e4m3fn
FLOAT8_TYPES = frozenset({FLOAT8, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz})
FLOAT8_MAX, LEAST_AMAX = 448.0, 1e-12
WAIT = torch.ops._c10d_functional.wait_tensor.default
RESHAPES = (aten.reshape.default, aten.view.default)
CONTIGUOUS = {"memory_format": torch.contiguous_format}


class UnknownPatternError(Exception):
    """A float8 tensor that is not made as torchao's rowwise recipe makes it; the message says how it differs."""


class OtherRecipeError(Exception):
    """A float8 tensor of another recipe of torchao's, for which there is nothing to do; the message says what it is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cast:
    """One form of one operand.

    operand: contiguous, in bf16, with m rows of k elements. amax: of each row or column; None if the amaxes that the
    scales come of are those of several ranks, or in another graph. scale: of each row or column. data: in float8, in
    the shape of the view of the operand that torchao cast. is_transposed: that view has a row for each column of the
    operand. stored: what the products read: of the row form the data themselves, of the column form their contiguous
    (k, m) copies.
    """

    form: Form
    operand: Node
    m: int
    k: int
    powers_of_two: bool
    amax: Node | None
    scale: Node
    data: Node
    is_transposed: bool
    stored: tuple[Node, ...]


def float8_nodes(graph: Graph) -> Iterator[Node]:
    """Every conversion to float8."""
    for node in graph.nodes:
        if node.target is prims.convert_element_type.default and FLOAT8_TYPES & {*node.args, *node.kwargs.values()}:
            yield node


def read_cast(data: Node) -> Cast:
    """The cast that gives this float8 tensor.

    Raises OtherRecipeError if it has one scale, UnknownPatternError if it is not one of torchao's rowwise otherwise.
    """
    clamped = _argument(data, prims.convert_element_type.default, FLOAT8)
    clamped = _argument(clamped, aten.clamp_max.default, FLOAT8_MAX)
    x, scale = _factors(_argument(clamped, aten.clamp_min.default, -FLOAT8_MAX))
    if x.target is not prims.convert_element_type.default and _value(x).dtype is torch.float32:
        raise UnknownPatternError("its operand is in float32, not in bf16")
    x = _argument(x, prims.convert_element_type.default, torch.float32)
    for tensor in (x, scale):
        if not all(isinstance(size, int) for size in _value(tensor).shape):
            raise UnknownPatternError("its operand has sizes that vary")
    amax, powers_of_two = _amax_of(scale)
    dim = _scaled_dimension(scale, x) if amax is None else _reduced_dimension(amax, x)
    form, operand, m, k = _operand_of(x, dim)
    return Cast(
        form=form,
        operand=operand,
        m=m,
        k=k,
        powers_of_two=powers_of_two,
        amax=amax,
        scale=scale,
        data=data,
        is_transposed=_is_transposed(x),
        stored=(data,) if form == "row" else _transposed_copies(data, is_transposed=_is_transposed(x)),
    )


def _argument(node: Any, target: Any, *others: object) -> Node:
    """The first argument, a node, of a call with exactly these further arguments."""
    if not isinstance(node, Node) or node.target is not target or node.args[1:] != others or node.kwargs:
        arguments = ", ".join(["...", *map(str, others)])
        raise UnknownPatternError(f"expected {_name(target)}({arguments}), found {_text(node)}")
    return node.args[0]  # type: ignore[return-value]


def _factors(product: Node) -> tuple[Node, Node]:
    if product.target is not aten.mul.Tensor or not all(isinstance(one, Node) for one in product.args):
        raise UnknownPatternError(f"expected the product of an operand and a scale, found {_text(product)}")
    x, scale = product.args
    return x, scale  # type: ignore[return-value]


def _amax_of(scale: Node) -> tuple[Node | None, bool]:
    """What a scale is computed from, None as in `Cast`, and whether it is rounded down to a power of two."""
    if scale.op == "placeholder":
        return None, False
    powers_of_two = scale.target is aten.exp2.default
    if powers_of_two:
        scale = _argument(_argument(scale, aten.exp2.default), aten.floor.default)
        scale = _argument(scale, aten.log2.default)
    scale = _argument(scale, prims.convert_element_type.default, torch.float32)
    scale = _argument(scale, aten.mul.Tensor, FLOAT8_MAX)
    amax = _argument(_argument(scale, aten.reciprocal.default), aten.clamp_min.default, LEAST_AMAX)
    if amax.target is not WAIT:
        amax = _argument(amax, prims.convert_element_type.default, torch.float64)
    return None if amax.op == "placeholder" or amax.target is WAIT else amax, powers_of_two


def _reduced_dimension(amax: Node, x: Node) -> int:
    """The dimension of x that the amax is taken over."""
    if amax.target is aten.max.default:
        raise OtherRecipeError("of one scale, as tensorwise has it")
    if amax.target is not aten.amax.default or len(amax.args) != 3 or amax.args[2] is not True or amax.kwargs:
        raise UnknownPatternError(f"expected amax(..., [dim], True), found {_text(amax)}")
    magnitude, dims, _ = amax.args
    magnified = _argument(magnitude, aten.abs.default)
    if magnified is not x:
        raise UnknownPatternError(f"its amax is of {_text(magnified)}, not of what is cast")
    if not isinstance(dims, (list, tuple)) or len(dims) != 1:
        raise UnknownPatternError(f"its amax is over dimensions {dims}")
    (dim,) = dims
    return int(dim) % _value(x).ndim  # type: ignore[arg-type]


def _scaled_dimension(scale: Node, x: Node) -> int:
    """The dimension of x that has one scale for all of it."""
    value, shape = _value(scale), _value(x).shape
    found = [dim for dim, size in enumerate(shape) if (*shape[:dim], 1, *shape[dim + 1 :]) == value.shape and size != 1]
    if len(found) != 1 or value.dtype is not torch.float32 or not value.is_contiguous():
        shape_and_strides = f"{(*value.shape,)}, of strides {value.stride()}"
        raise UnknownPatternError(f"expected a scale for each row or column, found {value.dtype} {shape_and_strides}")
    return found[0]


def _operand_of(x: Node, dim: int) -> tuple[Form, Node, int, int]:
    """The form, the contiguous operand that x is a view of, and the operand's m and k."""
    ndim = _value(x).ndim
    if _is_transposed(x):
        x, dim = x.args[0], 1 - dim  # type: ignore[assignment]
    value = _value(x)
    if value.dtype is not torch.bfloat16 or value.layout is not torch.strided or not value.is_contiguous():
        found = f"{value.dtype} of strides {value.stride()}"
        raise UnknownPatternError(f"expected a contiguous bf16 operand, found {found}")
    if dim != ndim - 1 and (dim, ndim) != (0, 2):
        raise UnknownPatternError(f"its amax is over dimension {dim} of {ndim}")
    k = value.shape[-1]
    return "row" if dim == ndim - 1 else "column", _without_reshapes(x, k), math.prod(value.shape[:-1]), k


def _without_reshapes(x: Node, k: int) -> Node:
    """The tensor in memory, whose rows of k elements are those of x."""
    while x.target in RESHAPES and _value(x.args[0]).shape[-1:] == (k,) and _value(x.args[0]).is_contiguous():
        x = x.args[0]  # type: ignore[assignment]
    return x


def _transposed_copies(data: Node, *, is_transposed: bool) -> tuple[Node, ...]:
    """The copies that a column form is stored in. They have to be all that uses the data.

    is_transposed: the data have a row for each column of the operand already.
    """
    users = list(data.users)
    if not is_transposed:
        users = [copy for user in users for copy in (user.users if _is_transposed(user) else [user])]
    for user in users:
        is_copy = user.target is aten.clone.default and user.kwargs == CONTIGUOUS
        if not is_copy or _is_transposed(user.args[0]) is is_transposed:
            raise UnknownPatternError(f"its column form is not stored transposed: it is used by {_text(user)}")
    return tuple(users)


def _is_transposed(node: Any) -> bool:
    return node.target is aten.permute.default and list(node.args[1]) == [1, 0]


def _value(node: Any) -> torch.Tensor:
    """What is known of a node's result. Raises UnknownPatternError if it is no tensor."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    if not isinstance(value, torch.Tensor):
        raise UnknownPatternError(f"expected a tensor, found {_text(node)}")
    return value


def _text(node: Any) -> str:
    """A node without the names of others, so that equal reasons are equal texts."""
    if not isinstance(node, Node) or node.op != "call_function":
        return node.op if isinstance(node, Node) else str(node)
    return f"{_name(node.target)}({', '.join('...' if isinstance(one, Node) else str(one) for one in node.args)})"


def _name(target: Any) -> str:
    return str(getattr(target, "__name__", target)).partition(".")[0]
