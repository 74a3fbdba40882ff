"""Bounds cover what another sweep measures: how repeats are chosen, and what is made of them."""

from __future__ import annotations

import dataclasses
import math
import random
import warnings
from statistics import mean

import pytest
from builders import PROTOCOL as IN_TABLES
from builders import make_point, make_table, write_file
from samples import NEVER_NOISE, PROTOCOL, again, measured, point_record, replaced, timed_arm
from torch import nn

from fp8gate import AmbiguousPointWarning, auto_filter
from fp8gate.calibrate.comparison.compare_tables import compare_tables
from fp8gate.calibrate.comparison.merge import merge_tables
from fp8gate.calibrate.comparison.point_change import most_by_chance
from fp8gate.calibrate.device.cuda.kind import NOISE as GPU_NOISE
from fp8gate.calibrate.points.bounds import RepeatedPoint, run_bounds, widened
from fp8gate.calibrate.points.noise import Row, judge_with_bounds
from fp8gate.calibrate.points.point_record import is_near
from fp8gate.calibrate.report.comparison_text import comparison_text
from fp8gate.calibrate.sweep.sweep_tasks import repeats_for_bounds
from fp8gate.calibrate.timing.statistics import Interval
from fp8gate.filter.contract.bounds import Bounds, RunBounds, without_part
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.contract.table import TableError, format_table, parse_table

SHAPE = LinearShape(64, 32, 16)
WITHIN = 0.004


def t_distributed(rng, degrees=2.5):
    """Two H200 sweeps differ with such tails."""
    return rng.gauss(0.0, 1.0) / math.sqrt(rng.gammavariate(degrees / 2, 2.0) / degrees)


def sweeps(rng, points, scale=0.0085):
    """ln of what two sweeps measure at points whose speedup is 1."""
    return [(scale * t_distributed(rng), scale * t_distributed(rng)) for _ in range(points)]


def interval(log, half=WITHIN):
    return Interval(math.exp(log), math.exp(log - half), math.exp(log + half))


def repeated(pairs):
    return [RepeatedPoint(interval(one), math.exp(other)) for one, other in pairs]


def covered(pairs, between):
    bounds = [(widened(interval(one), (between, between)), math.exp(other)) for one, other in pairs]
    return mean(speedup.low <= other <= speedup.high for speedup, other in bounds)


def test_with_forty_repeats_another_sweep_lies_within_the_bounds_at_95_percent_of_the_points():
    with_both, with_one = [], []
    for seed in range(200):
        rng = random.Random(seed)
        found = run_bounds(repeated(sweeps(rng, 40)), [interval(0.0)], known=0.0)
        assert (found.coverage, found.repeats, found.within) == (0.95, 40, WITHIN)
        others = sweeps(rng, 262)
        with_both.append(covered(others, found.between))
        with_one.append(covered(others, 0.0))
    assert mean(with_both) > 0.965
    assert mean(share >= 0.95 for share in with_both) > 0.8
    assert mean(with_one) < 0.4  # what the bounds of one run cover


def test_a_few_wild_repeats_do_not_make_the_bounds_useless():
    rng = random.Random(0)
    pairs = sweeps(rng, 37)
    calm = run_bounds(repeated(pairs), [interval(0.0)], known=0.0).between
    wild = run_bounds(repeated([*pairs, *[(0.0, 0.2)] * 3]), [interval(0.0)], known=0.0).between
    assert calm < wild < 2 * calm


def test_where_a_tenth_differ_and_the_others_do_not_the_bounds_cover_that():
    found = run_bounds(repeated([(0.0, 0.0)] * 34 + [(0.0, 0.05)] * 6), [interval(0.0)], known=0.0)
    assert found.between == pytest.approx(math.sqrt(0.05**2 - WITHIN**2), abs=1e-5)


def test_without_a_difference_between_runs_the_bounds_stay_as_they_are():
    found = run_bounds(repeated([(0.0, 0.003)] * 40), [interval(0.0)], known=0.08)
    assert found.between == 0.0
    assert widened(interval(0.1), (0.0, 0.0)).high == pytest.approx(interval(0.1).high)


def test_each_side_is_widened_by_itself():
    wide = widened(Interval(2.0, 2.0 * math.exp(-0.03), 2.0), (0.04, 0.04))
    assert math.log(2.0 / wide.low) == pytest.approx(0.05)
    assert math.log(wide.high / 2.0) == pytest.approx(0.04)
    assert RepeatedPoint(wide, 2.0 * math.exp(0.05)).unexplained == pytest.approx(0.03)
    assert RepeatedPoint(wide, 2.0 * math.exp(-0.05)).unexplained == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("repeats", "coverage", "between"),
    [
        (0, 0.0, 0.08),  # what devices of the kind are known for
        (1, 0.5, 0.09),
        (18, 0.947, 0.09),
        (19, 0.95, 0.06),
        (80, 0.95, 0.06),
    ],
)
def test_few_repeats_say_what_they_can_show(repeats, coverage, between):
    pairs = [(0.0, 0.09), *[(0.0, 0.02)] * 79][:repeats]
    points = [RepeatedPoint(interval(one, 0.0), math.exp(other)) for one, other in pairs]
    found = run_bounds(points, [interval(0.0)], known=0.08)
    assert found == RunBounds(coverage=coverage, within=WITHIN, between=between, repeats=repeats)


def test_what_is_known_of_the_kind_holds_only_until_there_are_enough_repeats():
    few, many = (run_bounds(repeated([(0.0, 0.02)] * count), [interval(0.0)], known=0.08) for count in (18, 19))
    assert few.between == 0.08
    assert many.between == pytest.approx(3 * math.sqrt(0.02**2 - WITHIN**2), abs=1e-5)


# From records.


def small(record):
    """The same speedup where bf16 takes a tenth."""
    halved = {
        name: replaced(arm, fwd_us=tuple(t / 10 for t in arm.fwd_us), bwd_us=tuple(t / 10 for t in arm.bwd_us))
        for name, arm in record.arms.items()
    }
    return replaced(record, arms=halved)


def large(speedup=2.0, **fields):
    arms = {"bf16": timed_arm([1000.0] * 8), "tensorwise": timed_arm([1000.0 / speedup] * 8)}
    return point_record((64, fields.pop("k", 32), 16), arms=arms, **fields)


def judged(*records, limits=NEVER_NOISE):
    return judge_with_bounds(records, "tensorwise", PROTOCOL, limits)


def test_each_class_has_its_own_bounds():
    records = [large(), large(2.02, process=8, repeat=True), small(measured(k=48)), small(again(2.2, k=48))]
    rows, bounds = judged(*records)
    assert (bounds.below_120_us.between, bounds.from_120_us.between) == (0.09531, 0.00995)
    assert rows[SHAPE].point.speedup_high == 2.02
    assert rows[LinearShape(64, 48, 16)].point.speedup_high == 2.2
    assert bounds.of(119.9) is bounds.below_120_us
    assert bounds.of(120.0) is bounds.from_120_us


def test_a_class_without_points_is_not_there_and_nothing_is_without_numbers():
    assert judged(large())[1].below_120_us is None
    failed = replaced(timed_arm([1.0]), status="failed", fwd_us=(), bwd_us=())
    assert judged(point_record(arms={"bf16": timed_arm([100.0] * 8), "tensorwise": failed}))[1] is None


def test_only_another_process_that_repeats_shows_the_difference():
    same, no_repeat = large(2.2, process=7, repeat=True), large(2.2, process=8)
    assert judged(large(), same)[1].from_120_us.repeats == 0
    assert judged(no_repeat, large())[1].from_120_us.repeats == 0
    twice = dataclasses.replace(NEVER_NOISE, measures_twice=True)
    assert judged(no_repeat, large(), limits=twice)[1].from_120_us.repeats == 1


def test_where_all_is_measured_twice_the_outvoted_measurement_does_not_count():
    records = [large(3.0, process=9), large(2.02, process=8), large()]
    twice = dataclasses.replace(NEVER_NOISE, measures_twice=True, apart=1.1)
    assert judged(*records, limits=twice)[1].from_120_us.between == round(math.log(1.01), 5)


def test_of_several_repeats_that_of_another_device_counts():
    here, there = (large(s, process=8, repeat=True, measured_on=on) for s, on in ((2.02, ""), (2.1, "another")))
    for repeats in ((here, there), (there, here)):
        assert judged(large(), *repeats)[1].from_120_us == RunBounds(
            coverage=0.5, within=0.0, between=round(math.log(1.05), 5), repeats=1
        )


def test_a_point_that_is_noise_widens_no_bounds():
    limits = dataclasses.replace(NEVER_NOISE, apart=1.1)
    rows, bounds = judged(large(), large(3.0, process=8, repeat=True), large(k=48), limits=limits)
    assert rows[SHAPE].point.status == "noisy"
    assert bounds.from_120_us == RunBounds(coverage=0.0, within=0.0, between=0.0, repeats=0)


def test_ambiguous_is_what_another_sweep_may_turn_but_only_the_run_itself_asks_for_a_second_one():
    records = [large(1.05), large(1.12, process=8, repeat=True)]
    assert judged(*records)[0][SHAPE].point.status == "ambiguous"
    assert judged(records[0])[0][SHAPE].point.status == "measured"
    assert not is_near(records[0].speedup("tensorwise", PROTOCOL), replaced(PROTOCOL, near=0.03))


# Which points are repeated.

FEW = dataclasses.replace(GPU_NOISE, repeats=4)


def rows_of(sizes_us):
    points = {LinearShape(16, 16, 16 * (i + 1)): us for i, us in enumerate(sizes_us)}
    rows = {s: Row(point=make_point(s.m, s.k, s.n, bf16_us=(us / 2, us / 2))) for s, us in points.items()}
    return list(rows), {"tensorwise": rows, "rowwise": rows}


@pytest.mark.parametrize(
    ("smalls", "larges", "expected"),
    [(145, 262, (40, 40)), (60, 200, (40, 40)), (30, 23, (20, 7)), (12, 23, (8, 7)), (2, 3, (1, 1)), (0, 12, (0, 4))],
)
def test_a_class_has_forty_repeats_or_a_share_of_its_points(smalls, larges, expected):
    wanted, rows = rows_of([50.0] * smalls + [120.0] * larges)
    random.Random(1).shuffle(wanted)
    repeats = repeats_for_bounds(wanted, rows, [], 0, GPU_NOISE)
    assert [task.shape for task in repeats] == [s for s in wanted if s in {task.shape for task in repeats}]
    assert all(task.repeat for task in repeats)
    found = [rows["tensorwise"][task.shape].point.bf16_fwd_us for task in repeats]
    assert (found.count(25.0), found.count(60.0)) == expected


def repeat_of(shape, recipes=("tensorwise", "rowwise")):
    arms = dict.fromkeys(["bf16", *recipes], timed_arm([100.0] * 8))
    return point_record((shape.m, shape.k, shape.n), repeat=True, arms=arms)


def test_repeats_of_earlier_calls_count_and_points_without_numbers_are_not_repeated():
    wanted, rows = rows_of([50.0] * 30)
    for by_shape in rows.values():
        by_shape[wanted[0]] = Row(point=make_point(16, 16, 16, status="failed"))
    taken = [repeat_of(shape) for shape in wanted[1:4]]
    (last,) = repeats_for_bounds(wanted, rows, taken, 0, FEW)
    assert last.shape not in wanted[:4]
    assert repeats_for_bounds(wanted, rows, [*taken, repeat_of(last.shape)], 0, FEW) == []
    assert repeats_for_bounds(wanted, rows, [], 0, dataclasses.replace(FEW, repeats=0)) == []


def test_repeats_count_once_they_are_of_all_recipes():
    wanted, rows = rows_of([50.0] * 30)
    of_one = [repeat_of(shape, ["tensorwise"]) for shape in wanted[:4]]
    assert len(repeats_for_bounds(wanted, rows, of_one, 0, FEW)) == 4
    of_the_other = [repeat_of(shape, ["rowwise"]) for shape in wanted[:4]]
    assert repeats_for_bounds(wanted, rows, [*of_one, *of_the_other], 0, FEW) == []


# Tables.

SMALL = RunBounds(coverage=0.95, within=0.004, between=0.07, repeats=40)
LARGE = RunBounds(coverage=0.95, within=0.003, between=0.04, repeats=40)
STATED = replaced(IN_TABLES, bounds=Bounds(below_120_us=SMALL, from_120_us=LARGE))
HALF = math.hypot(0.04, 0.003)


def table(changes, *, half=HALF, protocol=STATED):
    """A table of points of 300 us whose speedups are 1.5, times these changes."""
    points = [make_point(16, 32, 16 * (i + 1), 1.5 * math.exp(c), spread=math.exp(half)) for i, c in enumerate(changes)]
    return make_table(*points, protocol=protocol)


def test_a_tables_header_says_what_its_bounds_cover():
    text = format_table(table([0.0]))
    assert "from_120_us: {coverage: 0.95, within: 0.003, between: 0.04, repeats: 40}}" in text
    assert parse_table(text, source="FILE").protocol.bounds == STATED.bounds
    assert "bounds" not in format_table(table([0.0], protocol=IN_TABLES))
    with pytest.raises(TableError, match=r"coverage"):
        parse_table(text.replace("coverage: 0.95", "coverage: 1.5"), source="FILE")


def compared(changes, **fields):
    before, after = table([0.0] * len(changes), **fields), table(changes, **fields)
    return compare_tables(before, after, min_speedup=1.05)


def test_two_tables_differ_beyond_bounds_from_the_root_of_the_squares_on():
    root = math.hypot(HALF, HALF)
    found = compared([0.98 * root, *[-1.02 * root, 1.02 * root] * 1, *[0.0] * 17])
    assert len(found.beyond_bounds) == 2
    assert not found.has_findings
    assert "2 of 20 beyond the bounds of both, of 5 that chance allows" in comparison_text([found])
    many = compared([1.02 * root, -1.02 * root] * 3 + [0.0] * 14)
    assert many.has_findings
    assert not many.changed
    assert "6 of 20 beyond the bounds of both, more than 5 that chance allows" in comparison_text([many])
    assert compared([2.02 * root, *[0.0] * 19]).has_findings


def test_chance_allows_as_many_points_beyond_as_the_binomial_distribution_says():
    assert [most_by_chance(points) for points in (0, 1, 20, 400)] == [0, 1, 5, 35]
    assert 6600 < most_by_chance(130_000) < 6900


def test_two_honest_sweeps_have_no_findings():
    for seed in range(50):
        changes = [
            0.0085 * (t_distributed(rng := random.Random(1000 * seed + i)) - t_distributed(rng)) for i in range(20)
        ]
        found = compared(changes, half=0.06)
        assert not found.has_many_beyond_bounds


def test_beside_a_table_that_states_no_bounds_only_what_varies_within_a_run_counts():
    old, new = table([0.0], half=0.003, protocol=IN_TABLES), table([0.0])
    both_old = compare_tables(old, old, min_speedup=1.05).points[0]
    mixed = compare_tables(old, new, min_speedup=1.05).points[0]
    assert mixed.bounds is None
    assert mixed.allowed == pytest.approx(both_old.allowed, abs=1e-3)
    assert without_part(HALF, 0.04) == pytest.approx(0.003)
    assert without_part(0.03, 0.04) == 0.0


def test_merged_tables_state_the_widest_bounds_and_all_repeats():
    wider = replaced(STATED, bounds=Bounds(from_120_us=replaced(LARGE, between=0.05, repeats=7, coverage=0.875)))
    merged = merge_tables({"a": table([0.0]), "b": table([0.02], protocol=wider)})
    expected = RunBounds(coverage=0.875, within=0.003, between=0.05, repeats=47)
    assert merged.protocol.bounds == Bounds(below_120_us=SMALL, from_120_us=expected)
    half = math.log(merged.points[0].speedup_high / merged.points[0].speedup)
    assert half == pytest.approx(HALF * math.sqrt(3 / 4), rel=0.01)


def test_bounds_of_merged_tables_cover_another_sweep():
    """Bounds for one sweep's difference from another hold for the mean of three, too, and not by being wide."""
    rng, sigma = random.Random(3), 0.015
    half = 1.96 * math.sqrt(2) * sigma
    covered = 0
    for _ in range(1000):
        tables = {name: table([rng.gauss(0, sigma)], half=half, protocol=STATED) for name in "abc"}
        point = merge_tables(tables).points[0]
        covered += point.speedup_low <= 1.5 * math.exp(rng.gauss(0, sigma)) <= point.speedup_high
    assert 0.94 < covered / 1000 < 0.985


def test_wide_bounds_of_honest_tables_are_no_noise_in_a_merged_one():
    apart, half = 0.09, math.hypot(0.08, 0.003)
    stated = replaced(STATED, bounds=Bounds(from_120_us=replaced(LARGE, between=0.08)))
    merged = merge_tables(
        {"a": table([0.0], half=half, protocol=stated), "b": table([apart], half=half, protocol=stated)}
    )
    assert merged.points[0].status == "measured"


def test_a_table_that_states_no_bounds_is_merged_with_no_other():
    with pytest.raises(TableError, match=r"protocol.bounds is missing, but there"):
        merge_tables({"a": table([0.0]), "b": table([0.0], protocol=IN_TABLES)})


# The filter.


@pytest.mark.filterwarnings("ignore::fp8gate.StaleTableWarning")
@pytest.mark.parametrize(
    ("speedup", "half", "convert", "warned"),
    [
        (1.06, 0.07, True, False),  # at worst 1 % slower than in bf16
        (1.04, 0.09, False, False),  # at best a gain of 8 % over what was asked for is missed
        (1.06, 0.20, True, True),  # at worst 15 % slower
        (1.04, 0.20, False, True),  # at best a gain of 21 % is missed
        (1.50, 0.20, True, False),  # the bounds leave nothing open
        (0.80, 0.20, False, False),
    ],
)
def test_a_warning_is_given_only_where_being_wrong_costs_more_than_a_tenth(tmp_path, speedup, half, convert, warned):
    point = make_point(32, 64, 128, speedup, spread=math.exp(half), status="ambiguous")
    path = write_file(make_table(point, protocol=STATED), tmp_path / "t.yaml")
    asked = auto_filter("rowwise", tokens=32, tables=path, min_speedup=1.05, plan=None, on_nothing="ignore")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        asked.check([("w1", nn.Linear(64, 128, device="meta"))])
    assert asked.decisions["w1"].convert is convert
    assert [one.category for one in found if one.category is AmbiguousPointWarning] == [AmbiguousPointWarning] * warned
