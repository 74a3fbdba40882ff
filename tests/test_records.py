"""From raw samples to the row of a table."""

from __future__ import annotations

import msgspec
import pytest
from samples import NOON, PROTOCOL, SETUP, TABLE_PROTOCOL, point_record, replaced, timed_arm

from fp8gate.calibrate.points.point_record import CONTROL, ArmRecord, PointRecord, is_near
from fp8gate.calibrate.sweep.table_writing import make_table
from fp8gate.calibrate.timing.statistics import Interval
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.contract.table import Grid, format_table, parse_table

NO_NUMBERS = (None,) * 7
WINS = [1.2] * 8
STRADDLES = [0.9, 1.1] * 4
STRADDLES_NARROWLY = [0.996, 1.004] * 4
WINS_WIDELY = [1.2, 1.6] * 4


def record_of(ratios):
    """A record in which tensorwise was so many times as fast as bf16 in each round."""
    bf16_us, fp8_us = [100.0 * ratio for ratio in ratios], [100.0] * len(ratios)
    return point_record(arms={"bf16": timed_arm(bf16_us), "tensorwise": timed_arm(fp8_us)})


def test_point_has_medians_rounded_to_four_digits():
    arms = {
        "bf16": ArmRecord(fwd_us=(99.99, 100.05) * 4, bwd_us=(*[200.0] * 7, 9999.0)),
        "tensorwise": ArmRecord(fwd_us=(*[33.33333] * 7, 1.0), bwd_us=tuple(range(61, 69))),
    }
    point = point_record(arms=arms).point("tensorwise", PROTOCOL)
    assert (point.m, point.k, point.n) == (64, 32, 16)
    assert point.numbers[:4] == (100.0, 200.0, 33.33, 64.5)  # no outlier counts; 100.02 has a digit too many


def test_speedup_is_the_quotient_of_the_rows_own_times():
    arms = {
        "bf16": ArmRecord(fwd_us=(100.0, 104.0) * 4, bwd_us=(*[200.0] * 7, 230.0)),
        "tensorwise": ArmRecord(fwd_us=(*[20.04] * 7, 35.0), bwd_us=(180.0, 181.0) * 4),
    }
    point = point_record(arms=arms).point("tensorwise", PROTOCOL)
    assert point.numbers[:4] == (102.0, 200.0, 20.04, 180.5)
    assert point.speedup == 1.506  # 302 / 200.54; of the totals' medians it would be 303 / 201
    assert point.status == "measured"


def test_rounding_the_times_does_not_move_the_speedup():
    arms = {"bf16": ArmRecord(fwd_us=(100.44,) * 8, bwd_us=(100.44,) * 8), "tensorwise": timed_arm([133.39] * 8)}
    point = point_record(arms=arms).point("tensorwise", PROTOCOL)
    assert (point.numbers[:4], point.speedup) == ((100.4, 100.4, 66.69, 66.69), 1.506)  # 200.88 / 133.39; 1.505 rounded


def test_the_order_of_an_arms_samples_does_not_matter():
    """Each arm ran alone: no round of one belongs to a round of the other."""
    bf16_us = [100.0, 200.0, 300.0, 400.0, 500.0, 600.0, 700.0, 800.0]
    points = [
        point_record(arms={"bf16": timed_arm(bf16_us), "tensorwise": timed_arm(fp8_us)}).point("tensorwise", PROTOCOL)
        for fp8_us in (bf16_us, bf16_us[::-1])
    ]
    assert points[0] == points[1]
    assert (points[0].speedup, points[0].status) == (1.0, "ambiguous")  # in pairs: 1.0 in every round, and decided


def test_bounds_are_the_intervals_rounded():
    """Of 64 ratios at 99 % the bounds are the 8th from either end."""
    point = record_of([1.11111] + [1.15555] * 6 + [1.22222]).point("tensorwise", PROTOCOL)
    assert (point.speedup_low, point.speedup, point.speedup_high) == (1.111, 1.156, 1.222)
    point = record_of([1.11111, *[1.15555] * 6, 1.22222]).point("tensorwise", replaced(PROTOCOL, confidence=0.95))
    assert (point.speedup_low, point.speedup, point.speedup_high) == (1.156, 1.156, 1.156)


def test_a_table_says_that_its_speedups_are_quotients():
    table = make_table(Grid(), "tensorwise", SETUP, [record_of(WINS)])
    assert (replaced(table.protocol, bounds=None), TABLE_PROTOCOL.estimate) == (TABLE_PROTOCOL, "quotient_of_times")
    assert parse_table(format_table(table), source="FILE.yaml").protocol == table.protocol


def test_a_journal_of_earlier_samples_is_still_resumed():
    """Its name is the fingerprint of the set-up, which says nothing of what is made of the samples."""
    earlier = {recipe: replaced(protocol, near_s=0.4) for recipe, protocol in SETUP.protocols.items()}
    assert replaced(SETUP, protocols=earlier).fingerprint == "3292886c"


@pytest.mark.parametrize(
    ("ratios", "threshold", "status"),
    [
        (WINS, 1.0, "measured"),
        (STRADDLES, 1.0, "ambiguous"),
        (STRADDLES_NARROWLY, 1.0, "measured"),
        (WINS_WIDELY, 1.0, "measured"),
        (WINS_WIDELY, 1.4, "ambiguous"),
    ],
)
def test_ambiguous_only_if_the_bounds_straddle_the_threshold_and_are_wide(ratios, threshold, status):
    point = record_of(ratios).point("tensorwise", replaced(PROTOCOL, threshold=threshold))
    assert point.status == status
    assert None not in point.numbers


@pytest.mark.parametrize("tolerance", [0.003, 0.005])
def test_the_tolerance_decides_what_is_wide(tolerance):
    point = record_of(STRADDLES_NARROWLY).point("tensorwise", replaced(PROTOCOL, tolerance=tolerance))
    assert point.status == ("ambiguous" if tolerance < 0.004 else "measured")


@pytest.mark.parametrize(
    ("interval", "near"),
    [
        pytest.param(Interval(1.2, 1.19, 1.21), False, id="far above"),
        pytest.param(Interval(0.8, 0.79, 0.81), False, id="far below"),
        pytest.param(Interval(1.1, 1.09, 1.11), True, id="near"),
        pytest.param(Interval(0.9, 0.899, 0.901), True, id="near below"),
        pytest.param(Interval(1.5, 0.95, 1.55), True, id="far but undecided"),
    ],
)
def test_near_is_what_the_decision_hangs_on(interval, near):
    assert is_near(interval, PROTOCOL) is near  # within 15 % of 1.0
    assert not is_near(interval, replaced(PROTOCOL, threshold=0.5))


def with_control(ratios, bf16_us=(100.0,) * 8):
    """A record whose bf16 is so many times as fast the second time, in each round."""
    control_us = [us / ratio for us, ratio in zip(bf16_us, ratios, strict=True)]
    return point_record(arms={**record_of([1.5] * 8).arms, "bf16": timed_arm(bf16_us), CONTROL: timed_arm(control_us)})


@pytest.mark.parametrize(
    ("ratios", "error"),
    [
        pytest.param([1.0] * 8, None, id="the same"),
        pytest.param([1.004] * 8, None, id="tolerated"),
        pytest.param([1.03] * 8, 0.03, id="off"),
        pytest.param([0.97] * 8, 0.03, id="off the other way"),
        pytest.param([0.95, 1.07] * 4, None, id="chance"),
        pytest.param([1.0052] * 8, 0.0052, id="just off"),
    ],
)
def test_a_control_is_off_if_that_is_neither_chance_nor_tolerated(ratios, error):
    found = with_control(ratios).control_error(replaced(PROTOCOL, control=0.005))
    assert found == (error if error is None else pytest.approx(error))


def test_the_rounds_of_a_control_are_paired():
    """bf16 and its control ran in turns, so a drift that both share says nothing: here from 100 to 150 us."""
    drift_us = [100.0 * 1.06**i for i in range(8)]
    ratio = with_control([1.03] * 8, drift_us).control_ratio(PROTOCOL)
    assert (ratio.low, ratio.estimate, ratio.high) == pytest.approx((1.03, 1.03, 1.03))
    assert with_control([1.03] * 8, drift_us).control_error(replaced(PROTOCOL, control=0.005)) == pytest.approx(0.03)


@pytest.mark.parametrize(("bf16_us", "is_off"), [(20.0, False), (30.0, True)])
def test_half_a_microsecond_is_no_reason_to_distrust(bf16_us, is_off):
    """2 % are 0.4 us of 20, and 0.6 us of 30."""
    record = with_control([1.02] * 8)
    arms = {name: timed_arm([t * bf16_us / 100 for t in arm.total_us]) for name, arm in record.arms.items()}
    assert bool(replaced(record, arms=arms).control_error(replaced(PROTOCOL, control=0.005))) is is_off


def test_without_a_measured_control_nothing_is_off():
    off = with_control([1.03] * 8)
    for lost in ("bf16", CONTROL):
        record = replaced(off, arms={**off.arms, lost: ArmRecord(status="out_of_memory")})
        assert (record.control_ratio(PROTOCOL), record.control_error(PROTOCOL)) == (None, None)
    assert (record_of(WINS).control_ratio(PROTOCOL), record_of(WINS).control_error(PROTOCOL)) == (None, None)


@pytest.mark.parametrize("status", ["out_of_memory", "unstable", "failed"])
def test_without_bf16_no_recipe_has_numbers(status):
    failed = ArmRecord(status="failed")
    arms = {"bf16": ArmRecord(status=status), "tensorwise": timed_arm(WINS), "rowwise": failed}
    record = point_record(arms=arms)
    for recipe in ("tensorwise", "rowwise"):
        point = record.point(recipe, PROTOCOL)
        assert (point.numbers, point.status) == (NO_NUMBERS, status)


@pytest.mark.parametrize("status", ["out_of_memory", "unstable", "failed"])
def test_a_failed_recipe_leaves_the_others_their_numbers(status):
    record = point_record(arms={**point_record().arms, "rowwise": ArmRecord(status=status)})
    failed, measured = record.point("rowwise", PROTOCOL), record.point("tensorwise", PROTOCOL)
    assert (failed.numbers, failed.status) == (NO_NUMBERS, status)
    assert (measured.speedup, measured.status) == (2.0, "measured")


def test_shape_and_recipes_of_a_record():
    record = point_record((48, 32, 16))
    assert record.shape == LinearShape(48, 32, 16)
    assert record.recipes == ("tensorwise",)


def test_a_round_needs_both_directions():
    assert ArmRecord(fwd_us=(1.0, 2.0), bwd_us=(10.0, 20.0)).total_us == (11.0, 22.0)
    with pytest.raises(ValueError, match="zip"):
        _ = ArmRecord(fwd_us=(1.0, 2.0), bwd_us=(10.0,)).total_us


def test_a_record_survives_json():
    failed = ArmRecord(status="failed", errors={"output": None}, detail='bad "kernel"\nline 2')
    record = point_record(arms={"bf16": timed_arm([0.125] * 8), "rowwise": failed}, measured_at=NOON)
    line = msgspec.json.encode(record)
    assert b"\n" not in line
    assert msgspec.json.decode(line, type=PointRecord) == record
