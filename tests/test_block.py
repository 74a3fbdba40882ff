"""Blocks: a model's own decoder layer as a rank holds it, any module's roles, arms that compute what they should."""

from __future__ import annotations

import math
import pickle
import shutil

import pytest
import torch
from plans import Block, block_input, block_results
from torch import nn

from fp8gate.calibrate.arms.block import Block as RealBlock
from fp8gate.calibrate.arms.blueprint import BlockError, Blueprint
from fp8gate.calibrate.device.cpu import CpuTimer
from fp8gate.calibrate.device.timer import Results
from fp8gate.filter.contract.recipes import RECIPES
from fp8gate.filter.contract.shapes import LinearShape

CPU = torch.device("cpu")
TIMER = CpuTimer(2**16)


# --- any block -------------------------------------------------------------------------------------------------


def test_roles_of_a_block_are_those_that_ran_with_their_rows():
    block = nn.Sequential(Block(), Block())
    blueprint = Blueprint.of(block, [block_input()], recomputed=False)
    assert blueprint.shapes == {"inner": LinearShape(16, 32, 64), "outer": LinearShape(16, 64, 32)}


def test_inputs_may_be_named():
    blueprint = Blueprint.of(Block(), {"x": block_input(), "scale": 0.0}, recomputed=False)
    assert blueprint.inputs["scale"] == 0.0
    found, _ = block_results(blueprint)
    assert found.gradients[3].count_nonzero() == 0  # of outer's weight


class Twice(nn.Module):
    """A role with two shapes."""

    def __init__(self):
        super().__init__()
        sizes = (32, 64), (64, 32)
        self.layers = nn.ModuleList([nn.ModuleDict({"proj": nn.Linear(*size, dtype=torch.bfloat16)}) for size in sizes])

    def forward(self, x):
        return self.layers[1]["proj"](self.layers[0]["proj"](x))


@pytest.mark.parametrize(
    ("module", "inputs", "complaint"),
    [
        (nn.LayerNorm(32), [torch.zeros(2, 32, requires_grad=True)], "expected an nn.Linear in it; found none"),
        (Block(), [torch.zeros(16, 32, dtype=torch.bfloat16)], "expected one that requires a gradient"),
        (Block().float(), [torch.zeros(16, 32, requires_grad=True)], "x: expected torch.bfloat16, which"),
        (Twice(), [block_input()], r"layers.proj: expected linears of one shape, found \(16, 32, 64\), \(16, 64, 32\)"),
    ],
)
def test_what_cannot_be_planned_is_an_error(module, inputs, complaint):
    with pytest.raises(BlockError, match=complaint):
        Blueprint.of(module, inputs, recomputed=False)


# --- arms ------------------------------------------------------------------------------------------------------


def test_only_the_roles_asked_for_are_converted_and_the_block_stays_as_it_was():
    block = Block()
    blueprint = Blueprint.of(block, [block_input()], recomputed=False)
    ready = blueprint.ready(frozenset({"inner"}), "rowwise", None, "cpu")
    kinds = {name: type(module).__name__ for name, module in ready.module.named_children()}
    assert kinds == {"norm": "LayerNorm", "inner": "Float8Linear", "outer": "Linear"}
    assert type(block.inner) is nn.Linear


@pytest.mark.parametrize("recomputed", [False, True])
def test_float8_differs_from_bf16_by_its_rounding(recomputed):
    blueprint = Blueprint.of(Block(), [block_input()], recomputed=recomputed)
    assert block_results(blueprint)[1] == 0.0
    assert 0.02 < block_results(blueprint, ["inner", "outer"])[1] < 0.3


def test_a_result_that_is_not_finite_has_no_error_that_could_be_small():
    blueprint = Blueprint.of(Block(), [block_input()], recomputed=False)
    block = RealBlock(blueprint, CPU)
    found, _ = block_results(blueprint)
    broken = Results(found.output, (*found.gradients[:-1], found.gradients[-1] * torch.nan))
    error, name = block.error(lambda: broken)
    assert math.isnan(error)
    assert name == "outer.weight"


class WithDeadBias(Block):
    """What is added to all logits alike changes no softmax, so that its gradient is 0 but for rounding."""

    def __init__(self):
        super().__init__()
        self.dead = nn.Parameter(torch.zeros(16, 1, dtype=torch.bfloat16))

    def forward(self, x, scale=1.0):
        return super().forward(x, scale) + torch.softmax(x + self.dead, -1)


def test_a_gradient_that_is_zero_but_for_rounding_is_not_compared():
    """Each gradient is doubled in turn: an error of 1, of which that of `dead` goes unseen."""
    blueprint = Blueprint.of(WithDeadBias(), [block_input()], recomputed=False)
    block = RealBlock(blueprint, CPU)
    arm = block.arm(blueprint.ready(frozenset(), "rowwise", None, "cpu"))

    def doubled(index):
        right = TIMER.results(arm)
        return Results(right.output, tuple((1 + (i == index)) * one for i, one in enumerate(right.gradients)))

    errors = [block.error(lambda index=index: doubled(index)) for index in range(6)]
    assert sorted(error for error, _ in errors) == pytest.approx([0.0, *[1.0] * 5])
    assert {name for error, name in errors if error} == {
        "x",
        "norm.weight",
        "norm.bias",
        "inner.weight",
        "outer.weight",
    }
    assert block_results(blueprint, ["inner"])[1] < 0.3


def test_what_a_block_adds_to_its_input_is_compared_not_their_sum():
    blueprint = Blueprint.of(Block(), [block_input()], recomputed=False)
    block = RealBlock(blueprint, CPU)
    arm = block.arm(blueprint.ready(frozenset(), "rowwise", None, "cpu"))
    nothing_added = lambda: Results(block.inputs["x"].detach(), TIMER.results(arm).gradients)  # noqa: E731
    error, name = block.error(nothing_added)
    assert (round(error, 2), name) == (1.0, "output")


def test_what_is_checked_is_not_what_is_timed():
    blueprint = Blueprint.of(Block(), [block_input()], recomputed=False)
    block = RealBlock(blueprint, CPU)
    arm = block.arm(blueprint.ready(frozenset(), "rowwise", None, "cpu"))
    seen = []
    timed = block.inputs["x"].detach().clone()
    block.error(lambda: seen.append(block.inputs["x"].detach().clone()) or TIMER.results(arm))
    assert torch.equal(block.inputs["x"], timed)
    likeness = [torch.corrcoef(rows.float())[0, 1:].mean() for rows in (timed, *seen)]
    assert abs(likeness[0]) < 0.2 < 0.3 < likeness[1] < 0.7


class Divides(Block):
    """0 / 0 in some rows."""

    def forward(self, x, scale=1.0):
        return super().forward(x, scale) / (x > 0)


def test_a_block_that_is_not_finite_in_bf16_is_an_error():
    with pytest.raises(BlockError, match="output: expected finite values in bf16"):
        RealBlock(Blueprint.of(Divides(), [block_input()], recomputed=False), CPU)


def test_blocks_that_compute_something_else_have_another_identity():
    def identity(block, rows=16):
        x = torch.zeros(rows, 32, dtype=torch.bfloat16, requires_grad=True)
        return Blueprint.of(block, [x], recomputed=False).identity

    assert identity(Block()) == identity(Block())
    assert len({identity(Block()), identity(Block(), rows=32), identity(WithDeadBias())}) == 3


class Products(nn.Module):
    """Two linears and nothing between them: Inductor generates no code that g++ compiles."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = (nn.Linear(*size, bias=False, dtype=torch.bfloat16) for size in ((32, 64), (64, 32)))

    def forward(self, x):
        return self.outer(self.inner(x))


@pytest.fixture
def compiled_runs(monkeypatch, tmp_path):
    """Of each run of compiled code, one entry; what is compiled is kept for this test alone."""
    from torch._inductor.output_code import CompiledFxGraph

    runs, run = [], CompiledFxGraph.__call__
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(CompiledFxGraph, "__call__", lambda graph, *args: runs.append(graph) or run(graph, *args))
    torch._dynamo.reset()
    return runs


def sent(module, recomputed):
    """The blueprint as another process gets it."""
    return pickle.loads(pickle.dumps(Blueprint.of(module, [block_input()], recomputed=recomputed)))


@pytest.mark.parametrize("recomputed", [False, True])
def test_compiled_products_compute_the_same_and_run_once_in_each_direction(compiled_runs, recomputed):
    assert block_results(sent(Products(), recomputed), inductor={})[1] < 0.02
    assert len(compiled_runs) == 2


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for the CPU needs g++")
@pytest.mark.parametrize("recomputed", [False, True])
def test_a_compiled_block_computes_the_same_in_float8(compiled_runs, recomputed):
    blueprint = sent(Block(), recomputed)
    error = block_results(blueprint, ["inner"], RECIPES["rowwise"].inductor)[1]
    assert len(compiled_runs) == 2
    assert error == pytest.approx(block_results(blueprint, ["inner"])[1], rel=0.1)
