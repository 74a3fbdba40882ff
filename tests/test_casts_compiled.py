"""What is compiled with fp8gate.casts has the bits of what is compiled without, from Inductor's cache too."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from casts_graphs import ROW_ALONE, assert_equal_bits, both, operand
from torch import Tensor, nn
from torch._inductor import config as inductor_config

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
        return output, *torch.autograd.grad(output, [leaf, *module.parameters()], grad)

    with UNCACHED, inductor_config.patch({"emulate_precision_casts": True}):
        step()
    return step


def float8(module: nn.Module, recipe: str) -> nn.Module:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    return convert_to_float8_training(module, config=Float8LinearConfig.from_recipe_name(recipe))


def linear(bias: bool = False) -> nn.Module:
    return nn.Sequential(nn.Linear(64, 96, bias=bias, dtype=torch.bfloat16))


TENSORWISE = "unknown: expected amax(..., [dim], True), found max(...)"
COMPILED = [
    # The forward casts an input to both forms, a weight to rows; the backward a gradient to both, a weight to columns.
    (linear, "rowwise", "in memory", [(2, {ROW_ALONE: 1}), (3, {})]),
    (lambda: linear(bias=True), "rowwise", "in memory", [(2, {ROW_ALONE: 1}), (3, {})]),
    (linear, "rowwise_with_gw_hp", "in memory", [(0, {ROW_ALONE: 2}), (0, {ROW_ALONE: 1, TENSORWISE: 1})]),
    # The backward of a layer casts inputs too: 7 weights and 4 inputs to columns, 7 gradients to both forms. In memory
    # are the weights, what attention gives, and the gradients of the outputs of v, k and down.
    (Decoder, "rowwise", "in memory", [(0, {ROW_ALONE: 11}), (14, {COMPUTED: 11})]),
    (Decoder, "rowwise", "any", [(0, {ROW_ALONE: 11}), (25, {})]),
]


@pytest.mark.slow
@pytest.mark.parametrize(("make", "recipe", "operands", "expected"), COMPILED)
def test_what_is_compiled_with_the_pass_has_equal_bits(make, recipe, operands, expected, caplog):
    from cast_pass import Counts, casts_replaced

    torch.manual_seed(27)
    module = float8(make(), recipe)
    x = torch.randn(2, 16, 64, dtype=torch.bfloat16)
    grad = torch.randn_like(module(x))
    without = compiled_step(module, x, grad)()
    with caplog.at_level(logging.INFO, "cast_pass"), casts_replaced(operands=operands, least_elements=0):
        step = compiled_step(module, x, grad)
    found = step()
    assert logged(caplog) == [str(Counts(replaced=count, left=left)) for count, left in expected]
    assert_equal_bits(found, without)


@pytest.mark.slow
def test_cached_graphs_with_and_without_the_pass_are_kept_apart(caplog, tmp_path, monkeypatch):
    from cast_pass import casts_replaced
    from torch._dynamo.utils import counters
    from torch._inductor.utils import clear_caches

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    clear_caches()
    x = operand()

    def hits_and_misses(context: contextlib.AbstractContextManager[None]) -> tuple[int, int]:
        torch._dynamo.reset()
        counters.clear()
        with context, caplog.at_level(logging.INFO, "cast_pass"):
            found = torch.compile(lambda x: both(x), dynamic=False)(x)
        assert_equal_bits(found, both(x))
        return counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"]

    for expected in ((0, 1), (1, 0)):
        assert hits_and_misses(contextlib.nullcontext()) == expected
        assert hits_and_misses(casts_replaced(least_elements=0)) == expected
    assert logged(caplog) == ["2 of 2 float8 casts replaced"]
    clear_caches()


# --- on a GPU --------------------------------------------------------------------------------------------------

GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


def on_gpu(test: Callable[..., None]) -> Callable[..., None]:
    for mark in GPU:
        test = mark(test)
    return test


@on_gpu
@pytest.mark.parametrize("powers_of_two", [True, False])
def test_a_gpu_casts_every_magnitude_with_equal_bits(powers_of_two, caplog):
    from cast_pass import casts_replaced
    from rowwise_casts_equality import every_magnitude, special_operands

    cuda = torch.device("cuda")
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: both(x, powers_of_two=powers_of_two), dynamic=False)
    with casts_replaced(least_elements=0), caplog.at_level(logging.INFO, "cast_pass"), UNCACHED:
        for _, x in [*special_operands(1040, 1552, cuda), ("", every_magnitude(cuda))]:
            for one, other in zip(compiled(x), both(x, powers_of_two=powers_of_two), strict=True):
                torch.testing.assert_close(one.float(), other.float(), rtol=0.0, atol=0.0, equal_nan=True)
    assert logged(caplog) == ["2 of 2 float8 casts replaced"] * 2  # of two sizes


@on_gpu
@pytest.mark.slow
@pytest.mark.parametrize("operands", ["in memory", "any"])
def test_a_gpu_has_equal_bits_also_in_a_cuda_graph(operands, caplog):
    from cast_pass import casts_replaced

    torch.manual_seed(27)
    module = float8(Decoder(256, 768), "rowwise").cuda()
    x = torch.randn(2, 128, 256, dtype=torch.bfloat16, device="cuda")
    grad = torch.randn_like(x)
    without = compiled_step(module, x, grad)()
    with caplog.at_level(logging.INFO, "cast_pass"), casts_replaced(operands=operands, least_elements=0):
        step = compiled_step(module, x, grad)
    assert_equal_bits(step(), without)

    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    stream.synchronize()
    with torch.cuda.graph(graph):
        captured = step()
    for one in captured:
        one.detach().zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert_equal_bits(captured, without)
    assert [message.partition(" of ")[0] for message in logged(caplog)] == ["0", "25" if operands == "any" else "14"]
