"""Boards differ by a constant in every direction of every arm: bounds have a part that covers it."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from builders import PROTOCOL as IN_TABLES
from builders import make_point, make_table, write_file
from samples import NEVER_NOISE, PROTOCOL, point_record, replaced, timed_arm
from typer.testing import CliRunner

from fp8gate.calibrate.comparison import verify as verify_module
from fp8gate.calibrate.comparison.compare_tables import compare_tables
from fp8gate.calibrate.comparison.merge import merge_tables
from fp8gate.calibrate.device.cpu import NOISE as CPU_NOISE
from fp8gate.calibrate.device.cuda.kind import BOARD_US
from fp8gate.calibrate.device.cuda.kind import NOISE as GPU_NOISE
from fp8gate.calibrate.device.registry import describe_device
from fp8gate.calibrate.points.bounds import narrowed, widened
from fp8gate.calibrate.points.noise import judge_with_bounds
from fp8gate.calibrate.sweep.run_sweep import SweepResult
from fp8gate.calibrate.timing.statistics import Interval
from fp8gate.cli import app
from fp8gate.filter.contract.bounds import Bounds, RunBounds
from fp8gate.filter.contract.table import TableError, format_table, parse_table

BOARDS = Bounds(board_us=1.5)  # 3 us, forward plus backward


# The part of one row.


def test_what_boards_differ_by_is_much_of_a_small_row_and_little_of_a_large_one():
    below, above = BOARDS.between_boards(20.0, 40.0)
    assert above == pytest.approx(math.log((23 / 43) / (20 / 40)))  # 6.7 %
    assert below == pytest.approx(math.log((20 / 40) / (17 / 37)))  # 8.5 %
    assert max(BOARDS.between_boards(2000.0, 4000.0)) == pytest.approx(3 / 4000, rel=1e-2)


def test_a_speedup_that_wins_has_the_larger_part_above():
    below, above = BOARDS.between_boards(20.0, 40.0)
    assert BOARDS.between_boards(40.0, 20.0) == pytest.approx((above, below))


def test_equal_times_have_no_part_and_neither_has_a_kind_whose_boards_are_alike():
    assert BOARDS.between_boards(20.0, 20.0) == (0.0, 0.0)
    assert Bounds().between_boards(20.0, 40.0) == (0.0, 0.0)


def test_where_a_board_that_is_faster_would_leave_no_time_it_counts_as_the_slower_one():
    part = math.log((5 / 7) / (2 / 4))
    assert BOARDS.between_boards(2.0, 4.0) == pytest.approx((part, part))
    assert BOARDS.between_boards(4.0, 2.0) == pytest.approx((part, part))


def test_all_that_differs_between_runs_is_the_root_of_the_squares():
    small = RunBounds(coverage=0.95, within=0.004, between=0.05, repeats=40)
    stated = replaced(BOARDS, below_120_us=small)
    expected = [math.hypot(0.05, part) for part in BOARDS.between_boards(20.0, 40.0)]
    assert stated.between_runs(20.0, 40.0) == pytest.approx(expected)
    assert stated.between_runs(200.0, 400.0) == BOARDS.between_boards(200.0, 400.0)
    assert replaced(stated, board_us=None).between_runs(20.0, 40.0) == (0.05, 0.05)


def test_a_part_that_is_taken_out_again_leaves_the_bounds_as_they_were():
    before, part = Interval(0.5, 0.49, 0.52), (0.06, 0.03)
    after = narrowed(widened(before, part), part)
    assert (after.estimate, after.low, after.high) == pytest.approx((0.5, 0.49, 0.52))
    assert narrowed(before, (1.0, 1.0)) == Interval(0.5, 0.5, 0.5)


# From records.

GPU = dataclasses.replace(NEVER_NOISE, board_us=1.5)


def record(bf16_us, fp8_us, k=32, **fields):
    arms = {"bf16": timed_arm([bf16_us] * 8), "tensorwise": timed_arm([fp8_us] * 8)}
    return point_record((64, k, 16), arms=arms, **fields)


def judged(records, limits=GPU):
    rows, bounds = judge_with_bounds(records, "tensorwise", PROTOCOL, limits)
    return [row.point for row in rows.values()], bounds


def test_each_row_has_its_own_part_and_repeats_say_the_same_of_runs_as_before():
    records = [record(20.0, 40.0), record(20.0, 42.0, process=8, repeat=True), record(2000.0, 4000.0, k=48)]
    (small, large), bounds = judged(records)
    (small_before, large_before), before = judged(records, NEVER_NOISE)
    assert bounds == replaced(before, board_us=1.5)
    below, above = bounds.between_runs(20.0, 40.0)
    assert (small.speedup_low, small.speedup_high) == pytest.approx(
        (0.5 * math.exp(-below), 0.5 * math.exp(above)), rel=1e-3
    )
    assert (small_before.speedup_low, small_before.speedup_high) == pytest.approx((0.4762, 0.525), rel=1e-3)
    assert (large.speedup_low, large.speedup_high) == (0.4996, 0.5004)
    assert (large_before.speedup_low, large_before.speedup_high) == (0.5, 0.5)
    assert [point.numbers[:5] for point in (small, large)] == [
        point.numbers[:5] for point in (small_before, large_before)
    ]


def test_a_cpu_has_no_such_part_and_does_not_write_it():
    assert (CPU_NOISE.board_us, GPU_NOISE.board_us) == (None, BOARD_US)
    for limits, is_written in ((CPU_NOISE, False), (GPU_NOISE, True)):
        points, bounds = judged([record(20.0, 40.0), record(20.0, 40.0, process=8, repeat=True)], limits)
        text = format_table(make_table(*points, protocol=replaced(IN_TABLES, bounds=bounds)))
        assert (f"board_us: {BOARD_US}" in text) is is_written
        assert ("board_us" in text) is is_written


SIZES_US = [(bf16_us, ratio * bf16_us) for bf16_us in (18.0, 40.0, 100.0, 300.0, 3000.0) for ratio in (2.0, 1.1, 0.6)]


@pytest.mark.parametrize("constant_us", [BOARD_US, -BOARD_US, 1.2, -1.2])
def test_a_sweep_of_a_board_that_differs_by_the_constant_is_covered(constant_us):
    def sweep(more_us):
        return [record(bf16 + 2 * more_us, fp8 + 2 * more_us, k=16 * (i + 1)) for i, (bf16, fp8) in enumerate(SIZES_US)]

    def covered(limits):
        here, there = (judged(sweep(more_us), limits)[0] for more_us in (0.0, constant_us))
        return [a.speedup_low <= b.speedup <= a.speedup_high for a, b in zip(here, there, strict=True)]

    assert all(covered(dataclasses.replace(NEVER_NOISE, board_us=BOARD_US)))
    assert not any(covered(NEVER_NOISE)[:9])


# Tables.

LARGE = RunBounds(coverage=0.95, within=0.003, between=0.04, repeats=40)
SMALL = RunBounds(coverage=0.95, within=0.004, between=0.07, repeats=40)
STATED = replaced(IN_TABLES, bounds=Bounds(below_120_us=SMALL, from_120_us=LARGE, board_us=1.5))
BEFORE = replaced(IN_TABLES, bounds=replaced(STATED.bounds, board_us=None))
RUN = 0.004  # what varies within one run
SPEEDUP = 0.5


def table(moved=0.0, protocol=STATED):
    """A row of 20 us whose speedup is 0.5, times this much, with the bounds that the protocol says."""
    speedup = SPEEDUP * math.exp(moved)
    point = make_point(16, 32, 16, speedup, bf16_us=(8.0, 12.0))
    if protocol.bounds is None:
        bounds = Interval(speedup, speedup * math.exp(-RUN), speedup * math.exp(RUN))
    else:
        run = Interval(speedup, speedup * math.exp(-RUN), speedup * math.exp(RUN))
        bounds = widened(run, protocol.bounds.between_runs(20.0, 20.0 / speedup))
    return make_table(replaced(point, speedup_low=bounds.low, speedup_high=bounds.high), protocol=protocol)


def halves(point):
    return math.log(point.speedup / point.speedup_low), math.log(point.speedup_high / point.speedup)


def test_a_file_says_what_boards_differ_by_and_one_without_it_is_read_as_before():
    text = format_table(table())
    assert "between: 0.04, repeats: 40}, board_us: 1.5}" in text
    assert parse_table(text, source="FILE").protocol.bounds == STATED.bounds
    old = format_table(table(protocol=BEFORE))
    assert "board_us" not in old
    read = parse_table(old, source="FILE")
    assert read.protocol.bounds.board_us is None
    assert halves(read.points[0]) == pytest.approx([math.hypot(RUN, 0.07)] * 2, rel=1e-2)


@pytest.mark.parametrize("value", ["-0.1", "0", "101", "fast"])
def test_what_is_no_constant_of_a_board_is_named(value):
    text = format_table(table()).replace("board_us: 1.5", f"board_us: {value}")
    with pytest.raises(TableError, match=r"board_us"):
        parse_table(text, source="FILE")


def compared(before, after):
    return compare_tables(before, after, min_speedup=1.05).points[0]


def test_two_tables_have_the_part_once_each():
    before, after = table(), table(0.1)
    found = compared(before, after)
    expected = math.hypot(*(sum(halves(one.points[0])) / 2 for one in (before, after)))
    assert found.bounds == pytest.approx(expected)
    assert found.bounds > math.hypot(0.07, 0.07, 0.06)
    assert not found.is_beyond_bounds
    assert compared(table(protocol=BEFORE), table(0.1, BEFORE)).is_beyond_bounds


def test_beside_a_table_that_states_no_bounds_the_part_does_not_count():
    old = table(protocol=IN_TABLES)
    assert compared(old, table()).bounds is None
    assert compared(old, table()).allowed == pytest.approx(compared(old, old).allowed, abs=1e-3)
    assert compared(old, table(protocol=BEFORE)).allowed == pytest.approx(compared(old, table()).allowed, abs=1e-3)


def test_more_sweeps_do_not_make_less_of_what_boards_differ_by():
    merged = merge_tables({"a": table(), "b": table(0.02)})
    before = merge_tables({"a": table(protocol=BEFORE), "b": table(0.02, BEFORE)})
    assert merged.protocol.bounds == replaced(before.protocol.bounds, board_us=1.5)
    (point,), (point_before,) = merged.points, before.points
    assert point.numbers[:5] == point_before.numbers[:5]
    part = STATED.bounds.between_boards(20.0, 20.0 / point.speedup)
    alike = math.hypot(RUN, 0.07) * math.sqrt(3 / 4)  # the mean of two has half of a sweep's variance, another has all
    assert halves(point_before) == pytest.approx((alike, alike), rel=1e-2)
    assert halves(point) == pytest.approx([math.hypot(alike, side) for side in part], rel=1e-2)


def test_tables_that_differ_by_what_boards_may_are_no_noise_when_merged():
    apart = 0.25
    assert merge_tables({"a": table(), "b": table(apart)}).points[0].status == "measured"
    assert merge_tables({"a": table(protocol=BEFORE), "b": table(apart, BEFORE)}).points[0].status == "noisy"
    assert merge_tables({"a": table(), "b": table(2 * apart)}).points[0].status == "noisy"


@pytest.fixture(params=["diff", "verify"])
def holds(request, tmp_path, monkeypatch):
    """Whether the command finds nothing between a table and that of another board."""

    def found(protocol):
        before, after = (twenty_points(more_us, protocol) for more_us in (0.0, 3.0))
        paths = [write_file(one, tmp_path / f"{name}.yaml") for name, one in (("before", before), ("after", after))]
        measured = SweepResult({tmp_path / "new.yaml": after}, SimpleNamespace(noise={}), 0, {}, {})
        monkeypatch.setattr(verify_module, "sweep", lambda *_, **__: measured)
        command = {"diff": paths, "verify": ["--tables", paths[0], "--device", "cpu"]}[request.param]
        result = CliRunner().invoke(app, [request.param, *map(str, command)])
        assert result.exit_code in (0, 1), result.output
        return result.exit_code == 0

    return found


def twenty_points(more_us, protocol):
    """Of half of the points float8 takes twice as long, and of the other half half as long, and more_us in all."""
    bounds, rows = protocol.bounds, []
    for n in range(1, 21):
        bf16_us, fp8_us = 60.0 + more_us, (120.0 if n % 2 else 30.0) + more_us
        speedup = bf16_us / fp8_us
        run = Interval(speedup, speedup * math.exp(-RUN), speedup * math.exp(RUN))
        full = widened(run, bounds.between_runs(bf16_us, fp8_us))
        point = make_point(16, 32, 16 * n, speedup, bf16_us=(bf16_us / 2, bf16_us / 2))
        rows.append(replaced(point, speedup_low=full.low, speedup_high=full.high))
    return make_table(*rows, protocol=protocol, device=describe_device(torch.device("cpu")))


def test_a_table_of_another_board_is_no_finding_with_the_part_and_is_without_it(holds):
    narrow = Bounds(below_120_us=replaced(SMALL, between=0.005))
    assert holds(replaced(IN_TABLES, bounds=replaced(narrow, board_us=1.5)))
    assert not holds(replaced(IN_TABLES, bounds=narrow))


def test_tables_of_different_constants_are_not_merged():
    with pytest.raises(TableError, match=r"protocol.bounds.board_us is missing, but 1.5"):
        merge_tables({"a": table(), "b": table(protocol=BEFORE)})
