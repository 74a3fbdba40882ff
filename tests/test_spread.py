"""How far repeats, controls and devices are apart, and which device is odd."""

from __future__ import annotations

import pytest
from samples import PROTOCOL, again, controlled, measured, point_record, replaced, timed_arm

from fp8gate.calibrate.points.point_record import ArmRecord
from fp8gate.calibrate.sweep.spread import between_devices, control_spread, devices_of, odd_devices, repeat_spread
from fp8gate.filter.contract.bounds import Spread

FAILED = ArmRecord(status="failed")


def record(device, k=32, *, speedup=2.0, slower=1.0, **fields):
    """A point on this device: bf16 takes 100 us there, or so many times more."""
    arms = {
        "bf16": timed_arm([100.0 * slower] * 8),
        "rowwise": timed_arm([100.0 * slower / speedup] * 8),
    }
    return point_record((64, k, 16), arms=arms, measured_on=device, host="node7", **fields)


def spread_between(*records):
    return between_devices("rowwise", PROTOCOL, records)


def test_each_speedup_is_compared_with_the_median_of_all_devices():
    spread = spread_between(*(record(device, speedup=s) for device, s in (("a", 2.0), ("b", 2.1), ("c", 1.8))))
    assert (spread.points, spread.median, spread.worst) == (1, 0.05, 0.1)


def test_a_point_of_one_device_says_nothing():
    assert spread_between(record("a"), record("a", speedup=3.0), record("b", k=64)) is None


def test_what_a_device_measured_twice_counts_once():
    spread = spread_between(record("a", speedup=1.9), record("a", speedup=2.1, repeat=True), record("b", speedup=2.0))
    assert (spread.points, spread.worst) == (1, 0.0)


def test_other_recipes_and_missing_numbers_are_left_out():
    failed = replaced(record("c"), arms={**record("c").arms, "rowwise": ArmRecord(status="failed")})
    assert spread_between(record("a"), failed) is None
    assert between_devices("tensorwise", PROTOCOL, [record("a"), record("b")]) is None


def test_devices_are_counted():
    assert devices_of([record("a"), record("b"), record("a", k=64)]) == {"a", "b"}


def fleet(slower, points=20):
    """Records of these devices, each slower by its factor; two points in ten are as they should be."""
    return [
        record(device, k=16 * (1 + i), slower=factor if i % 10 > 1 else 1.0)
        for device, factor in slower.items()
        for i in range(points)
    ]


def test_a_device_that_is_slower_throughout_is_named_with_what_it_reported():
    (odd,) = odd_devices(fleet({"a": 1.0, "b": 1.0, "c": 1.07}), {"c": "thermal slowdown, 4 times"})
    assert (odd.measured_on, round(odd.slower, 3), odd.points, odd.of) == ("c", 0.07, 16, 20)
    assert str(odd) == "node7 c: 7.0% slower than the median in 16 of 20 points; thermal slowdown, 4 times"


def test_one_that_is_faster_is_odd_too_and_the_oddest_comes_first():
    odd = odd_devices(fleet({"a": 1.0, "b": 1.0, "c": 1.0, "d": 0.95, "e": 1.1}), {})
    assert [str(device).split(" than")[0] for device in odd] == ["node7 e: 10.0% slower", "node7 d: 5.0% faster"]


@pytest.mark.parametrize(
    "slower",
    [
        pytest.param({"a": 1.0, "b": 1.01, "c": 1.02}, id="as devices differ"),
        pytest.param({"a": 1.0, "b": 1.2}, id="of two, nobody knows which"),
        pytest.param({"a": 1.2}, id="alone"),
    ],
)
def test_otherwise_none_is_odd(slower):
    assert odd_devices(fleet(slower), {}) == []


def test_a_device_that_measured_fewer_recipes_is_not_faster():
    records = fleet({"a": 1.0, "b": 1.0, "c": 1.0})
    only_bf16 = [replaced(r, measured_on="d", arms={"bf16": r.arms["bf16"]}) for r in fleet({"c": 1.0})]
    assert odd_devices(records + only_bf16, {}) == []


def test_slower_here_and_faster_there_is_not_odd():
    records = fleet({"a": 1.0, "b": 1.0})
    records += [record("c", k=16 * (1 + i), slower=1.1 if i % 2 else 0.9) for i in range(20)]
    assert odd_devices(records, {}) == []


def test_the_controls_of_a_table_are_how_far_bf16_is_from_itself():
    found = control_spread(PROTOCOL, [measured(), *map(controlled, (1.002, 0.996, 1.001))])
    assert (found.points, found.median, found.worst) == (3, 0.002, 0.004)
    assert control_spread(PROTOCOL, [measured()]) is None


def test_the_spread_is_how_far_the_repeats_are_from_the_first_times():
    apart = {16: 0.01, 32: -0.02, 48: 0.03, 64: -0.04, 80: 0.1}  # by k
    firsts = [measured(2.0, k=k) for k in apart]
    repeats = [again(2.0 * (1 + apart[k]), k=k) for k in apart]
    expected = Spread(points=5, median=0.03, p95=0.088, worst=0.1)  # 95 % is 0.8 of the way from the 4th to the 5th
    assert repeat_spread("tensorwise", PROTOCOL, [*firsts, *repeats]) == expected
    assert repeat_spread("tensorwise", PROTOCOL, [*repeats, *firsts]) == expected


def test_one_repeat_is_its_own_quantiles():
    found = repeat_spread("tensorwise", PROTOCOL, [measured(2.0), again(2.5)])
    assert found == Spread(points=1, median=0.25, p95=0.25, worst=0.25)


def test_a_repeat_is_compared_with_the_record_the_table_takes():
    without_numbers = point_record((64, 32, 16), arms={"bf16": timed_arm([100.0] * 8), "tensorwise": FAILED})
    records = [measured(4.0), measured(2.0), without_numbers, again(2.5)]
    assert repeat_spread("tensorwise", PROTOCOL, records).worst == 0.25


@pytest.mark.parametrize(
    "records",
    [
        pytest.param([], id="nothing"),
        pytest.param([measured(2.0), measured(2.5, process=8)], id="measured twice, no repeat"),
        pytest.param([measured(2.0), again(2.5, process=7)], id="by the same process"),
        pytest.param([measured(2.0), again(2.5, measured_on="another")], id="on another device"),
        pytest.param([measured(2.0, k=48), again(2.5)], id="of another shape"),
        pytest.param([measured(2.0), again(2.5, recipe="rowwise")], id="of another recipe"),
        pytest.param([measured(2.0, recipe="rowwise"), again(2.5)], id="of a recipe that was not measured"),
        pytest.param([measured(2.0), replaced(again(2.5), arms={"bf16": FAILED, "tensorwise": FAILED})], id="failed"),
        pytest.param(
            [replaced(measured(), arms={"bf16": FAILED, "tensorwise": FAILED}), again(2.5)], id="of a failure"
        ),
    ],
)
def test_other_records_make_no_spread(records):
    assert repeat_spread("tensorwise", PROTOCOL, records) is None
