"""From per-round times to a speedup with bounds. Pure: floats in, floats out.

The Hodges-Lehmann estimate is the median of the Walsh averages (x_i + x_j) / 2, i <= j; its bounds are the Walsh
averages at the depth given by the exact null distribution of Wilcoxon's signed-rank statistic (Hollander, Wolfe &
Chicken, Nonparametric Statistical Methods, 3rd ed., section 3.2 to 3.4).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache


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


def paired_speedup(bf16_us: Sequence[float], fp8_us: Sequence[float], *, confidence: float) -> Interval:
    """bf16 / float8 time from samples taken pairwise, one pair a round, in any one unit.

    Raises ValueError for unequal lengths, for times that are not above 0, and for fewer rounds than `confidence`
    needs (8 at 0.99).
    """
    if not all(0 < time_us < math.inf for time_us in (*bf16_us, *fp8_us)):
        raise ValueError("expected finite times above 0")
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
    counts = _rank_sum_counts(n)
    allowed = (1 - confidence) / 2 * 2**n * (1 + 1e-12)  # the factor keeps 0.99's binary rounding out
    below, depth = 0, 0
    while below + counts[depth] <= allowed:
        below += counts[depth]
        depth += 1
    if depth == 0:
        raise ValueError(f"{n} rounds are too few for bounds at {confidence:.1%} confidence")
    return depth


def _rank_sum_counts(n: int) -> list[int]:
    """How many of the 2^n sign patterns give each rank sum 0 .. n (n + 1) / 2."""
    counts = [1]
    for rank in range(1, n + 1):
        shifted = [0] * rank + counts
        counts = [a + b for a, b in zip(counts + [0] * rank, shifted, strict=True)]
    return counts
