"""The timers: what they run, what they count, and that what they time is right."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fp8gate.calibrate import timing
from fp8gate.calibrate.linears import INDUCTOR, Operands, build_arm, compile_settings
from fp8gate.calibrate.numerics import acceptable, relative_errors
from fp8gate.calibrate.timing import WARM_UP_RUNS, CpuTimer, CudaTimer, Sample
from fp8gate.filter.shapes import LinearShape
from fp8gate.filter.table import RECIPES

FORWARD_NS, BACKWARD_NS, FLUSH_NS = 10_500, 30_000, 1_000_000


class Clock:
    """Time that passes only in what a timer calls, and a log of those calls."""

    def __init__(self):
        self.now_ns = 0
        self.log = []

    def spend(self, call, duration_ns):
        self.log.append(call)
        self.now_ns += duration_ns


class FakeArm:
    """An arm as far as a timer can see."""

    def __init__(self, name, clock):
        self.name, self.clock = name, clock

    def forward(self):
        self.clock.spend(f"{self.name} forward", FORWARD_NS)
        return torch.ones(2, 3, requires_grad=True) * 2

    def backward(self, output):
        self.clock.spend(f"{self.name} backward", BACKWARD_NS)
        return torch.zeros(2, 4), torch.zeros(3, 4)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter_ns=lambda: clock.now_ns))
    return clock


@pytest.fixture
def timer(clock):
    """A CpuTimer whose flushes the clock sees."""
    timer = CpuTimer()
    timer._flush_buffer = SimpleNamespace(sum=lambda: clock.spend("flush", FLUSH_NS))
    return timer


def test_prepare_runs_both_directions_as_often_as_it_takes_to_warm_up(timer, clock):
    timer.prepare(FakeArm("a", clock))
    assert clock.log == ["a forward", "a backward"] * WARM_UP_RUNS


def test_a_round_runs_every_arm_once_in_order_with_a_cold_cache_each(timer, clock):
    timer.round([FakeArm("b", clock), FakeArm("a", clock)])
    assert clock.log == ["flush", "b forward", "flush", "b backward", "flush", "a forward", "flush", "a backward"]


def test_times_are_those_of_the_calls_without_the_flush(timer, clock):
    samples = timer.round([FakeArm("a", clock), FakeArm("b", clock)])
    assert samples == [Sample(fwd_us=10.5, bwd_us=30.0)] * 2


def test_results_are_computed_once_more_and_carry_no_graph(timer, clock):
    results = timer.results(FakeArm("a", clock))
    assert clock.log == ["a forward", "a backward"]
    assert not results.output.requires_grad
    assert (results.output.shape, results.grad_x.shape, results.grad_weight.shape) == ((2, 3), (2, 4), (3, 4))


@pytest.mark.parametrize("recipe", [None, *RECIPES])
def test_a_real_arm_takes_time_and_gives_results_of_its_shapes(recipe):
    timer = CpuTimer()
    arm = build_arm(recipe, Operands.random(LinearShape(32, 48, 16), torch.device("cpu")), compiled=False)
    prepared = timer.prepare(arm)
    results = timer.results(prepared)
    ((sample),) = timer.round([prepared])
    assert sample.fwd_us > 0
    assert sample.bwd_us > 0
    assert (results.output.shape, results.grad_x.shape, results.grad_weight.shape) == ((32, 16), (32, 48), (16, 48))
    assert acceptable(relative_errors(results, arm.operands))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("recipe", [None, "rowwise"])
def test_a_captured_arm_computes_what_it_should(recipe):
    device = torch.device("cuda")
    timer = CudaTimer(device)
    operands = Operands.random(LinearShape(256, 512, 128), device)
    with compile_settings(INDUCTOR[recipe] if recipe else {}):
        captured = timer.prepare(build_arm(recipe, operands, compiled=recipe is not None))
    assert acceptable(relative_errors(timer.results(captured), operands))
    with torch.no_grad():
        operands.x.mul_(-2)  # other data at the same addresses: a replay computes anew
    assert acceptable(relative_errors(timer.results(captured), operands))
    samples = timer.round([captured, captured])
    assert len(samples) == 2
    assert all(0 < time_us < 1e5 for sample in samples for time_us in (sample.fwd_us, sample.bwd_us))
    timer.release()
