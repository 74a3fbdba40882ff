"""Which numbers are noise, by a timer that is honest, one that drifts, one that is disturbed; what is said of it."""

from __future__ import annotations

import dataclasses
import random
import tempfile
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from samples import NEVER_NOISE, PROTOCOL, SETUP, again, measured, replaced, timed_arm
from typer.testing import CliRunner

from fp8gate.calibrate.device.cpu import Cpu, CpuWatch
from fp8gate.calibrate.device.cuda.kind import Cuda
from fp8gate.calibrate.device.host_load import BUSY, HostLoad
from fp8gate.calibrate.device.kind import FAR
from fp8gate.calibrate.device.timer import Results, Sample
from fp8gate.calibrate.grid.grid import grid_shapes
from fp8gate.calibrate.points import measure_point, ready_point
from fp8gate.calibrate.points.noise import TOO_MANY, far_from_neighbours, judge
from fp8gate.calibrate.sweep import run_sweep, session
from fp8gate.calibrate.sweep.agenda import MAX_LOOKS
from fp8gate.calibrate.sweep.run_sweep import sweep
from fp8gate.calibrate.sweep.table_writing import TooNoisyError
from fp8gate.calibrate.timing import steady_run
from fp8gate.cli import app
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.contract.table import Grid, read_table
from fp8gate.filter.decision.decide import decide
from fp8gate.filter.decision.lookup import Lookup

CPU = torch.device("cpu")
SHAPE = LinearShape(64, 32, 16)
LIMITS = dataclasses.replace(NEVER_NOISE, width=1.25, apart=1.1, waited=0.1, far=FAR)
TWICE = dataclasses.replace(LIMITS, measures_twice=True)


def judged(*records, limits=LIMITS):
    return judge(records, "tensorwise", PROTOCOL, limits)[SHAPE]


def wide(speedup=2.0, **fields):
    """Bounds 1.5 apart."""
    arms = {"bf16": timed_arm([100.0] * 8), "tensorwise": timed_arm([80.0 / speedup] * 4 + [120.0 / speedup] * 4)}
    return replaced(measured(2.0), arms=arms, **fields)


# One point.


def test_a_single_narrow_measurement_stands_by_itself():
    row = judged(measured(2.0))
    assert (row.point.speedup, row.point.status, row.noise, row.measurements) == (2.0, "measured", "", 1)


def test_wide_bounds_are_noise_until_a_narrow_measurement_agrees():
    row = judged(wide())
    assert (row.point.numbers, row.point.status) == ((None,) * 7, "noisy")
    assert row.noise == "its bounds are 1.667 to 2.5"
    assert row.is_disturbed
    assert judged(wide(), measured(2.0)).point.speedup == 2.0
    assert judged(wide(), wide()).point.status == "noisy"
    assert judged(measured(2.0), wide()).point.speedup == 2.0


def test_measurements_that_disagree_are_noise_until_a_third_agrees_with_one():
    row = judged(measured(2.0), measured(2.5))
    assert (row.point.status, row.noise, row.is_disturbed) == ("noisy", "its measurements disagree: 2, 2.5", False)
    assert judged(measured(2.0), measured(2.19)).point.speedup == 2.19
    assert judged(measured(2.0), measured(2.5), measured(2.49)).point.speedup == 2.49
    assert judged(measured(2.0), measured(2.5), measured(2.01)).point.speedup == 2.01
    assert judged(measured(2.0), measured(2.5), measured(3.0)).point.status == "noisy"


def test_a_repeat_by_another_process_is_compared_and_gives_no_number():
    assert judged(measured(2.0), again(2.1)).point.speedup == 2.0
    assert judged(measured(2.0), again(2.5)).point.status == "noisy"
    assert judged(measured(2.0), again(2.0, process=7)).point.speedup == 2.0


def test_who_waits_for_a_processor_measures_noise_however_narrow_it_looks():
    """As four busy processes beside a sweep did it: 0.498 (0.443 to 0.527), again 0.466; alone it was 0.265."""
    waited = replaced(measured(0.498), waited=1.3)
    row = judged(waited, replaced(measured(0.49), waited=1.2))
    assert row.noise == "its threads waited for a processor for 1.20 s a second"
    assert judged(replaced(measured(2.0), waited=0.09)).point.speedup == 2.0
    assert judged(waited, measured(0.265)).point.status == "noisy"
    assert judged(waited, measured(0.265), measured(0.26)).point.speedup == 0.26


def test_a_failure_is_no_noise():
    failed = replaced(measured(), arms={"bf16": timed_arm([100.0] * 8), "tensorwise": replaced(FAILED, detail="bad")})
    row = judged(failed)
    assert (row.point.status, row.noise, row.measurements) == ("failed", "", 0)


FAILED = replaced(timed_arm([1.0]), status="failed", fwd_us=(), bwd_us=())


def test_where_all_is_measured_twice_bounds_cover_both_and_what_measurements_mostly_differ_by():
    other = LinearShape(64, 48, 16)
    records = [measured(2.0), again(2.04), measured(3.0, k=48), again(3.27, k=48)]
    rows = judge(records, "tensorwise", PROTOCOL, TWICE)
    assert rows[SHAPE].point.speedup == 2.0
    assert rows[SHAPE].point.speedup_low == pytest.approx(2.0 / 1.09, rel=1e-3)
    assert rows[SHAPE].point.speedup_high == pytest.approx(2.0 * 1.09, rel=1e-3)
    assert rows[other].point.speedup_high == pytest.approx(3.27, rel=1e-3)
    once = judge([one for one in records if not one.repeat], "tensorwise", PROTOCOL, LIMITS)
    assert (once[SHAPE].point.speedup_low, once[SHAPE].point.speedup_high) == (2.0, 2.0)


def test_a_speedup_that_its_neighbours_contradict_is_found():
    def found(middle):
        records = [measured(2.0, k=32), measured(middle, k=64), measured(3.0, k=128)]
        return far_from_neighbours(judge(records, "tensorwise", PROTOCOL, LIMITS), LIMITS)

    between = (2.0 * 3.0) ** 0.5
    assert found(between * FAR * 1.01) == {LinearShape(64, 64, 16)}
    assert found(between / FAR / 1.01) == {LinearShape(64, 64, 16)}
    assert found(between * FAR / 1.01) == set()
    assert far_from_neighbours({}, LIMITS) == set()


# Whole sweeps, by the clock of a timer that is made up.

ROUND_S = 0.0065  # two fill a batch
GRID = Grid(m=(32,), k=(32, 48, 64, 80), n=(32, 48, 64))
SHAPES = grid_shapes(GRID)
SPEEDUP = 2.0


class FakeTimer:
    """Computes results, and makes up times: `time_us(recipe, now, shape)`. A round takes ROUND_S of its clock."""

    def __init__(self, time_us):
        self.now, self.time_us = 0.0, time_us
        self.measured = 0  # points

    def prepare(self, arm):
        return arm

    def results(self, prepared):
        output = prepared.forward()
        return Results(output.detach(), prepared.backward(output))

    def rounds(self, prepared, orders):
        self.now += ROUND_S * len(orders)
        return [[self._sample(arm) for arm in prepared] for _ in orders]

    def _sample(self, arm):
        shape = LinearShape(*arm.operands.x.shape, len(arm.operands.weight))
        total_us = self.time_us(arm.recipe, self.now, shape)
        return Sample(fwd_us=total_us / 3, bwd_us=total_us * 2 / 3)

    def free(self, prepared):
        self.measured += 1


def honest(recipe, now, shape):
    """Off by 1 % at most."""
    return (100.0 if recipe is None else 100.0 / SPEEDUP) * random.uniform(0.99, 1.01)


def drifting(recipe, now, shape):
    """bf16 takes half as long again with every second that passes, as when something else takes more and more."""
    return honest(recipe, now, shape) * (1.5**now if recipe is None else 1.0)


def disturbed(recipe, now, shape):
    """For half of the time everything takes up to five times as long."""
    return honest(recipe, now, shape) * (random.uniform(1.0, 5.0) if random.random() < 0.5 else 1.0)


def disturbed_at(begin_s, end_s):
    def time_us(recipe, now, shape):
        return honest(recipe, now, shape) * (random.uniform(1.0, 5.0) if begin_s <= now < end_s else 1.0)

    return time_us


def disturbed_in(shapes):
    return lambda recipe, now, shape: (disturbed if shape in shapes else honest)(recipe, now, shape)


@pytest.fixture
def timed(tmp_path, tmp_path_factory, monkeypatch):
    """Sweeps the shapes with a made-up timer. limits: of the kind of device. waits: seconds of waiting a second."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("locks")))  # short, as sockets need
    random.seed(23)

    def run(time_us, *, limits=Cpu.defaults.noise, waits=0.0, load=0.0, shapes=SHAPES, **options):
        timer, watch = FakeTimer(time_us), CpuWatch()
        watch.waited_s = lambda: waits * timer.now
        clock = SimpleNamespace(perf_counter=lambda: timer.now, sleep=lambda seconds: None)
        for module in (measure_point, ready_point, steady_run):
            monkeypatch.setattr(module, "time", clock)
        monkeypatch.setattr(Cpu, "defaults", dataclasses.replace(Cpu.defaults, noise=limits))
        monkeypatch.setattr(Cpu, "make_timer", lambda kind, device, **_: timer)
        monkeypatch.setattr(Cpu, "make_watch", lambda kind, device: watch)
        monkeypatch.setattr(session, "HostLoad", lambda: HostLoad(lambda: (load, load, load)))
        options = {"out": tmp_path / "out", "workers": 0, "setup": SETUP, "recipes": ["rowwise"], **options}
        result = sweep(GRID, shapes, device=CPU, **options)
        return SimpleNamespace(
            result=result,
            report=result.report,
            points=[point for table in result.tables.values() for point in table.points],
            measured=timer.measured,
        )

    return run


def statuses(sweep):
    return {point.status for point in sweep.points}


def test_an_honest_timer_gives_numbers_on_a_cpu_where_all_is_measured_twice(timed):
    swept = timed(honest)
    assert swept.measured == 2 * len(SHAPES)
    assert statuses(swept) == {"measured"}
    assert all(point.speedup == pytest.approx(SPEEDUP, rel=0.02) for point in swept.points)
    assert all(point.speedup_low < SPEEDUP < point.speedup_high for point in swept.points)
    assert (swept.report.noise, swept.report.too_noisy) == ({}, None)


def test_an_honest_timer_gives_numbers_on_a_gpu_where_a_share_is_repeated(timed):
    swept = timed(honest, limits=Cuda.defaults.noise)
    assert swept.measured == len(SHAPES) + 1
    assert statuses(swept) == {"measured"}


def test_a_timer_that_drifts_gives_no_number_on_a_cpu(timed):
    swept = timed(drifting)
    assert statuses(swept) == {"noisy"}
    assert all(why.startswith("its measurements disagree") for why in swept.report.noise.values())
    assert swept.report.too_noisy.startswith("12 of 12 speedups are noise and decide nothing (load 0.0 on ")


def test_a_timer_that_drifts_gives_no_number_on_a_gpu_whose_repeats_disagree(timed):
    """Of 40 points two are repeated; both tell that the others are to be measured twice too."""
    shapes = grid_shapes(Grid(m=(32,), k=tuple(range(16, 176, 16)), n=(16, 32, 48, 64)))
    swept = timed(drifting, limits=Cuda.defaults.noise, shapes=shapes)
    assert statuses(swept) == {"noisy"}
    assert swept.measured > 2 * len(shapes)


@pytest.mark.parametrize("limits", [Cpu.defaults.noise, Cuda.defaults.noise], ids=["cpu", "gpu"])
def test_a_timer_that_is_disturbed_gives_no_number(timed, limits):
    swept = timed(disturbed, limits=limits)
    assert statuses(swept) == {"noisy"}
    assert all(why.startswith("its bounds are") for why in swept.report.noise.values())
    assert swept.report.too_noisy


@pytest.mark.parametrize("limits", [Cpu.defaults.noise, Cuda.defaults.noise], ids=["cpu", "gpu"])
def test_what_is_disturbed_for_a_while_is_measured_again_and_right(timed, limits):
    swept = timed(disturbed_at(0.3, 0.6), limits=limits)
    once = len(SHAPES) + 1 if limits is Cuda.defaults.noise else 2 * len(SHAPES)
    assert once < swept.measured < once + len(SHAPES)
    assert statuses(swept) == {"measured"}
    assert all(point.speedup == pytest.approx(SPEEDUP, rel=0.02) for point in swept.points)
    assert swept.report.noise == {}


def test_who_waits_for_a_processor_gives_no_number(timed):
    swept = timed(honest, waits=0.5)
    assert statuses(swept) == {"noisy"}
    assert set(swept.report.noise.values()) == {"its threads waited for a processor for 0.50 s a second"}
    assert swept.measured == 1 + 2 * len(SHAPES)  # and not a third time: what disturbs goes on


def test_who_hardly_waits_gives_numbers(timed):
    assert statuses(timed(honest, waits=0.05)) == {"measured"}


def test_a_noisy_point_decides_nothing(timed):
    ((path, table),) = timed(disturbed).result.tables.items()
    assert read_table(path) == table
    decision = decide(SHAPES[0], Lookup(table), min_speedup=1.05)
    assert (decision.convert, decision.reason) == (False, "the table holds no measured point")


def test_the_next_run_measures_only_the_noise_again(timed):
    first = timed(disturbed_in(SHAPES[:3]))
    noisy = [point.shape for point in first.points if point.status == "noisy"]
    assert noisy == SHAPES[:3]
    second = timed(honest)
    assert statuses(second) == {"measured"}
    assert len(noisy) <= second.measured <= MAX_LOOKS * len(noisy)
    assert timed(honest).measured == 0


def test_numbers_are_not_replaced_by_noise_unless_told_so(timed, tmp_path):
    ((path, before),) = timed(honest).result.tables.items()
    upgraded = replaced(SETUP, software=replaced(SETUP.software, torch="2.14.0"))
    with pytest.raises(TooNoisyError, match=r"rowwise\.yaml is kept: 12 of its 12 points would lose their numbers to"):
        timed(disturbed, setup=upgraded)
    assert read_table(path) == before
    timed(disturbed, setup=upgraded, fresh=True)
    assert {point.status for point in read_table(path).points} == {"noisy"}


def test_a_few_noisy_points_are_no_failure(timed):
    swept = timed(disturbed_in(SHAPES[:1]))
    assert [point.shape for point in swept.points if point.status == "noisy"] == SHAPES[:1]
    assert len(swept.report.noise) == 1 <= TOO_MANY * len(SHAPES)
    assert swept.report.too_noisy is None
    assert f"processors)\n  {SHAPES[0]} rowwise: its bounds" in swept.report.text()


def test_a_time_limit_holds_for_the_second_look_too(timed):
    stopped = timed(honest, shapes=SHAPES[:2])
    assert stopped.measured == 4
    late = timed(honest, stop_after_s=0.0)
    assert (late.result.remaining > 0, late.points) == (True, [])


def test_a_journal_from_before_the_second_look_is_looked_at_again(timed):
    timed(honest, limits=NEVER_NOISE)
    looked = timed(honest)
    assert looked.measured == len(SHAPES) - 1  # one had its repeat already
    assert statuses(looked) == {"measured"}


class TwoRanks(run_sweep.MeasuringAlone):
    """As if two ranks had measured: what is looked at again afterwards, rank 0 measures alone."""

    ranks = ranks_here = 2
    asked: ClassVar[list[int]] = []

    def measure(self, tasks, *rest):
        self.asked.append(len(tasks.tasks))
        return super().measure(tasks, *rest)


def test_with_several_ranks_the_first_looks_again_alone(timed):
    swept = timed(disturbed_at(0.3, 0.6), measuring=TwoRanks())
    assert TwoRanks.asked == [len(SHAPES)]
    assert swept.measured > 2 * len(SHAPES)
    assert statuses(swept) == {"measured"}


# What is said about it.


def test_nothing_left_to_measure_is_said_with_the_journals_date(timed, capsys):
    timed(honest)
    assert "nothing was left" not in capsys.readouterr().err
    timed(honest)
    said = capsys.readouterr().err
    assert "nothing was left to measure: the tables are made of 24 measurements of the journal, the newest of" in said
    assert said.splitlines()[-1].endswith("UTC; --fresh measures again")


def test_a_busy_host_is_named_with_its_load(timed, capsys):
    swept = timed(honest, load=1000.0)
    warning = "warning: the host is busy and may spoil timings: load 1000.0 on "
    assert capsys.readouterr().err.count(warning) == 1
    assert "\nthe host was busy: load 1000.0 on " in swept.report.text()
    assert "(on a busy host, load 1000.0 on " in timed(disturbed, load=1000.0, fresh=True).report.too_noisy


def test_a_calm_host_is_not(timed, capsys):
    swept = timed(honest, load=0.5)
    assert "busy" not in capsys.readouterr().err + swept.report.text()


def test_the_highest_load_counts_and_a_system_that_tells_none_has_none():
    loads = iter([(BUSY * 1000, 0.0, 0.0), (0.1, 0.0, 0.0)])
    host = HostLoad(lambda: next(loads))
    assert not host.is_busy
    host.sample()
    host.sample()
    assert host.is_busy

    def tells_none():
        raise OSError

    host = HostLoad(tells_none)
    host.sample()
    assert (host.highest, host.is_busy) == (0.0, False)


@pytest.mark.parametrize(("time_us", "exit_code"), [(honest, 0), (disturbed, 1)])
def test_the_command_fails_after_the_tables_are_written(timed, monkeypatch, tmp_path, time_us, exit_code):
    swept = timed(time_us)
    monkeypatch.setattr(run_sweep, "sweep", lambda *_, **__: swept.result)
    result = CliRunner().invoke(app, ["calibrate", "--device", "cpu", "--out", str(tmp_path)])
    assert result.exit_code == exit_code, result.output
    assert "wrote " in result.stdout
    assert result.stderr.startswith("fp8gate: 12 of 12 speedups are noise") == bool(exit_code)
    assert ("12 noisy" in result.stdout) == bool(exit_code)
