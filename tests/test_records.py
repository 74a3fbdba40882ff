"""From raw samples to the row of a table."""

from __future__ import annotations

import msgspec
import pytest
from samples import NOON, PROTOCOL, point_record, replaced, timed_arm

from fp8gate.calibrate.records import ArmRecord, PointRecord
from fp8gate.filter.shapes import LinearShape

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


def test_speedup_is_of_forward_plus_backward_round_by_round():
    arms = {
        "bf16": ArmRecord(fwd_us=(100.0, 10.0) * 4, bwd_us=(200.0, 20.0) * 4),
        "tensorwise": ArmRecord(fwd_us=(20.0, 2.0) * 4, bwd_us=(180.0, 18.0) * 4),
    }
    point = point_record(arms=arms).point("tensorwise", PROTOCOL)
    assert point.numbers[4:] == (1.5, 1.5, 1.5)  # 300 / 200 and 30 / 20: unpaired, far apart
    assert point.status == "measured"


def test_bounds_are_the_intervals_rounded():
    point = record_of([1.11111, 1.22222] * 4).point("tensorwise", PROTOCOL)
    assert (point.speedup_low, point.speedup_high) == (1.111, 1.222)  # 8 rounds at 99 %: lowest and highest
    assert point.speedup == 1.165  # sqrt(1.11111 * 1.22222), the median of 20 equal Walsh averages of 36


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
