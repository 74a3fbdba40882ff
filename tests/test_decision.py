"""The order in which a decision is taken, and the reason kept with it."""

from __future__ import annotations

import msgspec
import pytest
from builders import PROTOCOL, make_point, make_table

from fp8gate.filter.contract.bounds import Bounds
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.contract.table import Point
from fp8gate.filter.decision.decide import DEFAULT_MIN_SPEEDUP, Decision, decide
from fp8gate.filter.decision.lookup import Lookup


def decided(
    shape: tuple[int, int, int],
    *points: Point,
    kind: str = "nearest",
    min_speedup: float = 1.02,
    recomputed: bool = False,
) -> Decision:
    lookup = Lookup(make_table(*points), kind)
    return decide(LinearShape(*shape), lookup, min_speedup=min_speedup, recomputed=recomputed)


def answer(decision: Decision) -> tuple[bool, str]:
    """Whether it converts, its speedup and its reason."""
    number = f"{decision.speedup_text}: " if decision.speedup_text else ""
    return decision.convert, f"{number}{decision.reason}"


def test_default_is_five_percent():
    assert DEFAULT_MIN_SPEEDUP == 1.05


@pytest.mark.parametrize(
    ("speedup", "min_speedup", "expected"),
    [
        (1.5, 1.02, (True, "1.50x: measured")),
        (1.02, 1.02, (True, "1.02x: measured")),
        (1.01, 1.02, (False, "1.01x: below 1.02x, measured")),
        (0.5, 1.02, (False, "0.50x: below 1.02x, measured")),
        (0.5, 0.4, (True, "0.50x: measured")),
        (1.5, 1.6, (False, "1.50x: below 1.60x, measured")),
    ],
)
def test_converts_from_the_wanted_speedup_on(speedup, min_speedup, expected):
    assert answer(decided((32, 64, 128), make_point(32, 64, 128, speedup), min_speedup=min_speedup)) == expected


@pytest.mark.parametrize(
    ("speedup", "low", "high", "expected"),
    [
        (1.0175, 1.0163, 1.0203, (False, "1.0175x: below 1.0200x, measured, bounds 1.0163 to 1.0203 within one run")),
        (1.0175, 1.0, 1.04, (False, "1.0175x: below 1.0200x, measured, bounds 1.0000 to 1.0400 within one run")),
        (1.021, 1.019, 1.022, (True, "1.0210x: measured, bounds 1.0190 to 1.0220 within one run")),
        (1.01, 1.0, 1.03, (False, "1.01x: below 1.02x, measured, bounds 1.00 to 1.03 within one run")),
        (1.04, 1.01, 1.05, (True, "1.04x: measured, bounds 1.01 to 1.05 within one run")),
        (1.021, 1.0205, 1.022, (True, "1.02x: measured")),
    ],
)
def test_all_numbers_of_a_reason_have_the_digits_that_tell_them_apart(speedup, low, high, expected):
    point = msgspec.structs.replace(make_point(32, 64, 128, speedup), speedup_low=low, speedup_high=high)
    assert answer(decided((32, 64, 128), point)) == expected


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((40, 64, 128), "m = 40: not a multiple of 16"),
        ((32, 72, 128), "k = 72: not a multiple of 16"),
        ((32, 64, 100), "n = 100: not a multiple of 16"),
        ((33, 65, 129), "m = 33, k = 65, n = 129: not a multiple of 16"),
    ],
)
def test_indivisible_shape_is_refused_even_where_it_was_measured_to_win(shape, reason):
    decision = decided(shape, make_point(*shape, 2.0))
    assert decision == Decision(convert=False, reason=reason, shape=LinearShape(*shape))


@pytest.mark.parametrize("shape", [(16, 16, 16), (48, 80, 112)])
def test_multiples_of_16_are_judged_by_their_speedup(shape):
    assert answer(decided(shape, make_point(*shape, 2.0))) == (True, "2.00x: measured")


def test_indivisible_comes_before_slow_and_before_failed():
    assert decided((32, 64, 100), make_point(32, 64, 100, 0.5)).reason.startswith("n = 100")
    failed = make_point(32, 64, 100, status="failed")
    assert decided((32, 64, 100), failed, make_point(32, 64, 128)).reason.startswith("n = 100")


@pytest.mark.parametrize("speedup", [0.5, 2.0])
def test_failed_nearest_point_refuses_however_fast_its_neighbour_is(speedup):
    points = [make_point(32, 64, 128, status="failed"), make_point(32, 64, 512, speedup)]
    assert answer(decided((32, 64, 128), *points)) == (
        False,
        f"{speedup:.2f}x: float8 failed at the nearest point, nearest (32, 64, 512), outside the measured range, "
        "a nearer point is failed",
    )


@pytest.mark.parametrize("status", ["out_of_memory", "unstable", "noisy"])
def test_other_gap_is_said_but_decided_by_the_next_point(status):
    points = [make_point(32, 64, 64, 2.0), make_point(32, 64, 128, status=status), make_point(32, 64, 512, 0.5)]
    provenance = f"nearest (32, 64, 64), a nearer point is {status}"
    assert answer(decided((32, 64, 128), *points)) == (True, f"2.00x: {provenance}")
    assert answer(decided((32, 64, 128), *points, min_speedup=3.0)) == (False, f"2.00x: below 3.00x, {provenance}")


def test_failed_point_further_away_does_not_refuse():
    points = [make_point(32, 64, 128, status="failed"), make_point(32, 64, 512, 2.0)]
    assert answer(decided((32, 64, 384), *points)) == (
        True,
        "2.00x: nearest (32, 64, 512), outside the measured range",
    )


@pytest.mark.parametrize(
    ("shape", "kind", "reason"),
    [
        ((32, 64, 128), "nearest", "1.50x: measured"),
        ((32, 64, 128), "interpolate", "1.50x: measured"),
        ((32, 64, 160), "nearest", "1.50x: nearest (32, 64, 128)"),
        ((32, 64, 256), "interpolate", "2.12x: interpolated"),
        ((32, 64, 496), "nearest", "3.00x: nearest (32, 64, 512), ambiguous"),
        ((32, 64, 1024), "nearest", "3.00x: nearest (32, 64, 512), outside the measured range, ambiguous"),
        ((64, 64, 256), "interpolate", "2.12x: interpolated, outside the measured range"),
    ],
)
def test_reason_says_where_the_number_is_from(shape, kind, reason):
    points = [make_point(32, 64, 128, 1.5), make_point(32, 64, 512, 3.0, status="ambiguous")]
    assert answer(decided(shape, *points, kind=kind)) == (True, reason)


def test_table_without_numbers_converts_nothing():
    decision = decided((32, 64, 128), make_point(32, 64, 128, status="out_of_memory"), min_speedup=0.01)
    assert answer(decision) == (False, "the table holds no measured point")
    assert (decision.speedup, decision.point) == (None, None)


def test_decision_keeps_what_it_was_taken_from():
    point = make_point(32, 64, 128, 1.5, spread=1.25)
    assert decided((32, 64, 256), point) == Decision(
        convert=True,
        reason="nearest (32, 64, 128), outside the measured range",
        shape=LinearShape(32, 64, 256),
        speedup=1.5,
        speedup_low=1.2,
        speedup_high=1.875,
        point=point,
        distance=1.0,
        outside=True,
        is_unsure=True,
    )


def test_decision_names_the_local_sizes():
    decision = decided((32, 64, 128), make_point(32, 64, 128))
    assert (decision.m, decision.k, decision.n) == (32, 64, 128)
    nameless = Decision(convert=False, reason="no shape")
    assert (nameless.m, nameless.k, nameless.n) == (None, None, None)


# --- recomputation ---------------------------------------------------------------------------------------------


def timed(bf16_us: tuple[float, float], fp8_us: tuple[float, float], *, off: float = 1.0) -> Point:
    """A point of these times (forward, backward). off: its speedup over the quotient of the times."""
    speedup = off * sum(bf16_us) / sum(fp8_us)
    return Point(32, 64, 128, *bf16_us, *fp8_us, speedup, speedup / 1.25, speedup * 1.25, "measured")


@pytest.mark.parametrize(
    ("bf16_us", "fp8_us", "once", "twice"),
    [
        ((100.0, 200.0), (50.0, 100.0), 2.0, 2.0),
        ((100.0, 200.0), (150.0, 50.0), 1.5, 400 / 350),
        ((100.0, 200.0), (25.0, 175.0), 1.5, 400 / 225),
        ((10.0, 10.0), (20.0, 4.0), 20 / 24, 30 / 44),
    ],
)
@pytest.mark.parametrize("kind", ["nearest", "interpolate"])
def test_recomputed_forward_counts_twice_in_both_precisions(bf16_us, fp8_us, once, twice, kind):
    point = timed(bf16_us, fp8_us)
    plain, recomputed = (decided((32, 64, 128), point, kind=kind, recomputed=r) for r in (False, True))
    assert plain.speedup == pytest.approx(once)
    assert recomputed.speedup == pytest.approx(twice)
    assert recomputed.speedup_low == pytest.approx(twice / 1.25)
    assert recomputed.speedup_high == pytest.approx(twice * 1.25)
    assert recomputed.point == plain.point == point


def test_recomputation_changes_the_speedup_by_the_factor_of_the_times():
    """The times say by which factor the speedup changes. Its value is the point's own."""
    decision = decided((32, 64, 128), timed((100.0, 200.0), (150.0, 50.0), off=1.1), recomputed=True)
    assert decision.speedup == pytest.approx(1.1 * 400 / 350)


@pytest.mark.parametrize(
    ("recomputed", "expected"),
    [(False, (True, "1.50x: measured")), (True, (False, "1.14x: below 1.45x, measured, recomputed"))],
)
def test_recomputation_can_turn_a_decision(recomputed, expected):
    point = msgspec.structs.replace(timed((100.0, 200.0), (150.0, 50.0)), speedup_low=1.46, speedup_high=1.54)
    assert answer(decided((32, 64, 128), point, min_speedup=1.45, recomputed=recomputed)) == expected


def test_indivisible_shape_is_refused_with_recomputation_too():
    assert decided((32, 64, 100), make_point(32, 64, 100), recomputed=True).reason == "n = 100: not a multiple of 16"


@pytest.mark.parametrize(
    ("shape", "is_far"),
    [((320, 64, 128), False), ((336, 64, 128), True), ((32, 64, 16), False), ((32, 1024, 128), True)],
)
def test_far_outside_of_what_was_measured_nothing_is_converted(shape, is_far):
    decision = decided(shape, make_point(32, 64, 128, 2.0))
    assert (decision.convert, decision.outside) == (not is_far, True)
    assert (decision.speedup is None) == is_far
    assert ("times outside what was measured: too far to tell" in decision.reason) == is_far


def test_how_far_outside_is_that_of_the_farthest_dimension():
    point = make_point(32, 64, 128, 2.0)
    assert decided((32 * 6, 64 * 6, 128), point).convert
    assert decided((32 * 6, 64 * 12, 128), point).reason == "12 times outside what was measured: too far to tell"


@pytest.mark.parametrize(
    ("bounds", "said"), [(None, "bounds 1.01 to 1.05 within one run"), (Bounds(), "bounds 1.01 to 1.05")]
)
def test_a_reason_says_whether_bounds_cover_one_run_only(bounds, said):
    point = msgspec.structs.replace(make_point(32, 64, 128, 1.04), speedup_low=1.01, speedup_high=1.05)
    table = make_table(point, protocol=msgspec.structs.replace(PROTOCOL, bounds=bounds))
    assert decide(LinearShape(32, 64, 128), Lookup(table), min_speedup=1.02).reason == f"measured, {said}"
