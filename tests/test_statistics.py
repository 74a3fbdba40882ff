"""The estimator: by hand on small data, against brute force, by its symmetries, and by what it covers."""

from __future__ import annotations

import itertools
import math
import random
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp8gate.calibrate.timing.statistics import Interval, paired_speedup, signed_rank_depth, walsh_averages

TIME_US = st.floats(min_value=1.0, max_value=1e5)
ROUNDS = st.lists(st.tuples(TIME_US, TIME_US), min_size=8, max_size=16)


def speedup(rounds, confidence=0.99):
    bf16_us, fp8_us = zip(*rounds, strict=True)
    return paired_speedup(bf16_us, fp8_us, confidence=confidence)


def bounds(interval):
    return interval.low, interval.estimate, interval.high


def brute_force_depth(n: int, confidence: Fraction) -> int:
    """The largest d with 2 P(W+ <= d - 1) <= 1 - confidence, over all 2^n sign patterns; 0 if there is none."""
    rank_sums = [sum(chosen) for chosen in itertools.product(*((0, rank) for rank in range(1, n + 1)))]
    depth = 0
    while Fraction(2 * sum(w <= depth for w in rank_sums), 2**n) <= 1 - confidence:
        depth += 1
    return depth


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
    """The tables' two-sided critical values of W, plus 1."""
    assert signed_rank_depth(n, confidence) == depth


@pytest.mark.parametrize("confidence", ["0.95", "0.99"])
@pytest.mark.parametrize("n", range(6, 13))
def test_depth_agrees_with_all_sign_patterns(n, confidence):
    expected = brute_force_depth(n, Fraction(confidence))
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


@given(ROUNDS)
def test_swapping_the_arms_gives_the_reciprocal(rounds):
    forward, swapped = speedup(rounds), speedup([(fp8, bf16) for bf16, fp8 in rounds])
    assert bounds(swapped) == pytest.approx((1 / forward.high, 1 / forward.estimate, 1 / forward.low))


@given(ROUNDS, st.data())
def test_clock_drift_that_both_arms_share_cancels(rounds, data):
    drift = data.draw(st.lists(st.floats(0.1, 10.0), min_size=len(rounds), max_size=len(rounds)))
    drifted = [(bf16 * d, fp8 * d) for (bf16, fp8), d in zip(rounds, drift, strict=True)]
    assert bounds(speedup(drifted)) == pytest.approx(bounds(speedup(rounds)))


@given(ROUNDS, st.floats(0.01, 100.0))
def test_a_slower_bf16_scales_the_speedup(rounds, factor):
    scaled = speedup([(bf16 * factor, fp8) for bf16, fp8 in rounds])
    assert bounds(scaled) == pytest.approx([factor * bound for bound in bounds(speedup(rounds))])


@given(ROUNDS, st.randoms())
def test_bounds_enclose_the_estimate_whatever_the_order_of_rounds(rounds, rng):
    interval = speedup(rounds)
    assert interval.low <= interval.estimate <= interval.high
    shuffled = rng.sample(rounds, len(rounds))
    assert bounds(speedup(shuffled)) == pytest.approx(bounds(interval))


@given(ROUNDS)
def test_more_confidence_never_narrows_the_bounds(rounds):
    wide, narrow = speedup(rounds, 0.99), speedup(rounds, 0.9)
    assert wide.low <= narrow.low
    assert narrow.high <= wide.high


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


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.nan, math.inf])
def test_times_that_are_none_are_refused(wrong):
    with pytest.raises(ValueError, match="expected finite times above 0"):
        paired_speedup([1.0] * 8, [1.0] * 7 + [wrong], confidence=0.99)
