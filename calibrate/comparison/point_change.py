"""One shape that two tables measured: how far it changed, and how far it may change by chance. Pure.

In: two rows and what the bounds of their tables cover. Out: a `PointChange`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from fp8gate.filter.contract.bounds import COVERAGE, without_part
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.contract.table import Point, SweepProtocol

SPREADS = 3.0
"""How many times the spread a point may change by chance, beside its bounds. The spread is the 95th percentile of the
repeated points; the mean of both tables is taken, because each repeats 20 points only. Of the 1221 speedups of two
sweeps, the one that differed most lay at 2.4 spreads, beside its bounds (LOG.md, 2026-11-25)."""
DEFAULT_SPREAD = 0.05  # for tables that state none
FAR_BEYOND = 2.0
"""How many times what the bounds of both tables allow a single point may change by chance. Of the 1221 speedups of two
H200 sweeps, with bounds as 40 repeats give them, 5 differ by more than those allow, and none by 1.5 times as much."""
BY_CHANCE = 1e-3  # how often two honest sweeps have more points beyond their bounds than `most_by_chance`


@dataclass(frozen=True, kw_only=True, slots=True)
class PointChange:
    """One shape that both tables measured.

    allowed: how far ln(after / before) may be from 0 by chance, at any single point. bounds: how far at 95 % of the
    points or more; None if a table does not say.
    """

    before: Point
    after: Point
    allowed: float
    bounds: float | None
    flips: bool

    @property
    def shape(self) -> LinearShape:
        return self.before.shape

    @property
    def change(self) -> float:
        """0.1 means that the speedup is 10 % higher."""
        return _speedup(self.after) / _speedup(self.before) - 1

    @property
    def is_beyond_chance(self) -> bool:
        return abs(math.log(1 + self.change)) > self.allowed

    @property
    def is_beyond_bounds(self) -> bool:
        return self.bounds is not None and abs(math.log(1 + self.change)) > self.bounds


def compare_points(
    before: Point, after: Point, parts: tuple[SweepProtocol, SweepProtocol], min_speedup: float
) -> PointChange:
    """parts: the tables' protocols. Where one does not say what its bounds cover, what varies within one run counts."""
    flips = (_speedup(before) >= min_speedup) != (_speedup(after) >= min_speedup)
    if all(protocol.bounds for protocol in parts):
        bounds = math.hypot(_half_width(before), _half_width(after))
        return PointChange(before=before, after=after, allowed=FAR_BEYOND * bounds, bounds=bounds, flips=flips)
    within = math.hypot(*(_within(point, part) for point, part in zip((before, after), parts, strict=True)))
    allowed = within + SPREADS * sum(map(_spread, parts)) / 2
    return PointChange(before=before, after=after, allowed=allowed, bounds=None, flips=flips)


def _within(point: Point, protocol: SweepProtocol) -> float:
    """The half width of what varies within one run."""
    sides = protocol.bounds.between_runs(*point.total_us) if protocol.bounds else (0.0, 0.0)
    return without_part(_half_width(point), sum(sides) / 2)


def most_by_chance(points: int) -> int:
    """How many of so many points lie beyond bounds that cover COVERAGE of them, but for BY_CHANCE of all cases."""
    tail, count = 1.0, -1
    while tail > BY_CHANCE:
        count += 1
        ways = math.lgamma(points + 1) - math.lgamma(count + 1) - math.lgamma(points - count + 1)
        tail -= math.exp(ways + count * math.log(1 - COVERAGE) + (points - count) * math.log(COVERAGE))
    return count


def _spread(protocol: SweepProtocol) -> float:
    return protocol.spread.p95 if protocol.spread else DEFAULT_SPREAD


def _speedup(point: Point) -> float:
    assert point.speedup, point
    return point.speedup


def _half_width(point: Point) -> float:
    assert point.speedup_low, point
    assert point.speedup_high, point
    return math.log(point.speedup_high / point.speedup_low) / 2
