"""Compiling without running: what is compiled computes what it should later, and other processes find it."""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from samples import python

from fp8gate import casts
from fp8gate.calibrate.arms.compilation import (
    ReadyLinear,
    _InductorUntilRun,
    _settings,
    compiled_ahead,
    compiled_linear,
    eager_linear,
)
from fp8gate.calibrate.arms.linear import Operands
from fp8gate.calibrate.arms.numerics import References, acceptable
from fp8gate.calibrate.device.cpu import CpuTimer
from fp8gate.filter.contract.recipes import RECIPES
from fp8gate.filter.contract.shapes import LinearShape

CPU = torch.device("cpu")
SHAPE = LinearShape(64, 64, 64)
FLUSH_BYTES = 2**16

COMPILE = """
{first_import}
import json
import fp8gate.calibrate.sweep.run_sweep
from torch._dynamo.utils import counters
from fp8gate.calibrate.arms.compilation import compiled_linear
from fp8gate.filter.contract.shapes import LinearShape

compiled_linear("tensorwise", LinearShape(64, 64, 64), {{}}, "cpu")
print(json.dumps({{name: n for name, n in counters["inductor"].items() if name.startswith("fxgraph_cache")}}))
"""

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for the CPU needs g++")


@pytest.fixture(scope="module", autouse=True)
def _own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


@pytest.fixture
def bf16():
    """Compiled within tenths of a second: Inductor leaves bf16's products to ATen, so that g++ has nothing to do."""
    torch._dynamo.reset()
    module = eager_linear(None, SHAPE).module
    x = torch.empty(SHAPE.m, SHAPE.k, device="meta", dtype=torch.bfloat16, requires_grad=True)
    function = compiled_ahead(module, {"input": x}, {}, "cpu")
    return ReadyLinear(None, module, lambda x: function(input=x))


def errors_of(linear):
    """Of the linear over random operands, computed by a timer."""
    torch.manual_seed(0)
    operands = Operands.random(SHAPE, CPU)
    timer = CpuTimer(FLUSH_BYTES)
    return References(operands).relative_errors(timer.results(timer.prepare(linear.over(operands))))


@pytest.mark.slow
@needs_compiler
def test_every_recipe_computes_as_it_does_uncompiled():
    """Each has its own errors, so none runs another's code. All are compiled before any of them runs, as a point's."""
    torch._dynamo.reset()
    linears = {recipe: compiled_linear(recipe, SHAPE, RECIPES[recipe].inductor, "cpu") for recipe in RECIPES}
    compiled = {recipe: errors_of(linear) for recipe, linear in linears.items()}
    eager = {recipe: errors_of(eager_linear(recipe, SHAPE)) for recipe in RECIPES}
    for recipe in RECIPES:
        assert acceptable(compiled[recipe])
        assert compiled[recipe] == pytest.approx(eager[recipe], rel=0.02)
    assert len({tuple(round(error, 4) for error in errors.values()) for errors in compiled.values()}) == len(RECIPES)


def test_bf16_computes_as_it_does_uncompiled(bf16):
    compiled = errors_of(bf16)
    assert acceptable(compiled)
    assert compiled == pytest.approx(errors_of(eager_linear(None, SHAPE)), rel=0.02)


def test_it_runs_again_over_other_operands(bf16):
    for _ in range(2):
        arm = bf16.over(Operands.random(SHAPE, CPU))
        assert acceptable(References(arm.operands).relative_errors(CpuTimer(FLUSH_BYTES).results(arm)))


@pytest.fixture
def _compiled_code_refuses(monkeypatch):
    from torch._inductor.output_code import CompiledFxGraph

    def run(*_):
        raise AssertionError("compiled code ran")

    monkeypatch.setattr(CompiledFxGraph, "__call__", run)


@pytest.mark.usefixtures("_compiled_code_refuses")
def test_compiling_runs_nothing(bf16):
    """Neither kernels nor the code around them: on a GPU another process may be timing."""
    with pytest.raises(AssertionError, match="compiled code ran"):
        bf16.over(Operands.random(SHAPE, CPU)).forward()


def test_operands_of_another_shape_are_refused_not_recompiled(bf16):
    with pytest.raises(AssertionError, match="size"):
        bf16.over(Operands.random(LinearShape(32, 64, 64), CPU)).forward()


def test_what_the_compiler_refuses_is_raised():
    with pytest.raises(AttributeError, match="no_such_setting"):
        compiled_linear("tensorwise", SHAPE, {"no_such_setting": True}, "cpu")


def test_casts_that_are_unknown_to_the_pass_are_an_error(monkeypatch):
    """As with another torch or torchao, whose graphs differ: else Inductor's casts would be measured as fp8gate's."""
    from fp8gate.casts import pattern

    monkeypatch.setattr(pattern, "FLOAT8_MAX", 440.0)
    with pytest.raises(
        Exception, match=r"UnknownPatternError: 0 of \d float8 casts replaced; .* unknown: expected clamp"
    ):
        compiled_linear("rowwise", SHAPE, RECIPES["rowwise"].inductor, "cpu", "fp8gate")


@pytest.mark.parametrize("is_on", [True, False])
def test_the_casts_are_those_that_were_asked_for_whatever_is_on(monkeypatch, is_on):
    """Where the module is compiled; this process has its own setting again after that."""
    found = []
    monkeypatch.setattr(
        _InductorUntilRun, "__call__", lambda *_: found.append(casts.is_enabled()) or pytest.fail("compiled")
    )
    with casts.replaced() if is_on else casts.not_replaced():
        for asked in ("inductor", "fp8gate"):
            with contextlib.suppress(pytest.fail.Exception):
                compiled_linear("rowwise", SHAPE, {}, "cpu", asked)
            assert casts.is_enabled() is is_on
    assert found == [False, True]


@pytest.mark.slow
@needs_compiler
def test_other_processes_find_it_whatever_they_imported_first(tmp_path):
    def compile_after(first_import):
        process = python("-c", COMPILE.format(first_import=first_import), TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
        output, errors = process.communicate()
        assert output, errors
        return json.loads(output)

    assert compile_after("") == {"fxgraph_cache_miss": 2}  # forward and backward
    assert compile_after("import torch") == {"fxgraph_cache_hit": 2}


def test_kernels_that_training_has_tuned_are_tuned_again():
    """Inductor keeps its choice of a kernel's launch configuration under a key that names the cache."""
    from torch._inductor.runtime.autotune_cache import AutotuneCache

    outside = AutotuneCache._prepare_key("/cache/ab/cab.py")
    with _settings({}, "inductor"):
        assert AutotuneCache._prepare_key("/cache/ab/cab.py") != outside


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last, torch.preserve_format])
def test_a_cache_key_does_not_depend_on_who_imported_torch(monkeypatch, memory_format):
    key = pickle.dumps(memory_format)
    assert pickle.loads(key) is memory_format
    monkeypatch.setattr(sys, "modules", {"first": SimpleNamespace(torch=torch), **sys.modules})
    assert pickle.dumps(memory_format) == key
