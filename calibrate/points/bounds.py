"""Bounds that another sweep confirms: what varies within a run, and what repeats show to differ between runs. Pure.

In: pairs of measurements of the same points, by two processes. Out: the `RunBounds` of a class of points, and the
widened bounds of a point.

Repeats in other processes of one sweep differ as much as two sweeps on two boards do, but for a constant in which
boards differ (LOG.md, 2026-11-26). So `between` is made of repeats, and the constant is that of the kind of device
(`NoiseLimits.board_us`). Each row has its effect, by its own times (`Bounds.between_runs`). All half widths are those
of ln(speedup).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from fp8gate.calibrate.timing.statistics import Interval
from fp8gate.filter.contract.bounds import COVERAGE, RunBounds, without_part

QUARTILE, TAIL = 0.75, 3.0
"""95 % of the differences are at most TAIL times as large as three quarters of them are. In two sweeps of two H200
boards, and in two of two H100 boards, it is 1.9 to 3.2 times, by recipe and class; in Student's t distribution with two
degrees of freedom it is 2.7 times (4.303 / 1.604). A few dozen repeats tell their quartile well and their 95 % quantile
badly."""
LEAST = 0.9
"""At least so many of the differences seen are covered, whatever their distribution."""
DIGITS = 5


@dataclass(frozen=True, slots=True)
class RepeatedPoint:
    """The speedup that the table states, and that of another process."""

    stated: Interval
    again: float

    @property
    def unexplained(self) -> float:
        """By how much they differ, beyond what varies within the stated run."""
        apart = math.log(self.again / self.stated.estimate)
        low, high = half_widths(self.stated)
        return math.sqrt(max(0.0, apart**2 - (high if apart > 0 else low) ** 2))


def run_bounds(repeated: Sequence[RepeatedPoint], stated: Sequence[Interval], *, known: float) -> RunBounds:
    """The bounds of one class. stated: all its points. known: `between` of such devices, where repeats are too few.

    Of R differences the one of rank q (R + 1) is at least as large as another one with probability q, whatever their
    distribution; the largest one is with R / (R + 1). 19 are the fewest that can tell for COVERAGE.
    """
    count = len(repeated)
    ranked = sorted(point.unexplained for point in repeated)
    coverage = min(COVERAGE, math.floor(1000 * count / (count + 1)) / 1000)
    if coverage == COVERAGE:
        quartile, least = (ranked[math.ceil(share * (count + 1)) - 1] for share in (QUARTILE, LEAST))
        between = max(TAIL * quartile, least)
    else:
        between = max([known, *ranked])
    return RunBounds(
        coverage=coverage,
        within=round(median(sum(half_widths(interval)) / 2 for interval in stated), DIGITS),
        between=round(between, DIGITS),
        repeats=count,
    )


def widened(speedup: Interval, part: tuple[float, float]) -> Interval:
    """Bounds with one more part, given by its half widths below and above the estimate."""
    low, high = (math.exp(math.hypot(half, more)) for half, more in zip(half_widths(speedup), part, strict=True))
    return Interval(speedup.estimate, speedup.estimate / low, speedup.estimate * high)


def narrowed(speedup: Interval, part: tuple[float, float]) -> Interval:
    """Bounds without one of their parts: what `widened` made them of."""
    halves = zip(half_widths(speedup), part, strict=True)
    low, high = (math.exp(without_part(half, less)) for half, less in halves)
    return Interval(speedup.estimate, speedup.estimate / low, speedup.estimate * high)


def half_widths(speedup: Interval) -> tuple[float, float]:
    """Below and above the estimate."""
    return math.log(speedup.estimate / speedup.low), math.log(speedup.high / speedup.estimate)
