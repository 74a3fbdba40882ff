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
ROW_ALONE, COMPUTED = "of the row form alone", "of an operand that Inductor can compute while it casts"


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
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.post_grad import view_to_reshape

    graph = make_fx(function, decomposition_table=select_decomp_table(), tracing_mode="fake")(*tensors)
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
def test_special_values_have_equal_bits(powers_of_two):
    pytest.importorskip("triton", reason="the special values are listed beside kernels in Triton")
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
            "expected convert_element_type(..., torch.float32), found placeholder",
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


def test_scales_that_the_forward_saved_are_left_alone():
    def cast(x: Tensor, scale: Tensor) -> Tensor:
        return (x.float() * scale).clamp(-448.0, 448.0).to(FLOAT8).t().contiguous()

    graph = traced(cast, operand(), torch.ones(1, K))
    assert list(replaced(graph).left) == ["unknown: its scales come from another graph"]


def test_amaxes_of_several_ranks_are_left_alone():
    graph = traced(column, operand())
    (double,) = (node for node in graph.graph.nodes if node.args[1:] == (torch.float64,))
    with graph.graph.inserting_after(double):
        wait = graph.graph.call_function(torch.ops._c10d_functional.wait_tensor.default, (double,))
    double.replace_all_uses_with(wait, delete_user_cb=lambda user: user is not wait)
    assert list(replaced(graph).left) == ["unknown: its amaxes are those of several ranks"]


def test_a_tensorwise_cast_is_left_alone():
    def cast(x: Tensor) -> Tensor:
        scale = (448.0 / x.abs().max().double().clamp(min=1e-12)).float()
        return (x.float() * scale).clamp(-448.0, 448.0).to(FLOAT8).t().contiguous()

    graph = traced(cast, operand())
    assert list(replaced(graph).left) == ["unknown: expected amax(..., [dim], True), found max(...)"]


@pytest.mark.parametrize(
    ("cast", "x", "options", "why"),
    [
        (row, operand(), {}, ROW_ALONE),
        (column, operand(), {"least_elements": M * K + 1}, f"of fewer than {M * K + 1} elements"),
        (column, operand(m=M - 8), {}, "of sizes that are no multiples of 16"),
        (lambda x: column(x.relu()), operand(), {}, COMPUTED),
        (lambda x: column(x.relu()), operand(), {"operands": "in both forms"}, COMPUTED),
        (lambda x: column((x @ x.t()).relu()), operand(), {}, COMPUTED),
    ],
)
def test_what_inductor_does_as_well_is_left_alone(cast, x, options, why):
    graph = traced(cast, x)
    counts = replaced(graph, **options)
    assert (counts.replaced, dict(counts.left)) == (0, {why: 1})


@pytest.mark.parametrize(("hip", "capability"), [("6.3", (9, 0)), (None, (8, 0)), (None, (8, 9))])
def test_gpus_that_do_not_convert_to_float8_are_left_alone(monkeypatch, hip, capability):
    from cast_op import has_operators

    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert has_operators(torch.device("cuda")) is (hip is None and capability == (8, 9))
    assert has_operators(torch.device("cpu"))
    assert not has_operators(torch.device("xpu"))


def test_other_devices_are_left_alone():
    graph = traced(column, torch.empty(M, K, dtype=torch.bfloat16, device="meta"))
    assert dict(replaced(graph).left) == {"on a device without kernels for them": 1}


@pytest.mark.parametrize(
    ("cast", "operands"),
    [
        (lambda x: column(x), "in memory"),
        (lambda x: column(x.relu()), "any"),
        (lambda x: both(x.relu()), "in both forms"),
        (lambda x: column(x), "in both forms"),
        (lambda x: column(x @ x.t()), "in memory"),
        (lambda x: column((x @ x.t()).view(-1, 144)), "in memory"),
        (lambda x: (*column(y := x.relu()), y), "in memory"),
        (lambda x: (*column(y := x.relu()), y.view(-1, 16) @ x[:16, :M]), "in memory"),
    ],
    ids=["input", "any", "both", "column", "product", "view", "returned", "multiplied"],
)
def test_operands_in_memory_are_cast_by_kernels(cast, operands):
    x = operand()
    graph = traced(cast, x)
    counts = replaced(graph, operands=operands)
    assert (counts.replaced > 0, dict(counts.left)) == (True, {})
    assert_equal_bits(graph(x), cast(x))


# --- on and off ------------------------------------------------------------------------------------------------


def passed() -> Any:
    return inductor_config.post_grad_custom_post_pass


@pytest.fixture
def _off_afterwards() -> Iterator[None]:
    with inductor_config.patch({"post_grad_custom_post_pass": None}):
        yield


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "cast_pass"]


def test_it_is_off_until_it_is_turned_on():
    import cast_pass

    assert passed() is None
    with cast_pass.casts_replaced():
        assert isinstance(passed(), cast_pass.CastPass)
        with pytest.raises(ValueError, match="the casts are replaced already"):
            cast_pass.enable()
    assert passed() is None


@pytest.mark.usefixtures("_off_afterwards")
def test_the_environment_turns_it_on():
    import cast_pass

    for off in ({}, {"FP8GATE_CAST_PASS": ""}, {"FP8GATE_CAST_PASS": "0"}):
        assert not cast_pass.enable_if_asked(off)
        assert passed() is None
    with pytest.raises(ValueError, match="FP8GATE_CAST_PASS: expected 1, or 0; got 'yes'"):
        cast_pass.enable_if_asked({"FP8GATE_CAST_PASS": "yes"})
    assert cast_pass.enable_if_asked({"FP8GATE_CAST_PASS": "1"})
    assert isinstance(passed(), cast_pass.CastPass)


def test_another_pass_still_runs_first():
    from cast_pass import casts_replaced

    seen = []
    graph = traced(both, operand())
    with inductor_config.patch({"post_grad_custom_post_pass": lambda graph: seen.append(str(graph))}):
        with casts_replaced(least_elements=0):
            passed()(graph.graph)
            assert passed().uuid() is None  # as the other has none
        assert len(seen) == 1
    assert "cast_both_forms" not in seen[0]
    assert operators_in(graph) == ["cast_both_forms"]


def test_passes_of_other_kinds_are_refused():
    from cast_pass import casts_replaced

    class CustomInferenceAwareGraphPass:
        """As torch 2.13 names it; 2.11 has none."""

        def __call__(self, graph: Any, is_inference: bool) -> None: ...

    aware = CustomInferenceAwareGraphPass()
    for other in (aware, [aware]):
        with (
            inductor_config.patch({"post_grad_custom_post_pass": other}),
            pytest.raises(ValueError, match="expected a pass that takes a graph"),
            casts_replaced(),
        ):
            pass


def test_what_a_graph_depends_on_is_in_its_key():
    from cast_pass import CastPass

    made = [
        CastPass(operands=operands, least_elements=least, before=before)
        for operands in ("in memory", "in both forms", "any")
        for least in (0, 1)
        for before in (None, CastPass(operands="any", least_elements=2, before=None))
    ]
    keys = [one.uuid() for one in made]
    assert None not in keys
    assert len(set(keys)) == len(keys)
    assert keys == [one.uuid() for one in made]


def test_a_line_a_graph_is_logged(caplog):
    from cast_pass import casts_replaced

    graph = traced(lambda x: (*both(x), *row(2 * x), *column(x, eps=0.0)), operand())
    with caplog.at_level(logging.INFO, "cast_pass"), casts_replaced(least_elements=0):
        passed()(graph.graph)
        passed()(traced(torch.relu, operand()).graph)  # without casts, there is nothing to say
    assert logged(caplog) == [
        "2 of 4 float8 casts replaced; left to Inductor: 1 of the row form alone; "
        "1 unknown: expected clamp_min(..., 1e-12), found clamp_min(..., 0.0)"
    ]


# --- compiled --------------------------------------------------------------------------------------------------


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
