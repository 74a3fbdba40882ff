"""What is compiled with fp8gate.casts has the bits of what is compiled without, from Inductor's cache too."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from casts_graphs import FLOAT8, ROW_ALONE, K, M, assert_equal_bits, both, column, logged_by_casts, operand, scale_of
from torch import Tensor, nn
from torch._inductor import config as inductor_config

from fp8gate.casts import graph_pass, operators
from fp8gate.casts.graph_pass import Counts

ROOT = Path(__file__).parent.parent


class Decoder(nn.Module):
    """A layer as Llama has it: attention with rotated queries, and SwiGLU."""

    def __init__(self, width: int = 64, hidden: int = 192, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.RMSNorm(width, dtype=torch.bfloat16) for _ in range(2))
        sizes = {"q": (width, width), "k": (width, width), "v": (width, width), "o": (width, width)}
        sizes |= {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
        for name, size in sizes.items():
            self.add_module(name, nn.Linear(*size, bias=False, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norms[0](x)
        q, k, v = (one(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for one in (self.q, self.k, self.v))
        attention = nn.functional.scaled_dot_product_attention(q * q.size(-2) ** -0.5, k, v, is_causal=True)
        x = x + self.o(attention.transpose(1, 2).flatten(2))
        h = self.norms[1](x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


UNCACHED = inductor_config.patch({"fx_graph_cache": False})  # so that passes run


def compiled_step(module: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """A function, compiled anew, of its output and all gradients."""
    torch._dynamo.reset()
    leaf = x.detach().clone().requires_grad_()
    compiled = torch.compile(module, dynamic=False, fullgraph=True)

    def step() -> tuple[Tensor, ...]:
        output = compiled(leaf)
        gradients = torch.autograd.grad(output, [leaf, *module.parameters()], grad)
        return output.detach(), *gradients  # nothing that is kept refers to autograd's graph

    with UNCACHED, inductor_config.patch({"emulate_precision_casts": True}):
        step()
    return step


def float8(module: nn.Module, recipe: str) -> nn.Module:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    return convert_to_float8_training(module, config=Float8LinearConfig.from_recipe_name(recipe))


def linear(bias: bool = False) -> nn.Module:
    return nn.Sequential(nn.Linear(64, 96, bias=bias, dtype=torch.bfloat16))


TENSORWISE = "of one scale, as tensorwise has it"
COMPILED = [
    # The forward casts an input to both forms, a weight to rows; the backward a gradient to both, a weight to columns.
    (linear, "rowwise", [(2, {ROW_ALONE: 1}), (3, {})]),
    (lambda: linear(bias=True), "rowwise", [(2, {ROW_ALONE: 1}), (3, {})]),
    (linear, "rowwise_with_gw_hp", [(0, {ROW_ALONE: 2}), (0, {ROW_ALONE: 1, TENSORWISE: 1})]),
    # The backward of a layer casts inputs too: 7 weights and 4 inputs to columns, 7 gradients to both forms.
    (Decoder, "rowwise", [(0, {ROW_ALONE: 11}), (25, {})]),
]


@pytest.mark.slow
@pytest.mark.parametrize(("make", "recipe", "expected"), COMPILED)
def test_what_is_compiled_with_casts_replaced_has_equal_bits(make, recipe, expected, caplog):
    torch.manual_seed(27)
    module = float8(make(), recipe)
    x = torch.randn(2, 16, 64, dtype=torch.bfloat16)
    grad = torch.randn_like(module(x))
    without = compiled_step(module, x, grad)()
    with caplog.at_level(logging.INFO, "fp8gate.casts"), graph_pass.replaced(least_elements=0):
        step = compiled_step(module, x, grad)
    found = step()
    assert logged_by_casts(caplog) == [str(Counts(replaced=count, left=left)) for count, left in expected]
    assert_equal_bits(found, without)


def laid_out_anew(x: Tensor) -> tuple[Tensor, ...]:
    """Casts of operands that Inductor would rather write in another layout, as nothing but the casts reads them."""
    operands = (
        x.t().contiguous(),
        (2 * x).t().contiguous(),
        x.t().contiguous() + 1,
        torch.relu(x @ x).t().contiguous(),
    )
    return tuple(result for one in operands for result in column(one))


@pytest.mark.slow
def test_operators_are_given_contiguous_operands(caplog):
    x = operand(48, 48)
    torch._dynamo.reset()
    with caplog.at_level(logging.INFO, "fp8gate.casts"), graph_pass.replaced(least_elements=0), UNCACHED:
        found = torch.compile(laid_out_anew, dynamic=False)(x)
    assert_equal_bits(found, laid_out_anew(x))
    assert logged_by_casts(caplog) == ["4 of 4 float8 casts replaced"]


@pytest.mark.slow
def test_sizes_that_vary_are_left_alone(caplog):
    """Those of a dimension that is said to vary, and those that depend on data, with scales that are given."""

    def selected(x: Tensor, chosen: Tensor, scale: Tensor) -> Tensor:
        return (x[chosen].float() * scale).clamp(-448.0, 448.0).to(FLOAT8).t().contiguous()

    x, chosen, scale = operand(), torch.arange(M) % 3 > 0, torch.rand(1, K) + 0.5
    torch._dynamo.reset()
    capture = torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
    with caplog.at_level(logging.INFO, "fp8gate.casts"), graph_pass.replaced(least_elements=0), UNCACHED, capture:
        assert_equal_bits(torch.compile(lambda x: column(x), dynamic=True)(x), column(x))
        found = torch.compile(selected)(x, chosen, scale)
    assert torch.equal(found.float(), selected(x, chosen, scale).float())
    vary = "0 of 1 float8 casts replaced; left to Inductor: 1 unknown: its operand has sizes that vary"
    assert logged_by_casts(caplog) == [vary] * 2


@pytest.mark.slow
def test_cached_graphs_with_and_without_replaced_casts_are_kept_apart(caplog, tmp_path, monkeypatch):
    from torch._dynamo.utils import counters
    from torch._inductor.utils import clear_caches

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    clear_caches()
    x = operand()

    def hits_and_misses(context: contextlib.AbstractContextManager[None]) -> tuple[int, int]:
        torch._dynamo.reset()
        counters.clear()
        with context, caplog.at_level(logging.INFO, "fp8gate.casts"):
            found = torch.compile(lambda x: both(x), dynamic=False)(x)
        assert_equal_bits(found, both(x))
        return counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"]

    for expected in ((0, 1), (1, 0)):
        assert hits_and_misses(contextlib.nullcontext()) == expected
        assert hits_and_misses(graph_pass.replaced(least_elements=0)) == expected
    assert logged_by_casts(caplog) == ["2 of 2 float8 casts replaced"]
    clear_caches()


@pytest.mark.slow
def test_another_process_finds_cached_graphs_only_if_it_replaces_casts_too(tmp_path):
    """Such a graph needs the operators. A process that replaces casts has them before it loads anything."""

    def hits_misses_and_operators(value: str) -> list[str]:
        places = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT / "src"), "FP8GATE_CASTS": value}
        command = [sys.executable, str(ROOT / "tests" / "compiled_casts.py")]
        run = subprocess.run(command, env={**os.environ, **places}, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        return run.stdout.split()

    assert hits_misses_and_operators("1") == ["0", "1", "1"]
    assert hits_misses_and_operators("0") == ["0", "1", "0"]
    assert hits_misses_and_operators("1") == ["1", "0", "1"]


# --- on a GPU --------------------------------------------------------------------------------------------------

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def on_gpu(test: Callable[..., None]) -> Callable[..., None]:
    for mark in GPU:
        test = mark(test)
    return test


@on_gpu
@pytest.mark.parametrize("powers_of_two", [True, False])
def test_a_gpu_casts_every_magnitude_with_equal_bits(powers_of_two, caplog, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from rowwise_casts_equality import every_magnitude, special_operands

    cuda = torch.device("cuda")
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: both(x, powers_of_two=powers_of_two), dynamic=False)
    with graph_pass.replaced(least_elements=0), caplog.at_level(logging.INFO, "fp8gate.casts"), UNCACHED:
        for _, x in [*special_operands(1040, 1552, cuda), ("", every_magnitude(cuda))]:
            for one, other in zip(compiled(x), both(x, powers_of_two=powers_of_two), strict=True):
                torch.testing.assert_close(one.float(), other.float(), rtol=0.0, atol=0.0, equal_nan=True)
    assert logged_by_casts(caplog) == ["2 of 2 float8 casts replaced"] * 2  # of two sizes


@on_gpu
def test_a_gpu_casts_with_given_scales_with_equal_bits(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from rowwise_casts_equality import special_operands

    for _, x in special_operands(1040, 1552, torch.device("cuda")):
        right = scale_of(x.abs().amax(0)).nan_to_num()
        for scales in (right, 3 * right):
            found = operators.column_form_with_scales_by_kernel(x, scales)
            expected = operators.column_form_with_scales_by_torch(x, scales)
            torch.testing.assert_close(found.float(), expected.float(), rtol=0.0, atol=0.0, equal_nan=True)


@on_gpu
@pytest.mark.slow
def test_a_gpu_has_equal_bits_also_in_a_cuda_graph(caplog):
    """All runs on the stream that the graph is captured on, because autograd goes back to a leaf's first stream.

    No other stream may wait for one that is being captured.
    """
    torch.manual_seed(27)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        module = float8(Decoder(256, 768), "rowwise").cuda()
        x = torch.randn(2, 128, 256, dtype=torch.bfloat16, device="cuda")
        grad = torch.randn_like(x)
        without = compiled_step(module, x, grad)()
        with caplog.at_level(logging.INFO, "fp8gate.casts"), graph_pass.replaced(least_elements=0):
            step = compiled_step(module, x, grad)
        assert_equal_bits(step(), without)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = step()
    with torch.cuda.stream(stream):
        for one in captured:
            one.zero_()
        graph.replay()
        assert_equal_bits(captured, without)
    assert [message.partition(" of ")[0] for message in logged_by_casts(caplog)] == ["0", "25"]
