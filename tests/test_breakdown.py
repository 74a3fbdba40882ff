"""Where the time goes: the numbers derived from kernels and timings, how they are told, and one real run on the CPU."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from samples import quick_points
from typer.testing import CliRunner

from fp8gate.calibrate.breakdown import take_apart as module
from fp8gate.calibrate.breakdown.breakdown_record import ArmBreakdown, Breakdown, Ceilings, Direction, Flop, Kernel
from fp8gate.calibrate.breakdown.profiler import ProfileError
from fp8gate.calibrate.breakdown.roofline import Work, work_of
from fp8gate.calibrate.breakdown.story import sentence, title
from fp8gate.calibrate.breakdown.take_apart import BreakdownError, break_down
from fp8gate.calibrate.device.cpu import Cpu, CpuWatch
from fp8gate.calibrate.device.lock import DeviceLock
from fp8gate.calibrate.report.breakdown_figure import write_png
from fp8gate.calibrate.report.breakdown_text import breakdown_json, breakdown_text
from fp8gate.cli import app
from fp8gate.filter.contract.recipes import RECIPES, Variant
from fp8gate.filter.contract.shapes import LinearShape

SHAPE = LinearShape(8192, 8192, 1024)
PRODUCT = 2 * SHAPE.m * SHAPE.k * SHAPE.n


def arm(name, products_us, casts_us, timed_us, work):
    """A third of everything forward."""
    kernels = [Kernel(name="nvjet", kind="product", calls=1, time_us=products_us)]
    if casts_us:
        kernels.append(Kernel(name="triton_poi_fused_0", kind="cast", calls=2, time_us=casts_us))
    forward, backward = (
        Direction(
            flop=flop,
            timed_us=timed_us * share,
            kernels=tuple(replace(kernel, time_us=kernel.time_us * share) for kernel in kernels),
        )
        for flop, share in ((work.forward, 1 / 3), (work.backward, 2 / 3))
    )
    return ArmBreakdown(
        name=name,
        forward=forward,
        backward=backward,
        least_cast_bytes=work.least_cast_bytes,
        rounds=2000,
        profiled_rounds=1900,
        timed_mhz=1500,
        profiled_mhz=1515,
    )


@pytest.fixture
def found():
    """The products save 430 us, the casts cost 560 us, the gaps 10 us."""
    return Breakdown(
        shape=SHAPE,
        variant=Variant("rowwise"),
        device="NVIDIA H200",
        ceilings=Ceilings(square=8192, bf16_tflop_per_s=800.0, float8_tflop_per_s=1600.0, copy_gb_per_s=4000.0),
        bf16=arm("bf16", 860.0, 0.0, 880.0, work_of(None, SHAPE)),
        float8=arm("rowwise", 430.0, 560.0, 1020.0, work_of("rowwise", SHAPE)),
    )


def test_one_sentence_says_why(found):
    assert sentence(found) == (
        "the products save 430 us, the casts cost 560 us, the gaps between kernels cost 10 us: "
        "rowwise takes 1.16 times bf16's time"
    )


def test_parts_that_add_up_are_no_finding(found):
    assert not found.has_findings
    assert "bf16: kernels sum to 860.0 us, timed 880.0 us, 2.3% apart\n" in breakdown_text(found)


@pytest.mark.parametrize(("timed_us", "is_finding"), [(904.0, False), (906.0, True), (820.0, False), (818.0, True)])
def test_parts_more_than_a_twentieth_apart_from_the_timing_are_a_finding(found, timed_us, is_finding):
    off = replace(found, bf16=arm("bf16", 860.0, 0.0, timed_us, work_of(None, SHAPE)))
    assert off.has_findings == is_finding
    assert ("the parts do not explain the whole" in breakdown_text(off)) == is_finding


def test_what_products_and_casts_reach_against_the_ceilings(found):
    bf16, rowwise = breakdown_json(found)["arms"]
    assert bf16["product_tflop_per_s"] == pytest.approx(3 * PRODUCT / 860e6)
    assert bf16["of_product_ceiling"] == pytest.approx(3 * PRODUCT / 860e6 / 800)
    assert rowwise["of_product_ceiling"] == pytest.approx(3 * PRODUCT / 430e6 / 1600)
    assert bf16["cast_gb_per_s_at_least"] is None
    assert rowwise["cast_gb_per_s_at_least"] == pytest.approx(4 * 8192 * (8192 + 2 * 1024) / 560e3)
    assert rowwise["of_copy_ceiling_at_least"] == pytest.approx(4 * 8192 * (8192 + 2 * 1024) / 560e3 / 4000)


def test_kernels_of_both_arms_and_directions_are_in_the_text_long_names_shortened(found):
    long = Kernel(name=f"void cutlass::{'x' * 500}::end", kind="product", calls=1, time_us=1.0)
    forward = replace(found.float8.forward, kernels=(*found.float8.forward.kernels, long))
    text = breakdown_text(replace(found, float8=replace(found.float8, forward=forward)))
    assert text.count("nvjet") == 4
    assert text.count("triton_poi_fused_0") == 2
    (row,) = (line for line in text.splitlines() if "void cutlass::" in line)
    assert "xxx::end" in row
    assert len(row) < 150


def test_the_json_has_every_kernel_and_sums_to_the_timing(found):
    for one in json.loads(json.dumps(breakdown_json(found)))["arms"]:
        kernels = [kernel for direction in one["directions"].values() for kernel in direction["kernels"]]
        assert sum(kernel["time_us"] for kernel in kernels) == pytest.approx(one["kernels_us"])
        assert one["products_us"] + one["casts_us"] + one["gaps_us"] == pytest.approx(one["timed_us"])


def test_a_picture_is_written(found, tmp_path):
    write_png(found, tmp_path / "bar.png")
    assert (tmp_path / "bar.png").read_bytes().startswith(b"\x89PNG")


def test_the_work_of_each_recipe():
    shape = LinearShape(16, 32, 64)
    product, x, weight, grad = 2 * 16 * 32 * 64, 16 * 32, 64 * 32, 16 * 64
    assert work_of(None, shape) == Work(Flop(product, 0), Flop(2 * product, 0), 0)
    one_version, two_versions = 2 + 1, 2 + 2
    every = x + weight + grad
    assert work_of("tensorwise", shape) == Work(Flop(0, product), Flop(0, 2 * product), every * one_version)
    assert work_of("rowwise", shape) == Work(Flop(0, product), Flop(0, 2 * product), every * two_versions)
    mixed = weight * two_versions + (x + grad) * one_version
    assert work_of("rowwise_with_gw_hp", shape) == Work(Flop(0, product), Flop(product, product), mixed)


def test_products_of_two_precisions_take_their_own_ceilings(found):
    assert found.ceilings.least_us(Flop(800 * 10**6, 1600 * 10**6)) == pytest.approx(2.0)


@pytest.fixture
def quick(monkeypatch):
    """On the CPU, for tenths of a second."""
    monkeypatch.setattr(module, "PROFILE_SETTLE_S", 0.01)
    monkeypatch.setattr(module, "PROFILE_RUN_S", 0.01)
    monkeypatch.setattr(Cpu, "defaults", replace(Cpu.defaults, square=64, copy_bytes=2**16))
    with quick_points():
        yield


def run(*args):
    return CliRunner().invoke(app, ["breakdown", *args, "--device", "cpu"])


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_real_linear_on_the_cpu(recipe, tmp_path):
    """What a shared CPU takes beside its ops varies: the parts may or may not add up."""
    result = run("64", "48", "32", "--recipe", recipe, "--json", "--png", str(tmp_path / "bar.png"))
    assert result.exit_code in (0, 1), result.output
    told = json.loads(result.stdout)
    assert told["findings"] == (result.exit_code == 1)
    bf16, float8 = told["arms"]
    assert products(bf16, "forward") == {"aten::mm": 1}
    assert products(bf16, "backward") == {"aten::mm": 2}
    assert "aten::_scaled_mm" in products(float8, "forward")
    assert "aten::sum" not in {kernel["name"] for kernel in bf16["directions"]["backward"]["kernels"]}
    assert float8["casts_us"] > float8["products_us"] > 0
    assert (tmp_path / "bar.png").stat().st_size > 0


def products(arm, direction):
    kernels = arm["directions"][direction]["kernels"]
    return {kernel["name"]: kernel["calls"] for kernel in kernels if kernel["kind"] == "product"}


@pytest.mark.usefixtures("quick")
def test_the_text_names_what_is_apart():
    result = run("64", "48", "32", "--recipe", "rowwise")
    assert result.exit_code in (0, 1), result.output
    assert "rowwise: kernels sum to" in result.stdout


def test_a_shape_that_float8_cannot_compute_is_exit_code_2():
    result = run("64", "50", "32", "--recipe", "rowwise")
    assert result.exit_code == 2
    assert "k = 50" in result.stderr


def test_casts_are_refused_where_there_are_none():
    result = run("64", "48", "32", "--recipe", "rowwise", "--casts", "fp8gate")
    assert (result.exit_code, "on a CPU nothing is compiled" in result.stderr) == (2, True)
    result = run("64", "48", "32", "--recipe", "tensorwise", "--casts", "fp8gate")
    assert result.exit_code == 2
    assert "casts: expected inductor for tensorwise; got 'fp8gate'" in result.stderr


def test_what_was_broken_down_with_the_casts_says_so(found):
    ours = replace(found, variant=Variant("rowwise", "fp8gate"))
    assert "rowwise, fp8gate's casts, " in title(ours)
    assert breakdown_json(ours) == {**breakdown_json(found), "casts": "fp8gate"}


def test_a_device_that_a_sweep_has_is_exit_code_2():
    with DeviceLock(torch.device("cpu")):
        result = run("64", "48", "32", "--recipe", "rowwise")
    assert result.exit_code == 2
    assert "another sweep" in result.stderr


@pytest.mark.parametrize("error", [BreakdownError("thermal slowdown"), ProfileError("nothing recorded")])
def test_what_keeps_it_from_an_answer_is_exit_code_1(monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(module, "break_down", fail)
    result = run("64", "48", "32", "--recipe", "rowwise")
    assert result.exit_code == 1
    assert str(error) in result.stderr


def test_ctrl_c_is_exit_code_130(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "break_down", interrupted)
    result = run("64", "48", "32", "--recipe", "rowwise")
    assert (result.exit_code, result.stderr) == (130, "fp8gate: stopped\n")


def test_a_picture_that_cannot_be_written_is_exit_code_2_and_loses_nothing(found, monkeypatch, tmp_path):
    monkeypatch.setattr(module, "break_down", lambda *_: found)
    result = run("64", "48", "32", "--recipe", "rowwise", "--png", str(tmp_path / "no" / "bar.png"))
    assert result.exit_code == 2
    assert sentence(found) in result.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_real_linear_on_a_gpu():
    """Of a size whose launch gaps are small beside its kernels."""
    found = break_down(LinearShape(4096, 4096, 4096), Variant("rowwise"), torch.device("cuda"))
    assert not found.has_findings, breakdown_text(found)
    calls = {
        (arm.name, name): sum(kernel.calls for kernel in direction.kernels if kernel.kind == "product")
        for arm in found.arms
        for name, direction in arm.directions.items()
    }
    assert calls["bf16", "forward"] == calls["rowwise", "forward"] == 1
    assert calls["bf16", "backward"] == calls["rowwise", "backward"] == 2
    assert found.bf16.kind_us("cast") < 0.01 * found.bf16.kind_us("product")
    assert found.float8.kind_us("cast") > 0


@pytest.mark.usefixtures("quick")
def test_a_gpu_that_slows_down_ends_it(monkeypatch):
    monkeypatch.setattr(CpuWatch, "slowdown", lambda self: "thermal slowdown")
    result = run("64", "48", "32", "--recipe", "rowwise")
    assert result.exit_code == 1
    assert "thermal slowdown of the GPU" in result.stderr
