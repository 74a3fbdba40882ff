"""The timers: what they run, what they count, and that what they time is right."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace

import pytest
import torch

from fp8gate.calibrate.arms.compilation import compiled_linear, eager_linear
from fp8gate.calibrate.arms.linear import Operands
from fp8gate.calibrate.arms.numerics import References, acceptable
from fp8gate.calibrate.device.cpu import CpuTimer
from fp8gate.calibrate.device.cuda.timer import CudaTimer
from fp8gate.calibrate.device.timer import TUNING_RUNS, WARM_UP_RUNS, Sample
from fp8gate.calibrate.timing.steady_run import balanced_orders
from fp8gate.filter.contract.recipes import RECIPES
from fp8gate.filter.contract.shapes import LinearShape

FORWARD_NS, BACKWARD_NS, FLUSH_NS = 10_500, 30_000, 1_000_000
FLUSH_BYTES = 2**16


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
    monkeypatch.setattr("fp8gate.calibrate.device.cpu.time", SimpleNamespace(perf_counter_ns=lambda: clock.now_ns))
    return clock


@pytest.fixture
def timer(clock):
    """A CpuTimer whose flushes the clock sees."""

    class LoggedTimer(CpuTimer):
        def flush(self):
            clock.spend("flush", FLUSH_NS)

    return LoggedTimer(FLUSH_BYTES)


def test_prepare_runs_both_directions_as_often_as_it_takes_to_warm_up(timer, clock):
    timer.prepare(FakeArm("a", clock))
    assert clock.log == ["a forward", "a backward"] * WARM_UP_RUNS


def test_a_round_runs_every_arm_once_in_its_order_with_a_cold_cache_each(timer, clock):
    timer.rounds([FakeArm("a", clock), FakeArm("b", clock)], [(1, 0)])
    assert clock.log == ["flush", "b forward", "flush", "b backward", "flush", "a forward", "flush", "a backward"]


def test_samples_are_in_the_order_of_the_arms_whatever_the_order_they_ran_in(timer, clock):
    slow = FakeArm("slow", clock)
    slow.forward = lambda: clock.spend("slow forward", 2 * FORWARD_NS)
    rounds = timer.rounds([slow, FakeArm("fast", clock)], [(0, 1), (1, 0), (1, 0)])
    assert [[sample.fwd_us for sample in samples] for samples in rounds] == [[21.0, 10.5]] * 3


def test_times_are_those_of_the_calls_without_the_flush(timer, clock):
    (samples,) = timer.rounds([FakeArm("a", clock), FakeArm("b", clock)], [(0, 1)])
    assert samples == [Sample(fwd_us=10.5, bwd_us=30.0)] * 2


def test_results_are_computed_once_more_and_carry_no_graph(timer, clock):
    results = timer.results(FakeArm("a", clock))
    assert clock.log == ["a forward", "a backward"]
    assert not results.output.requires_grad
    assert (results.output.shape, results.grad_x.shape, results.grad_weight.shape) == ((2, 3), (2, 4), (3, 4))


@pytest.mark.parametrize("recipe", [None, *RECIPES])
def test_a_real_arm_takes_time_and_gives_results_of_its_shapes(recipe):
    timer, shape = CpuTimer(FLUSH_BYTES), LinearShape(32, 48, 16)
    operands = Operands.random(shape, torch.device("cpu"))
    prepared = timer.prepare(eager_linear(recipe, shape).over(operands))
    results = timer.results(prepared)
    (((sample),),) = timer.rounds([prepared], [(0,)])
    assert sample.fwd_us > 0
    assert sample.bwd_us > 0
    assert (results.output.shape, results.grad_x.shape, results.grad_weight.shape) == ((32, 16), (32, 48), (16, 48))
    assert acceptable(References(operands).relative_errors(results))


def test_the_least_of_a_few_cold_runs_counts_after_one_that_does_not(timer, clock):
    durations_ns = iter([1_000, 9_000, 7_500, 8_000])
    assert timer.least_us(lambda: clock.spend("launch", next(durations_ns))) == 7.5
    assert clock.log == ["launch", *["flush", "launch"] * TUNING_RUNS[0]]


@pytest.mark.parametrize("arms", [1, 2, 3])
def test_in_each_pair_of_rounds_the_second_is_the_first_reversed(arms):
    orders = balanced_orders(arms, 40, random.Random(3))
    assert all(sorted(order) == list(range(arms)) for order in orders)
    assert all(orders[i + 1] == orders[i][::-1] for i in range(0, 40, 2))
    assert len({tuple(order) for order in orders}) == math.factorial(arms)


def test_orders_are_reproducible_and_as_many_as_asked():
    orders = balanced_orders(2, 31, random.Random(0))
    assert len(orders) == 31
    assert orders == balanced_orders(2, 31, random.Random(0))
    assert orders != balanced_orders(2, 31, random.Random(1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("recipe", [None, "rowwise"])
def test_a_captured_arm_computes_what_it_should_and_gives_its_memory_back(recipe):
    device, shape = torch.device("cuda"), LinearShape(256, 512, 128)
    timer = CudaTimer(device)
    linear = compiled_linear(recipe, shape, RECIPES[recipe].inductor, "cuda") if recipe else eager_linear(None, shape)
    operands = Operands.random(shape, device)
    captured = timer.prepare(linear.over(operands))
    assert acceptable(References(operands).relative_errors(timer.results(captured)))
    with torch.no_grad():
        operands.x.mul_(-2)  # other data at the same addresses: a replay computes with it
    assert acceptable(References(operands).relative_errors(timer.results(captured)))
    rounds = timer.rounds([captured, captured], [(0, 1), (1, 0)])
    assert [len(samples) for samples in rounds] == [2, 2]
    assert all(0 < time_us < 1e5 for samples in rounds for s in samples for time_us in (s.fwd_us, s.bwd_us))
    operands.free()
    timer.free([captured])
    assert captured.outputs.output.untyped_storage().nbytes() == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_arms_that_share_memory_still_compute_what_they_should():
    device, shape = torch.device("cuda"), LinearShape(1024, 1024, 1024)
    timer, operands = CudaTimer(device, shares_memory=True), Operands.random(shape, device)
    references, captured, taken = References(operands), [], []
    for _ in range(4):
        captured.append(timer.prepare(eager_linear(None, shape).over(operands)))
        assert acceptable(references.relative_errors(timer.results(captured[-1])))
        timer.forget_results(captured[-1])
        taken.append(torch.cuda.memory_reserved(device))
    assert taken[1] == taken[3]
    rounds = timer.rounds(captured, [(0, 1, 2, 3), (3, 2, 1, 0)])
    assert all(sample.fwd_us > 0 for samples in rounds for sample in samples)
