"""Graphs with casts as torchao's rowwise recipe makes them, for the tests of fp8gate.casts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.post_grad import view_to_reshape
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from fp8gate.casts.graph_pass import replace_casts

M, K = 48, 80
FLOAT8 = torch.float8_e4m3fn
ROW_ALONE = "along rows alone, which it does well"


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
    scale = scale_of(amax, eps, powers_of_two)
    data = x.float() * scale
    return (data.clamp(-largest, largest) if clamped else data).to(dtype), scale


def scale_of(amax: Tensor, eps: float = 1e-12, powers_of_two: bool = True) -> Tensor:
    scale = (448.0 / amax.double().clamp(min=eps)).float()
    return scale.log2().floor().exp2() if powers_of_two else scale


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


def traced(function: Callable[..., Any], *tensors: Tensor) -> GraphModule:
    """Its graph as Inductor's passes leave it."""
    graph = make_fx(function, decomposition_table=select_decomp_table(), tracing_mode="fake")(*tensors)
    view_to_reshape(graph)
    return graph


def operand(m: int = M, k: int = K, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(27)).to(dtype)


def replaced(graph: GraphModule, **options: Any) -> Any:
    counts = replace_casts(graph.graph, **{"least_elements": 0, **options})
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


def logged_by_casts(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the loggers of fp8gate.casts said."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("fp8gate.casts")]
