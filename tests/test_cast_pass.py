"""The pass that replaces torchao's rowwise casts: what it recognizes, what it leaves alone, and equal bits."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor import config as inductor_config
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

ROOT = Path(__file__).parent.parent
M, K = 48, 80
FLOAT8 = torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


# --- graphs of casts -------------------------------------------------------------------------------------------


def scaled(
    x: Tensor,
    dim: int,
    *,
    eps: float = 1e-12,
    largest: float = 448.0,
    powers_of_two: bool = True,
    dtype: torch.dtype = FLOAT8,
    clamped: bool = True,
    of: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """torchao's cast, or one that differs from it in a detail: data and scale. of: whose amaxes to take."""
    amax = (x if of is None else of).abs().amax(dim, keepdim=True)
    scale = (448.0 / amax.double().clamp(min=eps)).float()
    if powers_of_two:
        scale = scale.log2().floor().exp2()
    data = x.float() * scale
    return (data.clamp(-largest, largest) if clamped else data).to(dtype), scale


def row(x: Tensor, **details: Any) -> tuple[Tensor, Tensor]:
    return scaled(x, -1, **details)


def column(x: Tensor, **details: Any) -> tuple[Tensor, Tensor]:
    data, scale = scaled(x, 0, **details)
    return data.t().contiguous(), scale


def column_of_transposed(x: Tensor, **details: Any) -> tuple[Tensor, Tensor]:
    """As torchao casts a weight for the gradient of the input."""
    data, scale = scaled(x.t(), -1, **details)
    return data.contiguous(), scale.t()


def both(x: Tensor, **details: Any) -> tuple[Tensor, ...]:
    return *row(x, **details), *column(x, **details)


def traced(function: Callable[..., Any], x: Tensor) -> GraphModule:
    """Its graph as Inductor's passes leave it."""
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.post_grad import view_to_reshape

    graph = make_fx(function, decomposition_table=select_decomp_table(), tracing_mode="fake")(x)
    view_to_reshape(graph)
    return graph


def operand(m: int = M, k: int = K, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(27)).to(dtype)


def replaced(graph: GraphModule, **options: Any) -> Any:
    from cast_pass import replace_casts

    counts = replace_casts(graph.graph, **{"operands": "in memory", "least_elements": 0, **options})
    graph.graph.lint()
    graph.recompile()
    return counts


def operators_in(graph: GraphModule) -> list[str]:
    return [node.target._opname for node in graph.graph.nodes if getattr(node.target, "namespace", "") == "fp8gate"]


def assert_equal_bits(found: Any, expected: Any) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert (one.dtype, one.shape, one.stride()) == (other.dtype, other.shape, other.stride())
        assert torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


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
