"""From samples to a ratio with confidence bounds. Pure: floats in, floats out.

There are two estimates, for two ways of measuring.

`paired_speedup`: both arms ran in alternating rounds, and each round gives one ratio. The estimate is that of Hodges
and Lehmann: the median of the Walsh averages (x_i + x_j) / 2, i <= j, of ln(ratio). The bounds are Walsh averages, at
the depth that the exact null distribution of Wilcoxon's signed-rank statistic gives (Hollander, Wolfe & Chicken,
Nonparametric Statistical Methods, 3rd ed., sections 3.2 to 3.4).

`unpaired_speedup`: each arm ran alone, so no sample of one belongs to a sample of the other. The estimate is the
quotient of the arms' times. The bounds are two of all ratios b_i / f_j, at the depth that the exact null distribution
of Wilcoxon's rank-sum statistic, in Mann and Whitney's form, gives (the same book, sections 4.1 to 4.3).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

Directions = tuple[Sequence[float], Sequence[float]]
"""The forward and the backward times of an arm, one of each a sample, in any one unit."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A ratio with its confidence bounds."""

    estimate: float
    low: float
    high: float

    def excludes(self, threshold: float) -> bool:
        return not self.low <= threshold <= self.high

    def within(self, tolerance: float) -> bool:
        """Both bounds lie within a relative `tolerance` of the estimate."""
        return self.low >= self.estimate * (1 - tolerance) and self.high <= self.estimate * (1 + tolerance)


def unpaired_speedup(bf16: Directions, fp8: Directions, *, confidence: float) -> Interval:
    """bf16 / float8 time of forward plus backward, from samples of two arms that ran one after the other.

    The estimate is the quotient of the times that a table's row states: of each arm, the median forward time plus the
    median backward time. The bounds are distribution-free. They assume that ln(time) of both arms varies in the same
    way about its centre, and they are widened to the estimate where that lies outside.

    Raises ValueError for a sample without both directions, for times that are not above 0, and for fewer samples than
    `confidence` needs (5 of each arm at 0.99).
    """
    bf16_totals, fp8_totals = _totals(bf16), _totals(fp8)
    depth = rank_sum_depth(len(bf16_totals), len(fp8_totals), confidence)
    ratios = sorted(b / f for b in bf16_totals for f in fp8_totals)  # in the order of their logarithms
    estimate = _sum_of_medians(bf16) / _sum_of_medians(fp8)
    return Interval(estimate, min(ratios[depth - 1], estimate), max(ratios[-depth], estimate))


def paired_speedup(bf16_us: Sequence[float], fp8_us: Sequence[float], *, confidence: float) -> Interval:
    """bf16 / float8 time from samples of alternating rounds, one of each arm a round, in any one unit.

    Raises ValueError for unequal lengths, for times that are not above 0, and for fewer rounds than `confidence`
    needs (8 at 0.99).
    """
    _require_times(*bf16_us, *fp8_us)
    return ratio_of([math.log(b / f) for b, f in zip(bf16_us, fp8_us, strict=True)], confidence=confidence)


def ratio_of(log_ratios: Sequence[float], *, confidence: float) -> Interval:
    """The ratio that all have in common. Raises ValueError for fewer than `confidence` needs (8 at 0.99)."""
    walsh = walsh_averages(log_ratios)
    depth = signed_rank_depth(len(log_ratios), confidence)
    return Interval(math.exp(statistics.median(walsh)), math.exp(walsh[depth - 1]), math.exp(walsh[-depth]))


def walsh_averages(values: Sequence[float]) -> list[float]:
    """All (x_i + x_j) / 2 for i <= j, ascending."""
    return sorted((a + b) / 2 for i, a in enumerate(values) for b in values[i:])


@cache
def signed_rank_depth(n: int, confidence: float) -> int:
    """How far in from either end of the n (n + 1) / 2 Walsh averages the bounds lie (1 = the outermost).

    The largest d with 2 P(W+ <= d - 1) <= 1 - confidence. Raises ValueError if n rounds cannot give that.
    """
    depth = _depth(_signed_rank_counts(n), confidence)
    if depth == 0:
        raise ValueError(f"{n} rounds are too few for bounds at {confidence:.1%} confidence")
    return depth


@cache
def rank_sum_depth(n: int, m: int, confidence: float) -> int:
    """How far in from either end of the n m ratios of two samples the bounds lie (1 = the outermost).

    The largest d with 2 P(U <= d - 1) <= 1 - confidence. Raises ValueError if n and m samples cannot give that.
    """
    depth = _depth(rank_sum_counts(n, m), confidence)
    if depth == 0:
        raise ValueError(f"{n} and {m} samples are too few for bounds at {confidence:.1%} confidence")
    return depth


@cache
def rank_sum_counts(n: int, m: int) -> tuple[int, ...]:
    """How many of the (n + m)! / n! m! orders of two samples give each Mann-Whitney U, 0 .. n m.

    They are the coefficients of the Gaussian binomial, the product of (1 - q^(m + i)) / (1 - q^i) for i = 1 .. n.
    """
    counts = [1] + [0] * (n * m)
    for i in range(1, n + 1):
        for u in range(n * m, m + i - 1, -1):
            counts[u] -= counts[u - m - i]
        for u in range(i, n * m + 1):
            counts[u] += counts[u - i]
    return tuple(counts)


def _signed_rank_counts(n: int) -> list[int]:
    """How many of the 2^n sign patterns give each rank sum 0 .. n (n + 1) / 2."""
    counts = [1]
    for rank in range(1, n + 1):
        shifted = [0] * rank + counts
        counts = [a + b for a, b in zip(counts + [0] * rank, shifted, strict=True)]
    return counts


def _depth(counts: Sequence[int], confidence: float) -> int:
    """The largest d with 2 P(X <= d - 1) <= 1 - confidence, or 0 if there is none. X is x in counts[x] of all cases."""
    allowed = (1 - confidence) / 2 * sum(counts) * (1 + 1e-12)  # the factor keeps 0.99's binary rounding out
    below, depth = 0, 0
    while below + counts[depth] <= allowed:
        below += counts[depth]
        depth += 1
    return depth


def _totals(times: Directions) -> list[float]:
    """Forward plus backward of each sample."""
    forward, backward = times
    _require_times(*forward, *backward)
    return [f + b for f, b in zip(forward, backward, strict=True)]


def _sum_of_medians(times: Directions) -> float:
    forward, backward = times
    return statistics.median(forward) + statistics.median(backward)


def _require_times(*times: float) -> None:
    if not all(0 < time < math.inf for time in times):
        raise ValueError("expected finite times above 0")
