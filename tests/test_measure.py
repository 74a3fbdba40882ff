"""One point: how many rounds it takes, and what its failures leave of it."""

from __future__ import annotations

import random
import time
from datetime import timezone

import pytest
import torch
from samples import PROTOCOL, replaced

from fp8gate.calibrate.linears import Operands
from fp8gate.calibrate.measure import DeviceLostError, measure_point
from fp8gate.calibrate.sweep import make_setup
from fp8gate.calibrate.timing import CpuTimer, Results, Sample
from fp8gate.filter.shapes import LinearShape
from fp8gate.filter.table import RECIPES

CPU = torch.device("cpu")
SHAPE = LinearShape(32, 48, 16)
PROTOCOLS = {recipe: replaced(protocol, settle_s=0.0) for recipe, protocol in make_setup(CPU).protocols.items()}
WIN, LOSS, SLIGHT_LOSS = 1.5, 0.5, 0.9


class FakeTimer:
    """Really computes each arm's results; the times are made up.

    speedups: of each recipe in its first rounds; WIN in those that follow. prepare_errors: raised for an arm (None is
    bf16). damage: what becomes of an arm's results.
    """

    def __init__(self, speedups=None, prepare_errors=None, damage=None):
        self.speedups = speedups or {}
        self.prepare_errors = prepare_errors or {}
        self.damage = damage or {}
        self.rounds = []  # the recipes of each, in the order timed
        self.released = 0

    def prepare(self, arm):
        if arm.recipe in self.prepare_errors:
            raise self.prepare_errors[arm.recipe]
        return arm

    def results(self, prepared):
        output = prepared.forward()
        results = Results(output.detach(), *prepared.backward(output))
        return self.damage.get(prepared.recipe, lambda right: right)(results)

    def round(self, prepared):
        done = len(self.rounds)
        self.rounds.append([arm.recipe for arm in prepared])
        return [self._sample(arm.recipe, done) for arm in prepared]

    def _sample(self, recipe, done):
        first = self.speedups.get(recipe, [])
        total_us = 300.0 if recipe is None else 300.0 / (first[done] if done < len(first) else WIN)
        return Sample(fwd_us=total_us / 3, bwd_us=total_us * 2 / 3)

    def release(self):
        self.released += 1


def zeroed_output(right):
    return Results(torch.zeros_like(right.output), right.grad_x, right.grad_weight)


def measured(timer, protocols=PROTOCOLS, shape=SHAPE):
    torch.manual_seed(0)
    return measure_point(shape, protocols, timer, CPU, random.Random(0))


def rounds_of(record):
    return {name: len(arm.fwd_us) for name, arm in record.arms.items()}


def points_of(record):
    return {recipe: record.point(recipe, PROTOCOLS[recipe]) for recipe in record.recipes}


@pytest.mark.parametrize(
    ("first_speedups", "rounds", "status"),
    [
        pytest.param([WIN], 8, "measured", id="clear at once"),
        pytest.param([LOSS] * 32, 8, "measured", id="a clear loss"),
        pytest.param([SLIGHT_LOSS], 12, "measured", id="one round slightly lost"),
        pytest.param([LOSS], 16, "measured", id="one round lost"),
        pytest.param([LOSS] * 2, 24, "measured", id="two rounds lost"),
        pytest.param([LOSS] * 3, 32, "measured", id="three rounds lost"),
        pytest.param([LOSS, WIN] * 16, 32, "ambiguous", id="half the rounds lost"),
        pytest.param([0.999, 1.001] * 16, 8, "measured", id="a close tie"),
    ],
)
def test_rounds_are_added_until_the_bounds_decide(first_speedups, rounds, status):
    timer = FakeTimer(speedups={"rowwise": first_speedups})
    record = measured(timer, {"rowwise": PROTOCOLS["rowwise"]})
    assert rounds_of(record) == {"bf16": rounds, "rowwise": rounds}
    assert len(timer.rounds) == rounds
    assert points_of(record)["rowwise"].status == status


def test_rounds_go_on_until_every_recipe_is_decided():
    record = measured(FakeTimer(speedups={"rowwise": [LOSS]}))
    assert rounds_of(record) == dict.fromkeys(("bf16", *RECIPES), 16)


def test_the_protocol_says_how_many_rounds():
    protocol = replaced(PROTOCOL, rounds=(9, 10))
    record = measured(FakeTimer(speedups={"rowwise": [LOSS] * 5}), {"rowwise": protocol})
    assert rounds_of(record)["rowwise"] == 10
    assert record.point("rowwise", protocol).status == "ambiguous"


def test_every_round_times_every_arm_in_random_order():
    timer = FakeTimer(speedups={"rowwise": [LOSS, WIN] * 16})
    measured(timer)
    assert all(sorted(map(str, order)) == sorted(map(str, [None, *RECIPES])) for order in timer.rounds)
    assert len({tuple(order) for order in timer.rounds}) > 10  # of 24 orders, in 32 rounds
    assert {order[0] for order in timer.rounds} == {None, *RECIPES}


def test_the_samples_are_those_of_the_arm_whatever_the_order():
    record = measured(FakeTimer(speedups={"tensorwise": [3.0] * 8, "rowwise": [2.0] * 8}))
    assert record.arms["bf16"].fwd_us == (100.0,) * 8
    assert record.arms["tensorwise"].bwd_us == (66.667,) * 8  # rounded to a nanosecond
    assert {recipe: point.speedup for recipe, point in points_of(record).items()} == {
        "tensorwise": 3.0,
        "rowwise": 2.0,
        "rowwise_with_gw_hp": 1.5,
    }


def test_rounds_to_settle_are_not_counted():
    class SlowTimer(FakeTimer):
        def round(self, prepared):
            time.sleep(0.005)
            return super().round(prepared)

    timer = SlowTimer()
    record = measured(timer, {"rowwise": replaced(PROTOCOL, settle_s=0.03)})
    assert rounds_of(record)["rowwise"] == 8
    assert 9 <= len(timer.rounds) <= 8 + 6


def test_a_record_says_what_was_measured_and_when():
    timer = FakeTimer()
    record = measured(timer)
    assert record.shape == SHAPE
    assert tuple(record.arms) == ("bf16", *RECIPES)
    assert record.measured_at.tzinfo == timezone.utc
    assert record.measured_at.microsecond == 0
    assert 0 < record.seconds < 60
    assert 0.01 < record.arms["rowwise"].errors["output"] < 0.2
    assert timer.released == 1


def caused_by(cause):
    """An error whose message says nothing, as a compiler raises it from another."""
    error = RuntimeError("compilation failed")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        caused_by(torch.OutOfMemoryError("CUDA out of memory")),
    ],
    ids=str,
)
def test_out_of_memory_in_one_arm_is_that_arms_result(error):
    timer = FakeTimer(prepare_errors={"rowwise": error})
    record = measured(timer)
    points = points_of(record)
    assert points["rowwise"].numbers == (None,) * 7
    assert {recipe: point.status for recipe, point in points.items()} == {
        "tensorwise": "measured",
        "rowwise": "out_of_memory",
        "rowwise_with_gw_hp": "measured",
    }
    assert type(error).__name__ in record.arms["rowwise"].detail
    assert rounds_of(record) == {"bf16": 8, "tensorwise": 8, "rowwise": 0, "rowwise_with_gw_hp": 8}
    assert all("rowwise" not in order for order in timer.rounds)


def test_out_of_memory_in_bf16_leaves_no_numbers():
    timer = FakeTimer(prepare_errors={None: torch.OutOfMemoryError("CUDA out of memory")})
    points = points_of(measured(timer))
    assert [(p.numbers, p.status) for p in points.values()] == [((None,) * 7, "out_of_memory")] * 3
    assert timer.rounds == []
    assert timer.released == 1


def test_out_of_memory_for_the_operands_is_that_of_every_arm(monkeypatch):
    def no_memory(shape, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Operands, "random", no_memory)
    record = measured(FakeTimer())
    assert {name: arm.status for name, arm in record.arms.items()} == dict.fromkeys(("bf16", *RECIPES), "out_of_memory")


@pytest.mark.parametrize(
    "error",
    [RuntimeError("out of resource: shared memory"), AssertionError("k"), caused_by(ValueError("memory"))],
    ids=str,
)
def test_an_arm_that_raises_is_failed_and_says_why(error):
    timer = FakeTimer(prepare_errors={"tensorwise": error})
    record = measured(timer)
    points = points_of(record)
    assert record.arms["tensorwise"].detail == f"{type(error).__name__}: {error}"
    assert (points["tensorwise"].numbers, points["tensorwise"].status) == ((None,) * 7, "failed")
    assert points["rowwise"].status == points["rowwise_with_gw_hp"].status == "measured"


def test_a_long_message_is_cut():
    timer = FakeTimer(prepare_errors={"tensorwise": RuntimeError("x" * 10_000)})
    assert len(measured(timer).arms["tensorwise"].detail) == 2000


def test_a_wrong_result_is_failed_and_the_others_are_measured():
    timer = FakeTimer(damage={"rowwise": zeroed_output})
    record = measured(timer)
    arm, points = record.arms["rowwise"], points_of(record)
    assert (arm.status, arm.fwd_us) == ("failed", ())
    assert arm.errors["output"] == 1.0
    assert arm.detail.startswith("wrong result: relative errors {'output': 1.0")
    assert points["rowwise"].numbers == (None,) * 7
    assert points["tensorwise"].status == points["rowwise_with_gw_hp"].status == "measured"
    assert all("rowwise" not in order for order in timer.rounds)


def test_a_result_that_is_not_finite_is_failed():
    def with_nan(right):
        return Results(right.output.index_fill(0, torch.tensor([1]), torch.nan), right.grad_x, right.grad_weight)

    arm = measured(FakeTimer(damage={"rowwise": with_nan})).arms["rowwise"]
    assert arm.status == "failed"
    assert arm.errors["output"] is None
    assert arm.errors["grad_x"] < 0.2


def test_a_wrong_bf16_result_leaves_no_numbers():
    timer = FakeTimer(damage={None: zeroed_output})
    points = points_of(measured(timer))
    assert [(p.numbers, p.status) for p in points.values()] == [((None,) * 7, "failed")] * 3
    assert timer.rounds == []


def test_without_any_recipe_left_bf16_is_not_timed():
    timer = FakeTimer(prepare_errors={recipe: RuntimeError("broken") for recipe in RECIPES})
    points = points_of(measured(timer))
    assert {point.status for point in points.values()} == {"failed"}
    assert timer.rounds == []


def test_rounds_that_fail_leave_no_arm_any_numbers():
    class FailingTimer(FakeTimer):
        def round(self, prepared):
            if len(self.rounds) == 3:
                raise RuntimeError("CUDA error: unspecified launch failure")
            return super().round(prepared)

    timer = FailingTimer(prepare_errors={"tensorwise": torch.OutOfMemoryError("CUDA out of memory")})
    record = measured(timer)
    assert rounds_of(record) == dict.fromkeys(("bf16", *RECIPES), 0)
    assert record.arms["bf16"].detail == "RuntimeError: CUDA error: unspecified launch failure"
    assert {point.status for point in points_of(record).values()} == {"failed"}
    assert record.arms["tensorwise"].status == "out_of_memory"  # its own failure is kept


def test_a_device_that_no_longer_answers_is_lost_and_the_record_is_not():
    class LostTimer(FakeTimer):
        def release(self):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(DeviceLostError) as caught:
        measured(LostTimer(prepare_errors={"rowwise": RuntimeError("CUDA error")}))
    (record,) = caught.value.args
    assert record.shape == SHAPE
    assert record.arms["rowwise"].status == "failed"


def test_a_real_point_on_the_cpu():
    protocols = make_setup(CPU).protocols
    record = measured(
        CpuTimer(), {r: replaced(p, settle_s=0.01) for r, p in protocols.items()}, LinearShape(64, 64, 64)
    )
    rounds = rounds_of(record)
    assert set(rounds.values()) <= {8, 12, 16, 24, 32}
    assert len(set(rounds.values())) == 1
    for arm in record.arms.values():
        assert arm.status == "measured"
        assert min(*arm.fwd_us, *arm.bwd_us) > 0
        assert set(arm.errors) == {"output", "grad_x", "grad_weight"}
    for point in points_of(record).values():
        assert point.speedup_low <= point.speedup <= point.speedup_high
        assert point.status in ("measured", "ambiguous")


def test_the_same_seed_gives_the_same_data_and_order():
    first, second = FakeTimer(), FakeTimer()
    assert measured(first).arms == measured(second).arms
    assert first.rounds == second.rounds
