"""One point: how many rounds it takes, and what its failures leave of it."""

from __future__ import annotations

import itertools
import os
import time
from contextlib import contextmanager
from datetime import timezone
from types import SimpleNamespace

import pytest
import torch
from samples import PROTOCOL, replaced

from fp8gate.calibrate.arms.linear import Operands
from fp8gate.calibrate.device.cpu import Cpu, CpuTimer, CpuWatch
from fp8gate.calibrate.device.timer import Results, Sample
from fp8gate.calibrate.device.timing_lock import TimingLock, timing_lock_file
from fp8gate.calibrate.points import measure_point as measuring
from fp8gate.calibrate.points import ready_point
from fp8gate.calibrate.points.measure_point import DeviceLostError, condensed, measure_point
from fp8gate.calibrate.points.point_record import CONTROL
from fp8gate.calibrate.points.ready_point import make_ready
from fp8gate.calibrate.points.setup import make_setup
from fp8gate.calibrate.points.task_queue import Task
from fp8gate.calibrate.timing import steady_run
from fp8gate.filter.contract.recipes import RECIPES
from fp8gate.filter.contract.shapes import LinearShape

CPU = torch.device("cpu")
SHAPE = LinearShape(32, 48, 16)
PROTOCOLS = {
    recipe: replaced(protocol, settle_s=0.0, run_s=0.0) for recipe, protocol in make_setup(CPU).protocols.items()
}
WIN, LOSS, SLIGHT_LOSS = 1.5, 0.5, 0.9
ROUND_S = 0.0065  # two fill a batch
SETTLING = 1  # round: a run begins with at least one that does not count
LEAST, MOST = Cpu.defaults.rounds


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """The time that measuring sees, in seconds: it passes in rounds and pauses only."""
    clock = SimpleNamespace(now=100.0)
    clock.pauses = []

    def sleep(seconds):
        clock.now += seconds
        clock.pauses.append(seconds)

    for module in (measuring, steady_run, ready_point):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock.now, sleep=sleep))
    return clock


class FakeDevice:
    """A timer that really computes each arm's results, with times that are made up, and the lock held during each run.

    A round takes ROUND_S of the clock. speedups: of each arm in its first rounds, those that settle included; WIN in
    all that follow. prepare_errors: raised for an arm (None is bf16). damage: what becomes of an arm's results. busy:
    the share of a round that bf16 takes.
    """

    def __init__(self, clock, speedups=None, prepare_errors=None, damage=None, busy=300e-6 / ROUND_S):
        self.clock = clock
        self.speedups = {recipe: iter(several) for recipe, several in (speedups or {}).items()}
        self.prepare_errors = prepare_errors or {}
        self.damage = damage or {}
        self.bf16_us = 1e6 * ROUND_S * busy
        self.is_timing = False
        self.runs = []  # of each run, its batches; of a batch, its rounds: the recipes in the order they were timed
        self.freed = 0

    @property
    def batches(self):
        return [batch for run in self.runs for batch in run]

    @property
    def orders(self):
        """The recipes of each round, in the order they were timed."""
        return [order for batch in self.batches for order in batch]

    @contextmanager
    def timing(self):
        self.runs.append([])
        self.is_timing = True
        yield
        self.is_timing = False

    def prepare(self, arm):
        if arm.recipe in self.prepare_errors:
            raise self.prepare_errors[arm.recipe]
        return arm

    def results(self, prepared):
        output = prepared.forward()
        results = Results(output.detach(), prepared.backward(output))
        return self.damage.get(prepared.recipe, lambda right: right)(results)

    def rounds(self, prepared, orders):
        self.clock.now += ROUND_S * len(orders)
        self.runs[-1].append([[prepared[i].recipe for i in order] for order in orders])
        return [[self._sample(arm.recipe) for arm in prepared] for _ in orders]

    def _sample(self, recipe):
        speedup = 1.0 if recipe is None else next(self.speedups.get(recipe, iter(())), WIN)
        total_us = self.bf16_us / speedup
        return Sample(fwd_us=total_us / 3, bwd_us=total_us * 2 / 3)

    def free(self, prepared):
        self.freed += 1


class FakeWatch(CpuWatch):
    """Tells of each batch what it is told here; nothing after that."""

    def __init__(self, slowdowns=(), clocks_mhz=(), limited=()):
        self.slowdowns, self.clocks_mhz, self.limited = iter(slowdowns), iter(clocks_mhz), iter(limited)

    def is_power_limited(self):
        return next(self.limited, False)

    def slowdown(self):
        return next(self.slowdowns, None)

    def sm_clock_mhz(self):
        return next(self.clocks_mhz, None)


@pytest.fixture
def fake(clock):
    """Makes a FakeDevice over this test's clock."""
    return lambda **options: FakeDevice(clock, **options)


def zeroed_output(right):
    return Results(torch.zeros_like(right.output), right.gradients)


def measured(device, protocols=PROTOCOLS, watch=None, seed=0, **task):
    point = make_ready(Task(SHAPE, **task), protocols, CPU)
    return measure_point(point, device, watch or CpuWatch(), device, CPU, seed)


def rounds_of(record):
    return {name: len(arm.fwd_us) for name, arm in record.arms.items()}


def rounds_in_runs(device):
    """Of each run, its rounds: the recipes that were timed, bf16 as None."""
    return [[tuple(order) for batch in run for order in batch] for run in device.runs]


def points_of(record):
    return {recipe: record.point(recipe, PROTOCOLS[recipe]) for recipe in record.recipes}


FAR_NOISE = [1.4, 1.6] * 64
NEAR_NOISE = [0.9 + 0.2 * (37 * i % 128) / 127 for i in range(128)]


@pytest.mark.parametrize(
    ("speedups", "rounds", "status"),
    [
        pytest.param([WIN] * 128, LEAST, "measured", id="far"),
        pytest.param(FAR_NOISE, LEAST, "measured", id="far, however noisy"),
        pytest.param([1.029] * 128, MOST, "measured", id="near"),
        pytest.param([1.001, 0.999] * 64, MOST, "measured", id="a tie, exactly"),
        pytest.param([LOSS] * (SETTLING + 3) + [WIN] * 128, MOST, "measured", id="far but undecided"),
        pytest.param(NEAR_NOISE, MOST, "ambiguous", id="near and noisy"),
    ],
)
def test_an_arm_runs_again_if_the_decision_hangs_on_it(fake, speedups, rounds, status):
    record = measured(fake(speedups={"rowwise": speedups}), {"rowwise": PROTOCOLS["rowwise"]})
    assert rounds_of(record) == {"bf16": rounds, "rowwise": rounds}
    assert points_of(record)["rowwise"].status == status


def test_only_the_second_run_counts(fake):
    """The first was off by 2 %, as a short run may be at the power limit."""
    device = fake(speedups={"rowwise": [1.02] * (SETTLING + LEAST) + [1.0] * 128})
    record = measured(device, {"rowwise": PROTOCOLS["rowwise"]})
    point = points_of(record)["rowwise"]
    assert (point.speedup_low, point.speedup, point.speedup_high) == (1.0, 1.0, 1.0)
    assert (point.fp8_fwd_us, point.fp8_bwd_us) == (100.0, 200.0)
    assert record.arms["rowwise"].fwd_us[0] == round(100 / 1.02, 3)  # it is kept all the same


def test_only_what_is_near_runs_again_with_bf16(fake):
    record = measured(fake(speedups={"rowwise": NEAR_NOISE, "tensorwise": FAR_NOISE}))
    assert rounds_of(record) == {"bf16": MOST, "tensorwise": LEAST, "rowwise": MOST, "rowwise_with_gw_hp": LEAST}
    assert points_of(record)["rowwise_with_gw_hp"].speedup == WIN  # over the rounds that both have


def test_with_one_count_of_rounds_nothing_runs_again(fake):
    protocol = replaced(PROTOCOL, rounds=(LEAST,))
    record = measured(fake(speedups={"rowwise": NEAR_NOISE}), {"rowwise": protocol})
    assert rounds_of(record) == {"bf16": LEAST, "rowwise": LEAST}


def test_the_control_is_timed_with_the_others_and_decides_nothing(fake):
    record = measured(fake(speedups={"rowwise": [WIN] * 128}), {"rowwise": PROTOCOLS["rowwise"]}, control=True)
    assert rounds_of(record) == {"bf16": LEAST, CONTROL: LEAST, "rowwise": LEAST}
    assert record.control_ratio(PROTOCOLS["rowwise"]).estimate == 1.0
    assert record.recipes == ("rowwise",)


def test_each_arm_runs_alone_and_only_the_control_takes_turns_with_bf16(fake):
    device = fake()
    measured(device, control=True)
    assert all(len(set(run)) == 1 for run in rounds_in_runs(device))
    runs = [run[0] for run in rounds_in_runs(device)]
    assert sorted(runs, key=str) == sorted([(None, None), *((recipe,) for recipe in RECIPES)], key=str)


def test_the_timing_lock_is_held_while_arms_run_and_not_while_they_are_loaded_or_the_device_idles(fake, clock):
    seen = []

    def noting(name, function):
        def run(*args):
            seen.append((name, device.is_timing))
            return function(*args)

        return run

    device = fake(busy=0.9)
    device.prepare, device.rounds = noting("prepare", device.prepare), noting("rounds", device.rounds)
    measuring.time.sleep = noting("pause", measuring.time.sleep)
    measured(device, dict.fromkeys(RECIPES, LIMITED), watch=FakeWatch(limited=itertools.repeat(True)))
    assert set(seen) == {("prepare", False), ("rounds", True), ("pause", False)}


def test_every_pass_runs_the_arms_in_another_order(fake):
    device = fake(speedups=dict.fromkeys(RECIPES, NEAR_NOISE))
    measured(device)
    runs = [run[0][0] for run in rounds_in_runs(device)]
    passes = [tuple(runs[:4]), tuple(runs[4:])]
    assert all(len(one) == 4 and set(one) == {None, *RECIPES} for one in passes)
    assert len(set(passes)) > 1


def test_a_run_lasts_as_long_as_the_protocol_says_and_its_rounds_become_samples(fake):
    """0.1 s are 8 batches of 2 rounds; 0.02 s would be 2, but 8 rounds are asked."""
    protocol = replaced(PROTOCOL, settle_s=0.1, run_s=0.1, rounds=(8, 9), threshold=0.1)
    for busy, counted in ((0.9, 16), (0.1, 8)):
        device = fake(busy=busy)
        record = measured(device, {"rowwise": protocol})
        assert rounds_of(record) == {"bf16": 8, "rowwise": 8}
        settling = record.stages.settling_s / ROUND_S
        assert len(device.orders) - round(settling) == 2 * counted


def test_condensed_samples_are_means_over_the_whole_run():
    rounds = [Sample(fwd, 10 * fwd) for fwd in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 21.0)]
    assert condensed(rounds, 2) == [Sample(7.5, 75.0), Sample(4.0, 40.0)]
    assert condensed(rounds, 7) == rounds


def test_the_samples_are_those_of_the_arm_whatever_the_order(fake):
    record = measured(fake(speedups={"tensorwise": [3.0] * 128, "rowwise": [2.0] * 128}))
    assert record.arms["bf16"].fwd_us == (100.0,) * LEAST
    assert record.arms["tensorwise"].bwd_us == (66.667,) * LEAST  # rounded to a nanosecond
    assert {recipe: point.speedup for recipe, point in points_of(record).items()} == {
        "tensorwise": 3.0,
        "rowwise": 2.0,
        "rowwise_with_gw_hp": 1.5,
    }


@pytest.mark.parametrize(
    ("busy", "limited", "rounds"),
    [
        pytest.param(0.9, False, 2 * (1 + 2 * 12), id="as long as it says"),
        pytest.param(0.9, True, 3 * (1 + 2 * 12), id="twice as long the first time, at the limit"),
        pytest.param(0.1, False, 2 * (1 + 2), id="until it shows that the device idles"),
    ],
)
def test_settling_lasts_as_long_as_the_arms_keep_the_device_busy(fake, busy, limited, rounds):
    """One round to see that two fill a batch, then two at a time; those of an idle device change nothing."""
    protocol = replaced(PROTOCOL, settle_s=0.15, run_s=0.0, rounds=(8, 9), threshold=0.1)
    record = measured(fake(busy=busy), {"rowwise": protocol}, watch=FakeWatch(limited=[limited]))
    assert record.stages.settling_s == pytest.approx(rounds * ROUND_S, abs=0.001)
    assert rounds_of(record)["rowwise"] == 8


def test_rounds_run_in_batches_that_are_watched(fake):
    device = fake()
    record = measured(device, watch=FakeWatch(clocks_mhz=[1980, 1755, 1740, 1735]))
    assert [len(batch) for batch in device.batches] == [SETTLING, *[2] * (LEAST // 2)] * 4
    assert record.sm_clock_mhz == (1980, 1755, 1740, 1735)


LIMITED = replaced(PROTOCOL, settle_s=0.1, run_s=0.1, pause_s=0.15, rounds=(8, 9), threshold=0.1)


@pytest.mark.parametrize(
    ("recipes", "limited", "pauses"),
    [
        pytest.param(tuple(RECIPES), True, 1, id="the fourth arm would begin after 0.7 s"),
        pytest.param(tuple(RECIPES)[:2], True, 0, id="the third begins after 0.5 s"),
        pytest.param(tuple(RECIPES), False, 0, id="below the limit"),
    ],
)
def test_at_the_power_limit_the_device_pauses_before_it_overshoots(fake, clock, recipes, limited, pauses):
    """An arm takes 0.2 s, and at the limit one that begins after a pause 0.3 s."""
    protocols = dict.fromkeys(recipes, LIMITED)
    record = measured(fake(busy=0.9), protocols, watch=FakeWatch(limited=itertools.repeat(limited)))
    assert clock.pauses == [0.15] * pauses
    settled_s = 0.1 * (len(recipes) + 1) + 0.1 * (1 + pauses) * limited
    assert record.stages.settling_s == pytest.approx(0.15 * pauses + settled_s, abs=(len(recipes) + 3) * 2 * ROUND_S)


def test_a_gpu_that_slows_down_leaves_no_numbers(fake):
    device = fake()
    record = measured(device, watch=FakeWatch(slowdowns=[None, None, "thermal slowdown"]), control=True)
    assert [len(batch) for batch in device.batches] == [SETTLING, 2, 2, 2]  # no further round is run
    for arm in record.arms.values():
        assert (arm.status, arm.detail, arm.fwd_us) == ("unstable", "thermal slowdown of the GPU while timing", ())
    assert {(p.numbers, p.status) for p in points_of(record).values()} == {((None,) * 7, "unstable")}


def test_a_record_says_what_was_measured_when_and_by_whom(fake):
    device = fake()
    record = measured(device, repeat=True)
    assert record.shape == SHAPE
    assert tuple(record.arms) == ("bf16", *RECIPES)
    assert record.measured_at.tzinfo == timezone.utc
    assert record.measured_at.microsecond == 0
    assert (record.process, record.repeat) == (os.getpid(), True)
    assert 0.01 < record.arms["rowwise"].errors["output"] < 0.2
    assert device.freed == 1


def test_a_record_says_where_the_time_went(fake, clock, monkeypatch):
    def slow(function, seconds):
        def run(*args):
            clock.now += seconds
            return function(*args)

        return run

    monkeypatch.setattr(ready_point, "eager_linear", slow(ready_point.eager_linear, 3.0))
    device = fake()
    device.prepare = slow(device.prepare, 0.5)
    stages = measured(device).stages
    assert (stages.compiling_s, stages.loading_s) == (12.0, 2.0)  # of 4 arms
    assert (stages.settling_s, stages.timing_s) == pytest.approx((4 * ROUND_S, 4 * LEAST * ROUND_S), abs=0.001)
    assert stages.on_device_s == pytest.approx(2 + 4 * (1 + LEAST) * ROUND_S, abs=0.002)


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
def test_out_of_memory_in_one_arm_is_that_arms_result(fake, error):
    device = fake(prepare_errors={"rowwise": error})
    record = measured(device)
    points = points_of(record)
    assert points["rowwise"].numbers == (None,) * 7
    assert {recipe: point.status for recipe, point in points.items()} == {
        "tensorwise": "measured",
        "rowwise": "out_of_memory",
        "rowwise_with_gw_hp": "measured",
    }
    assert type(error).__name__ in record.arms["rowwise"].detail
    assert rounds_of(record) == {"bf16": LEAST, "tensorwise": LEAST, "rowwise": 0, "rowwise_with_gw_hp": LEAST}
    assert all("rowwise" not in order for order in device.orders)


def test_out_of_memory_in_bf16_leaves_no_numbers(fake):
    device = fake(prepare_errors={None: torch.OutOfMemoryError("CUDA out of memory")})
    points = points_of(measured(device))
    assert [(p.numbers, p.status) for p in points.values()] == [((None,) * 7, "out_of_memory")] * 3
    assert device.batches == []
    assert device.freed == 1


def test_out_of_memory_for_the_operands_is_that_of_every_arm(fake, monkeypatch):
    def no_memory(shape, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Operands, "random", no_memory)
    record = measured(fake())
    assert {name: arm.status for name, arm in record.arms.items()} == dict.fromkeys(("bf16", *RECIPES), "out_of_memory")


@pytest.mark.parametrize(
    "error",
    [RuntimeError("out of resource: shared memory"), AssertionError("k"), caused_by(ValueError("memory"))],
    ids=str,
)
def test_an_arm_that_raises_is_failed_and_says_why(fake, error):
    device = fake(prepare_errors={"tensorwise": error})
    record = measured(device)
    points = points_of(record)
    assert record.arms["tensorwise"].detail == f"{type(error).__name__}: {error}"
    assert (points["tensorwise"].numbers, points["tensorwise"].status) == ((None,) * 7, "failed")
    assert points["rowwise"].status == points["rowwise_with_gw_hp"].status == "measured"


def test_a_long_message_is_cut(fake):
    device = fake(prepare_errors={"tensorwise": RuntimeError("x" * 10_000)})
    assert len(measured(device).arms["tensorwise"].detail) == 2000


def test_a_wrong_result_is_failed_and_the_others_are_measured(fake):
    device = fake(damage={"rowwise": zeroed_output})
    record = measured(device)
    arm, points = record.arms["rowwise"], points_of(record)
    assert (arm.status, arm.fwd_us) == ("failed", ())
    assert arm.errors["output"] == 1.0
    assert arm.detail.startswith("wrong result: relative errors {'output': 1.0")
    assert points["rowwise"].numbers == (None,) * 7
    assert points["tensorwise"].status == points["rowwise_with_gw_hp"].status == "measured"
    assert all("rowwise" not in order for order in device.orders)


def test_a_result_that_is_not_finite_is_failed(fake):
    def with_nan(right):
        return Results(right.output.index_fill(0, torch.tensor([1]), torch.nan), right.gradients)

    arm = measured(fake(damage={"rowwise": with_nan})).arms["rowwise"]
    assert arm.status == "failed"
    assert arm.errors["output"] is None
    assert arm.errors["grad_x"] < 0.2


def test_a_wrong_bf16_result_leaves_no_numbers(fake):
    device = fake(damage={None: zeroed_output})
    points = points_of(measured(device))
    assert [(p.numbers, p.status) for p in points.values()] == [((None,) * 7, "failed")] * 3
    assert device.batches == []


def test_without_any_recipe_left_bf16_is_not_timed(fake):
    device = fake(prepare_errors={recipe: RuntimeError("broken") for recipe in RECIPES})
    points = points_of(measured(device))
    assert {point.status for point in points.values()} == {"failed"}
    assert device.batches == []


def test_rounds_that_fail_leave_no_arm_any_numbers(clock):
    class FailingDevice(FakeDevice):
        def rounds(self, prepared, orders):
            if len(self.orders) == SETTLING + 4:
                raise RuntimeError("CUDA error: unspecified launch failure")
            return super().rounds(prepared, orders)

    device = FailingDevice(clock, prepare_errors={"tensorwise": torch.OutOfMemoryError("CUDA out of memory")})
    record = measured(device)
    assert rounds_of(record) == dict.fromkeys(("bf16", *RECIPES), 0)
    assert record.arms["bf16"].detail == "RuntimeError: CUDA error: unspecified launch failure"
    assert {point.status for point in points_of(record).values()} == {"failed"}
    assert record.arms["tensorwise"].status == "out_of_memory"  # its own failure is kept


def test_what_cannot_be_compiled_is_failed_and_the_others_are_measured(fake, monkeypatch):
    def refuse_rowwise(recipe, shape, inductor, device, casts):
        if recipe == "rowwise":
            raise RuntimeError("no such layout")
        return ready_point.eager_linear(recipe, shape)

    monkeypatch.setattr(ready_point, "compiled_linear", refuse_rowwise)
    record = measured(fake(), {recipe: replaced(p, compile=True) for recipe, p in PROTOCOLS.items()})
    statuses = {recipe: point.status for recipe, point in points_of(record).items()}
    assert statuses == {"tensorwise": "measured", "rowwise": "failed", "rowwise_with_gw_hp": "measured"}
    assert "no such layout" in record.arms["rowwise"].detail


def test_a_device_that_no_longer_answers_is_lost_and_the_record_is_not(clock):
    class LostDevice(FakeDevice):
        def free(self, prepared):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(DeviceLostError, match="run the same command to go on") as caught:
        measured(LostDevice(clock, prepare_errors={"rowwise": RuntimeError("CUDA error")}))
    assert caught.value.reason == "CUDA error: an illegal memory access was encountered"
    assert caught.value.record.shape == SHAPE
    assert caught.value.record.arms["rowwise"].status == "failed"


def test_the_memory_of_the_operands_is_given_back_even_if_timing_failed(fake, monkeypatch):
    made = []
    real = Operands.random
    monkeypatch.setattr(Operands, "random", lambda *args: made.append(real(*args)) or made[-1])
    measured(fake(prepare_errors=dict.fromkeys([None, *RECIPES], RuntimeError("broken"))))
    (operands,) = made
    assert {t.untyped_storage().nbytes() for t in (operands.x, operands.weight, operands.grad_output)} == {0}


def test_a_real_point_on_the_cpu(monkeypatch):
    for module in (measuring, steady_run, ready_point):
        monkeypatch.setattr(module, "time", time)
    shape = LinearShape(64, 64, 64)
    protocols = {recipe: replaced(protocol, settle_s=0.01, run_s=0.01) for recipe, protocol in PROTOCOLS.items()}
    point = make_ready(Task(shape), protocols, CPU)
    with timing_lock_file() as path:
        record = measure_point(point, CpuTimer(2**16), CpuWatch(), TimingLock(path), CPU, 0)
    assert record.shape == shape
    assert set(rounds_of(record).values()) <= {LEAST, MOST}
    for arm in record.arms.values():
        assert arm.status == "measured"
        assert min(*arm.fwd_us, *arm.bwd_us) > 0
        assert set(arm.errors) == {"output", "grad_x", "grad_weight"}
    for point in points_of(record).values():
        assert point.speedup_low <= point.speedup <= point.speedup_high
        assert point.status in ("measured", "ambiguous")
    assert min(record.stages.compiling_s, record.stages.loading_s, record.stages.timing_s) > 0


def test_the_same_seed_gives_the_same_data_and_orders_another_gives_others(fake):
    devices = [fake(speedups={"rowwise": NEAR_NOISE}) for _ in range(3)]
    records = [measured(device, seed=seed) for device, seed in zip(devices, (0, 0, 1), strict=True)]
    assert records[0].arms == records[1].arms
    assert devices[0].runs == devices[1].runs
    assert records[0].arms["rowwise"].errors != records[2].arms["rowwise"].errors
    assert devices[0].runs != devices[2].runs
