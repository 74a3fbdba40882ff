"""Which casts fp8gate.casts recognizes in a graph, which it leaves alone, and equal bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from casts_graphs import (
    FLOAT8,
    ROW_ALONE,
    K,
    M,
    assert_equal_bits,
    both,
    column,
    column_of_transposed,
    operand,
    operators_in,
    replaced,
    row,
    scale_of,
    scaled,
    traced,
)
from torch import Tensor
from torch.fx import GraphModule

from fp8gate.casts.operators import has_operators

ROOT = Path(__file__).parent.parent

OTHER_SCALE = "unknown: expected a scale for each row or column, found"


@pytest.mark.parametrize("powers_of_two", [True, False])
@pytest.mark.parametrize(
    ("cast", "operators", "casts"),
    [
        (both, ["cast_both_forms"], 2),
        (column, ["cast_column_form"], 1),
        (column_of_transposed, ["cast_column_form"], 1),
        (lambda x, **details: (*column(x, **details), *row(x, **details)), ["cast_both_forms"], 2),
        (lambda x, **details: (*row(x.t(), **details), *column(x.t(), **details)), [], 0),  # of another layout
        (lambda x, **details: (*scaled(x.t(), 0, **details), *column(x, **details)), ["cast_both_forms"], 2),
    ],
)
def test_the_casts_of_an_operand_are_replaced_with_equal_bits(cast, operators, casts, powers_of_two):
    x = operand()
    graph = traced(lambda x: cast(x, powers_of_two=powers_of_two), x)
    assert replaced(graph).replaced == casts
    assert operators_in(graph) == operators
    assert_equal_bits(graph(x), cast(x, powers_of_two=powers_of_two))


def test_operands_of_three_dimensions_have_both_forms():
    """As the inputs of linears are: the row form of the whole, the column form of its rows."""
    x = operand(4 * M).view(4, M, K)

    def cast(x: Tensor) -> tuple[Tensor, ...]:
        return *row(x), *column(x.reshape(-1, K))

    graph = traced(cast, x)
    assert replaced(graph).replaced == 2
    assert operators_in(graph) == ["cast_both_forms"]
    assert_equal_bits(graph(x), cast(x))


@pytest.mark.parametrize("powers_of_two", [True, False])
def test_special_values_have_equal_bits(powers_of_two, monkeypatch):
    pytest.importorskip("triton", reason="the special values are listed beside kernels in Triton")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from rowwise_casts_equality import every_magnitude, special_operands

    cpu = torch.device("cpu")
    graph = traced(lambda x: both(x, powers_of_two=powers_of_two), operand())
    assert replaced(graph).replaced == 2
    for _, x in special_operands(M, K, cpu):
        assert_equal_bits(graph(x), both(x, powers_of_two=powers_of_two))
    x = every_magnitude(cpu)
    graph = traced(lambda x: both(x, powers_of_two=powers_of_two), x)
    assert replaced(graph).replaced == 2
    assert_equal_bits(graph(x), both(x, powers_of_two=powers_of_two))


def test_amaxes_that_are_saved_are_those_of_the_operator():
    """The forward saves an input's amaxes for the backward pass, which computes the scales from them again."""

    def cast(x: Tensor) -> tuple[Tensor, ...]:
        amax = x.abs().amax(0, keepdim=True)
        data = (x.float() * scale_of(amax)).clamp(-448.0, 448.0).to(FLOAT8)
        return data.t().contiguous(), amax

    x = operand()
    graph = traced(cast, x)
    assert replaced(graph).replaced == 1
    remaining = {getattr(node.target, "_opname", "") for node in graph.graph.nodes}
    assert not remaining & {"abs", "amax", "exp2"}  # the scale was of use to the data alone
    assert_equal_bits(graph(x), cast(x))


@pytest.mark.parametrize(
    ("cast", "x", "why"),
    [
        (lambda x: column(x, eps=1e-10), operand(), r"expected clamp_min(..., 1e-12), found clamp_min(..., 1e-10)"),
        (lambda x: column(x, largest=240.0), operand(), r"expected clamp_max(..., 448.0), found clamp_max(..., 240.0)"),
        (
            lambda x: column(x, dtype=torch.float8_e5m2),
            operand(),
            "expected convert_element_type(..., torch.float8_e4m3fn), "
            "found convert_element_type(..., torch.float8_e5m2)",
        ),
        (lambda x: column(x, clamped=False), operand(), "expected clamp_max(..., 448.0), found mul(..., ...)"),
        (lambda x: column(x, of=2 * x), operand(), "its amax is of mul(..., 2), not of what is cast"),
        (
            column,
            operand(dtype=torch.float32),
            "its operand is in float32, not in bf16",
        ),
        (
            lambda x: scaled(x, 0),
            operand(),
            "its column form is not stored transposed: it is used by output",
        ),
        (
            lambda x: scaled(x, 0)[0].contiguous().view(torch.uint8),
            operand(),
            "its column form is not stored transposed: it is used by view(..., torch.uint8)",
        ),
        (
            lambda x: scaled(x, 0)[0].clone(memory_format=torch.contiguous_format),
            operand(48, 48),
            "its column form is not stored transposed: it is used by clone(...)",
        ),
        (
            lambda x: scaled(x.t(), -1)[0].t().contiguous(),
            operand(48, 48),
            "its column form is not stored transposed: it is used by permute(..., [1, 0])",
        ),
        (lambda x: scaled(x, 1), operand().view(3, 16, K), "its amax is over dimension 1 of 3"),
        (lambda x: scaled(x, 0), operand().view(3, 16, K), "its amax is over dimension 0 of 3"),
        (
            lambda x: column(x),
            operand().t().contiguous().t()[:, :16].t().t()[::2],
            "expected a contiguous bf16 operand, found torch.bfloat16 of strides (2, 48)",
        ),
    ],
    ids=[
        *("eps", "largest", "e5m2", "no clamp", "other amax", "float32", "returned", "viewed"),
        *("square as it is", "square twice transposed", "middle", "first", "strides"),
    ],
)
def test_what_differs_from_torchao_is_left_alone(cast, x, why):
    graph = traced(cast, x)
    before = str(graph.graph)
    counts = replaced(graph)
    assert (counts.replaced, dict(counts.left)) == (0, {f"unknown: {why}": 1})
    assert str(graph.graph) == before


def test_one_operand_with_and_without_powers_of_two_is_left_alone():
    """The two would share amaxes, and one operator rounds all of its scales or none."""

    def cast(x: Tensor) -> tuple[Tensor, ...]:
        amax = x.abs().amax(0, keepdim=True)
        scales = scale_of(amax), scale_of(amax, powers_of_two=False)
        return tuple((x.float() * one).clamp(-448.0, 448.0).to(FLOAT8).t().contiguous() for one in scales)

    graph = traced(cast, operand())
    assert dict(replaced(graph).left) == {"of an operand that is cast both with and without powers of two": 2}
    assert_equal_bits(graph(operand()), cast(operand()))


SCALES = operand(1, K).float().abs() + 0.5


def with_scales(x: Tensor, scale: Tensor) -> Tensor:
    return (x.float() * scale).clamp(-448.0, 448.0).to(FLOAT8).t().contiguous()


def with_scales_of_transposed(x: Tensor, scale: Tensor) -> Tensor:
    return (x.t().float() * scale).clamp(-448.0, 448.0).to(FLOAT8).contiguous()


def with_amaxes(x: Tensor, amax: Tensor) -> Tensor:
    return with_scales(x, scale_of(amax))


@pytest.mark.parametrize(
    ("cast", "given"),
    [
        (with_scales, SCALES),
        (with_scales, SCALES * 1e-40),
        (with_scales, SCALES * 1e30),
        (with_scales_of_transposed, SCALES.view(K, 1)),
        (with_amaxes, SCALES.bfloat16()),
    ],
)
def test_what_the_forward_saved_is_cast_with(cast, given):
    """Either the scales, or amaxes: an operator casts with whatever they are."""
    x = operand()
    graph = traced(cast, x, given)
    assert replaced(graph).replaced == 1
    assert operators_in(graph) == ["cast_column_form_with_scales"]
    assert_equal_bits([graph(x, given)], [cast(x, given)])


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (torch.tensor(2.0), f"{OTHER_SCALE} torch.float32 (), of strides ()"),
        (torch.ones(1, 1), f"{OTHER_SCALE} torch.float32 (1, 1), of strides (1, 1)"),
        (torch.ones(M, K), f"{OTHER_SCALE} torch.float32 {(M, K)}, of strides {(K, 1)}"),
        (torch.ones(1, K, dtype=torch.bfloat16), f"{OTHER_SCALE} torch.bfloat16 {(1, K)}, of strides {(K, 1)}"),
        (torch.ones(1, 2 * K)[:, ::2], f"{OTHER_SCALE} torch.float32 {(1, K)}, of strides {(2 * K, 2)}"),
        (torch.ones(1, 1).expand(1, K), f"{OTHER_SCALE} torch.float32 {(1, K)}, of strides (1, 0)"),
        (torch.ones(M, 1), ROW_ALONE),
    ],
)
def test_other_scales_are_left_alone(given, why):
    def cast(x: Tensor, scale: Tensor) -> Tensor:
        data = (x.float() * scale).clamp(-448.0, 448.0).to(FLOAT8)
        return data if scale.shape == (M, 1) else data.t().contiguous()

    graph = traced(cast, operand(), given)
    assert dict(replaced(graph).left) == {why: 1}


def test_scales_that_the_kernel_cannot_read_are_refused():
    from fp8gate.casts.given_scales import scaled_columns

    for scales in (torch.ones(K)[::2], torch.ones(2 * K)[::2], torch.ones(K, dtype=torch.float64), torch.ones(1, K)):
        with pytest.raises(ValueError, match=f"expected {K} contiguous float32 scales; got "):
            scaled_columns(operand(), scales)


@pytest.mark.parametrize(
    ("cast", "casts"),
    [
        (lambda x: (row(x)[0], row(x.view(3, 16, K))[0], column(x)[0]), 3),
        (lambda x: (column(x)[0], column_of_transposed(x)[0].t()), 2),
    ],
)
def test_results_that_leave_the_graph_stay_tensors_of_their_own(cast, casts):
    graph = traced(cast, operand())
    assert dict(replaced(graph).left) == {"of data that leave the graph more than once": casts}


def test_an_operand_that_is_not_bf16_is_left_alone():
    graph = traced(column, operand(dtype=torch.float16))
    strides = "expected a contiguous bf16 operand, found torch.float16 of strides (80, 1)"
    assert dict(replaced(graph).left) == {f"unknown: {strides}": 1}


def test_amaxes_of_several_ranks_stay_in_the_graph():
    """The collective may come before or after the conversion to float64."""
    x = operand()
    for position in (0, 1):
        graph = traced(column, x)
        (double,) = (node for node in graph.graph.nodes if node.args[1:] == (torch.float64,))
        local = (double.args[0], double)[position]
        with graph.graph.inserting_after(local):
            wait = graph.graph.call_function(torch.ops._c10d_functional.wait_tensor.default, (local,))
        wait.meta["val"] = local.meta["val"]
        local.replace_all_uses_with(wait, delete_user_cb=lambda user: user is not wait)  # noqa: B023
        assert replaced(graph).replaced == 1
        assert operators_in(graph) == ["cast_column_form_with_scales"]
        assert wait.users
        assert "abs" in str(graph.graph)
        assert_equal_bits(graph(x), column(x))


def test_a_tensorwise_cast_is_left_alone():
    def cast(x: Tensor) -> Tensor:
        scale = (448.0 / x.abs().max().double().clamp(min=1e-12)).float()
        return (x.float() * scale).clamp(-448.0, 448.0).to(FLOAT8).t().contiguous()

    graph = traced(cast, operand())
    assert list(replaced(graph).left) == ["of one scale, as tensorwise has it"]


@pytest.mark.parametrize(
    ("cast", "x", "options", "why"),
    [
        (row, operand(), {}, ROW_ALONE),
        (row, operand(), {"least_elements": M * K + 1}, ROW_ALONE),
        (column, operand(), {"least_elements": M * K + 1}, f"of fewer than {M * K + 1} elements"),
        (column, operand(m=M - 8), {}, "of sizes that are no multiples of 16"),
    ],
)
def test_what_inductor_does_as_well_is_left_alone(cast, x, options, why):
    graph = traced(cast, x)
    counts = replaced(graph, **options)
    assert (counts.replaced, dict(counts.left)) == (0, {why: 1})


@pytest.mark.parametrize(("hip", "capability"), [("6.3", (9, 0)), (None, (8, 0)), (None, (8, 9))])
def test_gpus_that_do_not_convert_to_float8_are_left_alone(monkeypatch, hip, capability):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert has_operators(torch.device("cuda")) is (hip is None and capability == (8, 9))
    assert has_operators(torch.device("cpu"))
    assert not has_operators(torch.device("xpu"))


def test_other_devices_are_left_alone():
    graph = traced(column, torch.empty(M, K, dtype=torch.bfloat16, device="meta"))
    assert dict(replaced(graph).left) == {"on a device without kernels for them": 1}


OTHER_CALLS = {"abs": "neg", "amax": "amin", "reciprocal": "sqrt", "floor": "ceil", "mul": "add", "log2": "log"}
"""Operations that take the same arguments and give the same shapes."""


def spoiled(graph: GraphModule, position: int) -> str | None:
    """Changes one call of a graph a little. Returns what was changed; None if there is nothing to change."""
    node = list(graph.graph.nodes)[position]
    if node.op != "call_function":
        return None
    before = str(node.target), node.args
    name = node.target._opname
    if name in OTHER_CALLS:
        other = getattr(torch.ops.aten, OTHER_CALLS[name])
        node.target = getattr(other, node.target._overloadname)
    elif len(node.args) > 1 and isinstance(node.args[1], float):
        node.args = (node.args[0], node.args[1] * 0.5)
    elif name == "convert_element_type" and node.args[1] is torch.float64:
        node.args = (node.args[0], torch.float32)
    else:
        return None
    graph.recompile()
    return f"{before}"


@pytest.mark.parametrize("powers_of_two", [True, False])
def test_no_spoiled_pattern_gives_a_wrong_number(powers_of_two):
    """Each call of the pattern is changed in turn, with the cast of another operand beside it that is replaced."""

    def cast(x: Tensor, other: Tensor) -> tuple[Tensor, ...]:
        return *both(x, powers_of_two=powers_of_two), *both(other, powers_of_two=powers_of_two)

    x, other = operand(), operand(32, 64)
    size = len(traced(cast, x, other).graph.nodes)
    changed = 0
    for position in range(size):
        graph = traced(cast, x, other)
        if not (what := spoiled(graph, position)):
            continue
        changed += 1
        expected = graph(x, other)
        counts = replaced(graph)
        assert 2 <= counts.replaced < 4, what
        assert counts.seen == 4, what
        assert any(why.startswith(("unknown", ROW_ALONE)) for why in counts.left), what
        assert_equal_bits(graph(x, other), expected)
    assert changed == (44 if powers_of_two else 36)


@pytest.mark.parametrize("cast", [with_scales, with_amaxes])
def test_no_spoiled_pattern_with_saved_scales_gives_a_wrong_number(cast):
    """Each call of the pattern is changed in turn. None of these is taken for torchao's."""
    x, given = operand(), SCALES if cast is with_scales else SCALES.bfloat16()
    changed = 0
    for position in range(len(traced(cast, x, given).graph.nodes)):
        graph = traced(cast, x, given)
        if not spoiled(graph, position):
            continue
        changed += 1
        expected = graph(x, given)
        assert replaced(graph).replaced == 0
        assert_equal_bits([graph(x, given)], [expected])
    assert changed == (3 if cast is with_scales else 9)
