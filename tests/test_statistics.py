"""The estimates: by hand on small data, against brute force, by their symmetries, and by what they cover."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8gate.calibrate.timing.statistics import (
    Interval,
    paired_speedup,
    rank_sum_counts,
    rank_sum_depth,
    signed_rank_depth,
    unpaired_speedup,
    walsh_averages,
)

TIME_US = st.floats(min_value=1.0, max_value=1e5)
ROUNDS = st.lists(st.tuples(TIME_US, TIME_US), min_size=8, max_size=12)
ARM = st.lists(st.tuples(TIME_US, TIME_US), min_size=5, max_size=9)
"""The forward and backward times of one arm alone."""
few = settings(max_examples=30, deadline=None)


def speedup(rounds, confidence=0.99):
    bf16_us, fp8_us = zip(*rounds, strict=True)
    return paired_speedup(bf16_us, fp8_us, confidence=confidence)


def quotient(bf16, fp8, confidence=0.99):
    return unpaired_speedup(tuple(zip(*bf16, strict=True)), tuple(zip(*fp8, strict=True)), confidence=confidence)


def halves(total_us):
    """The directions of an arm that takes half of each time forward, half backward."""
    return ([us / 2 for us in total_us],) * 2


def bounds(interval):
    return interval.low, interval.estimate, interval.high


def brute_force_depth(values, confidence: Fraction) -> int:
    """The largest d with 2 P(X <= d - 1) <= 1 - confidence, given X of every case; 0 if there is none."""
    depth = 0
    while Fraction(2 * sum(value <= depth for value in values), len(values)) <= 1 - confidence:
        depth += 1
    return depth


def all_rank_sums(n: int) -> list[int]:
    """W+ of all 2^n sign patterns."""
    return [sum(chosen) for chosen in itertools.product(*((0, rank) for rank in range(1, n + 1)))]


def all_mann_whitney_u(n: int, m: int) -> list[int]:
    """U of all orders of n and m samples: how many pairs have the one of the n after the one of the m."""
    return [sum(places) - n * (n - 1) // 2 for places in itertools.combinations(range(n + m), n)]


# --- paired rounds ---------------------------------------------------------------------------------------------


def test_walsh_averages_are_all_pairs_in_order():
    assert walsh_averages([4.0, 0.0, 1.0]) == [0.0, 0.5, 1.0, 2.0, 2.5, 4.0]


@pytest.mark.parametrize(
    ("ratios", "log2_low", "log2_estimate", "log2_high"),
    [
        ((1, 2, 16), 0, 1.5, 4),  # logs 0 1 4: median of 0 .5 1 2 2.5 4; of the logs, mean 1.67, median 1
        ((1, 2, 16, 512), 0.5, 3.25, 6.5),  # depth 2 of 0 .5 1 2 2.5 4 4.5 5 6.5 9
    ],
)
def test_hodges_lehmann_by_hand(ratios, log2_low, log2_estimate, log2_high):
    interval = paired_speedup(ratios, [1.0] * len(ratios), confidence=0.75)
    assert bounds(interval) == pytest.approx((2**log2_low, 2**log2_estimate, 2**log2_high))


@pytest.mark.parametrize(
    ("n", "confidence", "depth"),
    [
        *[(n, 0.95, depth) for n, depth in ((6, 1), (7, 3), (8, 4), (9, 6), (10, 9), (11, 11), (12, 14))],
        *[(n, 0.99, depth) for n, depth in ((8, 1), (9, 2), (10, 4), (12, 8), (16, 20), (24, 62), (32, 129))],
    ],
)
def test_depth_is_that_of_the_published_tables(n, confidence, depth):
    """The depth is the two-sided critical value of W in the tables, plus 1."""
    assert signed_rank_depth(n, confidence) == depth


@pytest.mark.parametrize("confidence", ["0.95", "0.99"])
@pytest.mark.parametrize("n", range(6, 13))
def test_depth_agrees_with_all_sign_patterns(n, confidence):
    expected = brute_force_depth(all_rank_sums(n), Fraction(confidence))
    if expected == 0:
        with pytest.raises(ValueError, match=f"{n} rounds are too few"):
            signed_rank_depth(n, float(confidence))
    else:
        assert signed_rank_depth(n, float(confidence)) == expected


def test_depth_takes_a_confidence_that_is_met_exactly_and_no_more():
    exactly = 1 - 2 / 2**8  # the outermost averages of 8 rounds
    assert signed_rank_depth(8, exactly) == 1
    with pytest.raises(ValueError, match="too few"):
        signed_rank_depth(8, exactly + 1e-6)


@pytest.mark.parametrize(("rounds", "confidence"), [(0, 0.95), (5, 0.95), (7, 0.99)])
def test_too_few_rounds_are_an_error(rounds, confidence):
    with pytest.raises(ValueError, match=f"{rounds} rounds are too few"):
        paired_speedup([2.0] * rounds, [1.0] * rounds, confidence=confidence)


def test_unpaired_times_are_an_error():
    with pytest.raises(ValueError, match="zip"):
        paired_speedup([2.0] * 9, [1.0] * 8, confidence=0.99)


@pytest.mark.parametrize("bad_us", [0.0, -1.0])
def test_a_time_that_is_not_above_0_is_an_error(bad_us):
    with pytest.raises(ValueError, match=r"math domain|expected|above 0"):
        paired_speedup([2.0] * 7 + [bad_us], [1.0] * 8, confidence=0.99)


@few
@given(ROUNDS)
def test_swapping_the_arms_gives_the_reciprocal(rounds):
    forward, swapped = speedup(rounds), speedup([(fp8, bf16) for bf16, fp8 in rounds])
    assert bounds(swapped) == pytest.approx((1 / forward.high, 1 / forward.estimate, 1 / forward.low))


@few
@given(ROUNDS, st.data())
def test_clock_drift_that_both_arms_share_cancels(rounds, data):
    drift = data.draw(st.lists(st.floats(0.1, 10.0), min_size=len(rounds), max_size=len(rounds)))
    drifted = [(bf16 * d, fp8 * d) for (bf16, fp8), d in zip(rounds, drift, strict=True)]
    assert bounds(speedup(drifted)) == pytest.approx(bounds(speedup(rounds)))


@few
@given(ROUNDS, st.floats(0.01, 100.0))
def test_a_slower_bf16_scales_the_speedup(rounds, factor):
    scaled = speedup([(bf16 * factor, fp8) for bf16, fp8 in rounds])
    assert bounds(scaled) == pytest.approx([factor * bound for bound in bounds(speedup(rounds))])


@few
@given(ROUNDS, st.randoms())
def test_bounds_enclose_the_estimate_whatever_the_order_of_rounds(rounds, rng):
    interval = speedup(rounds)
    assert interval.low <= interval.estimate <= interval.high
    shuffled = rng.sample(rounds, len(rounds))
    assert bounds(speedup(shuffled)) == pytest.approx(bounds(interval))


@few
@given(ROUNDS)
def test_more_confidence_never_narrows_the_bounds(rounds):
    wide, narrow = speedup(rounds, 0.99), speedup(rounds, 0.9)
    assert wide.low <= narrow.low
    assert narrow.high <= wide.high


@few
@given(st.lists(TIME_US, min_size=8, max_size=32), st.sampled_from([0.5, 1.0, 4.0]))
def test_identical_ratios_have_no_width(fp8_us, ratio):
    interval = paired_speedup([ratio * us for us in fp8_us], fp8_us, confidence=0.99)
    assert interval.low == interval.estimate == interval.high == pytest.approx(ratio)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng, truth, draws = random.Random(0), 1.3, 2000
    intervals = [
        paired_speedup([truth * math.exp(rng.gauss(0, 0.05)) for _ in range(8)], [1.0] * 8, confidence=0.99)
        for _ in range(draws)
    ]
    covered = sum(interval.low <= truth <= interval.high for interval in intervals) / draws
    assert 0.983 <= covered <= 0.997  # exactly 1 - 2 / 2^8 = 0.9922 in the limit


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.nan, math.inf])
def test_times_that_are_none_are_refused(wrong):
    with pytest.raises(ValueError, match="expected finite times above 0"):
        paired_speedup([1.0] * 8, [1.0] * 7 + [wrong], confidence=0.99)


# --- arms that ran one after the other -------------------------------------------------------------------------


@pytest.mark.parametrize(("confidence", "log2_low", "log2_high"), [(0.95, -2, 18), (0.99, -4, 20)])
def test_quotient_and_bounds_by_hand(confidence, log2_low, log2_high):
    """The logs of the 25 ratios are -4, -3 .. 20. The bounds are the 3rd ones at 95 %, and the outermost at 99 %."""
    bf16, fp8 = halves([2.0**e for e in (10, 0, 20, 5, 15)]), halves([2.0**e for e in (3, 4, 0, 2, 1)])
    interval = unpaired_speedup(bf16, fp8, confidence=confidence)
    assert bounds(interval) == (2.0**log2_low, 2.0**8, 2.0**log2_high)  # medians 2^10 and 2^2


def test_each_direction_has_its_median():
    """Forward 10 and backward 50, though the medians of the totals are 69 and 40."""
    bf16 = ([10.0, 10.0, 10.0, 19.0, 19.0], [59.0, 59.0, 50.0, 50.0, 50.0])
    assert unpaired_speedup(bf16, ([30.0] * 5, [10.0] * 5), confidence=0.95).estimate == 60 / 40


def test_bounds_are_widened_to_the_estimate():
    """The medians are 1 and 1, and yet all totals but one are 10."""
    bf16 = ([1.0] * 4 + [9.0] * 3, [9.0] * 3 + [1.0] * 4)
    assert bounds(unpaired_speedup(bf16, halves([5.0] * 7), confidence=0.95)) == (0.4, 0.4, 2.0)
    assert bounds(unpaired_speedup(halves([5.0] * 7), bf16, confidence=0.95)) == (0.5, 2.5, 2.5)


@pytest.mark.parametrize(
    ("n", "m", "confidence", "critical"),
    [
        *[(n, n, 0.95, u) for n, u in ((4, 0), (5, 2), (6, 5), (7, 8), (8, 13), (10, 23), (20, 127))],
        *[(n, n, 0.99, u) for n, u in ((5, 0), (6, 2), (7, 4), (8, 7), (10, 16), (20, 105))],
        *[(n, m, 0.95, u) for n, m, u in ((3, 5, 0), (5, 8, 6), (5, 10, 8))],
    ],
)
def test_rank_sum_depth_is_that_of_the_published_tables(n, m, confidence, critical):
    """The depth is the two-sided critical value of Mann and Whitney's U in the tables, plus 1."""
    assert rank_sum_depth(n, m, confidence) == rank_sum_depth(m, n, confidence) == critical + 1


@pytest.mark.parametrize(("n", "m"), list(itertools.product(range(2, 7), range(3, 7))))
def test_rank_sum_depth_agrees_with_all_orders(n, m):
    orders = all_mann_whitney_u(n, m)
    assert Counter(orders) == dict(enumerate(rank_sum_counts(n, m)))
    for confidence in ("0.9", "0.95", "0.99"):
        expected = brute_force_depth(orders, Fraction(confidence))
        if expected == 0:
            with pytest.raises(ValueError, match=f"{n} and {m} samples are too few"):
                rank_sum_depth(n, m, float(confidence))
        else:
            assert rank_sum_depth(n, m, float(confidence)) == expected


def test_every_order_of_large_samples_is_counted():
    counts = rank_sum_counts(40, 40)
    assert (sum(counts), len(counts), counts[:6]) == (math.comb(80, 40), 1601, (1, 1, 2, 3, 5, 7))  # partitions
    assert counts == counts[::-1]


def test_rank_sum_depth_takes_a_confidence_that_is_met_exactly_and_no_more():
    exactly = 1 - 2 / math.comb(10, 5)  # the outermost ratios of 5 and 5 samples
    assert rank_sum_depth(5, 5, exactly) == 1
    with pytest.raises(ValueError, match="too few"):
        rank_sum_depth(5, 5, exactly + 1e-6)


@pytest.mark.parametrize(("n", "m", "confidence"), [(0, 0, 0.95), (0, 9, 0.95), (3, 4, 0.95), (4, 4, 0.99)])
def test_too_few_samples_are_an_error(n, m, confidence):
    with pytest.raises(ValueError, match=f"{n} and {m} samples are too few for bounds at {confidence:.1%} confidence"):
        unpaired_speedup(halves([2.0] * n), halves([1.0] * m), confidence=confidence)


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("direction", [0, 1])
def test_directions_that_are_no_times_are_refused(wrong, direction):
    damaged = [[1.0] * 8, [1.0] * 8]
    damaged[direction][5] = wrong
    for arms in ((damaged, halves([1.0] * 8)), (halves([1.0] * 8), damaged)):
        with pytest.raises(ValueError, match="expected finite times above 0"):
            unpaired_speedup(*arms, confidence=0.99)


def test_a_sample_without_both_directions_is_an_error():
    with pytest.raises(ValueError, match="zip"):
        unpaired_speedup(([1.0] * 8, [1.0] * 7), halves([1.0] * 8), confidence=0.99)


@few
@given(ARM, ARM)
def test_swapping_unpaired_arms_gives_the_reciprocal(bf16, fp8):
    forward, swapped = quotient(bf16, fp8), quotient(fp8, bf16)
    assert bounds(swapped) == pytest.approx((1 / forward.high, 1 / forward.estimate, 1 / forward.low))


@few
@given(ARM, ARM, st.floats(0.01, 100.0))
def test_a_slower_unpaired_arm_scales_the_speedup(bf16, fp8, factor):
    scaled = quotient([(f * factor, b * factor) for f, b in bf16], fp8)
    assert bounds(scaled) == pytest.approx([factor * bound for bound in bounds(quotient(bf16, fp8))])


@few
@given(ARM, ARM, st.randoms())
def test_unpaired_samples_have_no_order(bf16, fp8, rng):
    interval = quotient(bf16, fp8)
    assert interval.low <= interval.estimate <= interval.high
    assert quotient(rng.sample(bf16, len(bf16)), rng.sample(fp8, len(fp8))) == interval


@few
@given(ARM, ARM)
def test_more_confidence_never_narrows_unpaired_bounds(bf16, fp8):
    wide, narrow = quotient(bf16, fp8, 0.99), quotient(bf16, fp8, 0.8)
    assert wide.low <= narrow.low <= narrow.high <= wide.high


def test_unpaired_bounds_cover_the_truth_as_often_as_they_say():
    """Of two independent samples; their depth covers 95.7 % in the limit."""
    rng, truth, draws = random.Random(0), 1.3, 2000

    def arm(samples, time_us):
        return halves([time_us * math.exp(rng.gauss(0, 0.05)) for _ in range(samples)])

    intervals = [unpaired_speedup(arm(8, truth), arm(10, 1.0), confidence=0.95) for _ in range(draws)]
    covered = sum(interval.low <= truth <= interval.high for interval in intervals) / draws
    assert 0.95 <= covered <= 0.97


# --- intervals -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "excluded"), [(1.01, 1.2, True), (0.8, 0.99, True), (0.9, 1.1, False), (1.0, 1.1, False)]
)
def test_excludes(low, high, excluded):
    assert Interval(estimate=(low + high) / 2, low=low, high=high).excludes(1.0) is excluded


@pytest.mark.parametrize(
    ("low", "high", "is_within"),
    [(1.985, 2.015, True), (1.975, 2.0, False), (2.0, 2.025, False), (1.9, 2.1, False)],
)
def test_within_wants_both_bounds_close(low, high, is_within):
    assert Interval(estimate=2.0, low=low, high=high).within(0.01) is is_within
