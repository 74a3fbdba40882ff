"""Estimate any shape from a table: by the nearest measured point, or by interpolation between measured points.

In: a `Table` and a `LinearShape`. Out: an `Estimate`. Pure: no files, no torch.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import cached_property
from operator import mul
from typing import Literal, NamedTuple, get_args

import msgspec

from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.contract.table import Point, Status, Table
from fp8gate.filter.decision.axis import DISTANCE_DIGITS, Axis, nearest_first

LookupName = Literal["nearest", "interpolate"]
LOOKUPS: tuple[LookupName, ...] = get_args(LookupName)
DEFAULT_LOOKUP: LookupName = "interpolate"
"""Judged where float8 breaks even (`min_speedup` 1.0), interpolation loses less than half of what the nearest point
loses. Over 110 shapes off the grid of one NVIDIA H200 its mean loss is 0.05, 0.06 and 0.05 % against 0.16, 0.39 and
0.17 % (tensorwise, rowwise, rowwise_with_gw_hp); over 40 on one NVIDIA H100 it is 0.00, 0.00 and 0.14 % against 0.00,
0.43 and 0.54 %. At the default of 1.05 the means are 0.06, 0.21 and 0.16 % against 0.00, 0.22 and 0.07 %. Most of that
is what the layers below 1.05 would gain by themselves, whatever the lookup.
Source: `python benchmarks/against_torchao_rule.py --min-speedup 1.0`, and LOG.md."""

Sizes = tuple[int, int, int]
TIE_OCTAVES = 1e-9  # distances that differ by less are equal
MAX_OCTAVES_OUTSIDE = 3.0
"""Farther outside of what was measured, the border's answer says nothing: eight times as large in one dimension. Heads
of large vocabularies lie within it (262144 rows of a weight, where 32768 were measured)."""


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """Forward + backward of one shape, from the table. Times are in microseconds.

    point: the nearest measured point. distance: how far it is, in octaves (Euclidean, log2 per axis; 0 = exact,
    1 = one dimension twice as large). outside: the shape was not measured and is outside the measured part of the grid
    (without a grid, outside of all points). gap: the status of an even nearer point that has no numbers, or None.
    octaves_outside: how far the shape is outside of the sizes that were measured (Euclidean, as for distance).
    from_tokens: a smaller number of tokens whose speedup is used, because the shape's own tokens were not measured
    around its k and n; or None. forwards: how often the forward runs. is_frozen: the weight needs no gradient.
    """

    speedup: float
    speedup_low: float
    speedup_high: float
    bf16_fwd_us: float
    bf16_bwd_us: float
    fp8_fwd_us: float
    fp8_bwd_us: float
    point: Point
    distance: float
    outside: bool
    gap: Status | None
    interpolated: bool
    octaves_outside: float = 0.0
    from_tokens: int | None = None
    forwards: int = 1
    is_frozen: bool = False

    @property
    def is_far_outside(self) -> bool:
        return self.octaves_outside > MAX_OCTAVES_OUTSIDE

    @property
    def bf16_us(self) -> float:
        return self.forwards * self.bf16_fwd_us + self.bf16_bwd_us

    @property
    def fp8_us(self) -> float:
        """The bf16 time over the speedup, and so consistent with the decision, unlike the sum of the float8 medians."""
        return self.bf16_us / self.speedup

    def recomputed(self) -> Estimate:
        """The estimate under activation checkpointing, which runs the forward twice in both precisions.

        The speedup and its bounds change by the same factor as the quotient of the summed times.
        """
        once, twice = (
            (n * self.bf16_fwd_us + self.bf16_bwd_us) / (n * self.fp8_fwd_us + self.fp8_bwd_us) for n in (1, 2)
        )
        change = twice / once
        return msgspec.structs.replace(
            self,
            speedup=self.speedup * change,
            speedup_low=self.speedup_low * change,
            speedup_high=self.speedup_high * change,
            forwards=2,
        )

    def frozen(self) -> Estimate:
        """The estimate where the weight needs no gradient: what float8 gains at least, as the table has no such column.

        In bf16 both gradients take the same FLOP, so half of the backward is left. In float8 the product that is left
        out takes at least half of its bf16 time, a quarter of the bf16 backward, and its casts are not counted.
        """
        bf16_bwd_us = self.bf16_bwd_us / 2
        fp8_bwd_us = max(self.fp8_bwd_us - self.bf16_bwd_us / 4, self.fp8_bwd_us / 2)
        before = self.bf16_us / (self.forwards * self.fp8_fwd_us + self.fp8_bwd_us)
        after = (self.forwards * self.bf16_fwd_us + bf16_bwd_us) / (self.forwards * self.fp8_fwd_us + fp8_bwd_us)
        change = after / before
        return msgspec.structs.replace(
            self,
            speedup=self.speedup * change,
            speedup_low=self.speedup_low * change,
            speedup_high=self.speedup_high * change,
            bf16_bwd_us=bf16_bwd_us,
            fp8_bwd_us=fp8_bwd_us,
            is_frozen=True,
        )


class Lookup:
    """An index over one table. Building it takes time linear in the points, as does the slowest `__call__`.

    Raises InputError for an unknown kind of lookup.
    """

    def __init__(self, table: Table, kind: LookupName = DEFAULT_LOOKUP) -> None:
        if kind not in LOOKUPS:
            raise InputError(f"lookup: expected one of {', '.join(LOOKUPS)}; got {kind!r}")
        self.table = table
        self._estimate: Callable[[LinearShape], Estimate] = self._nearest if kind == "nearest" else self._interpolate
        self._points: dict[Sizes, Point] = {(p.m, p.k, p.n): p for p in table.points}
        self._logs = {at: tuple(map(math.log, _numbers(p))) for at, p in self._points.items() if p.speedup is not None}
        self._grid = tuple(map(Axis, (table.grid.m, table.grid.k, table.grid.n)))
        self._everywhere = tuple(Axis(sizes) for sizes in zip(*self._points, strict=True))
        on_grid = [
            at for at in self._logs if all(size in axis.sizes for size, axis in zip(at, self._grid, strict=True))
        ]
        self._range = [(min(sizes), max(sizes)) for sizes in zip(*(on_grid or self._logs), strict=True)]

    def __call__(self, shape: LinearShape) -> Estimate | None:
        """The estimate for `shape`, or None if the table holds no number at all."""
        return self._estimate(shape) if self._logs else None

    def _nearest(self, shape: LinearShape) -> Estimate:
        """The nearest point's speedup as it was measured, and its times scaled with the work."""
        nearest = self._find_nearest(shape)
        return self._make(shape, nearest, _numbers(nearest.point), nearest.point.shape, interpolated=False)

    def _interpolate(self, shape: LinearShape) -> Estimate:
        """The numbers between the 8 grid points around the shape: ln of each is linear in log2 of each axis.

        A shape outside the grid is moved to its border (times still scale with the work). The largest shapes of a grid
        are not measured. If one of the 8 points is such a shape, the next smaller m at which all were measured is used,
        unless the nearest point is nearer. The nearest point is also used if there is no such m, or if the shape itself
        was measured.
        """
        nearest = self._find_nearest(shape)
        if nearest.distance > 0:
            on_m, on_k, on_n = self._grid
            m, around_m = on_m.bracket(shape.m)
            k, around_k = on_k.bracket(shape.k)
            n, around_n = on_n.bracket(shape.n)
            if numbers := self._blend(around_m, around_k, around_n):
                return self._make(shape, nearest, numbers, LinearShape(m, k, n), interpolated=True)
            for at_m in reversed(on_m.sizes[: bisect_left(on_m.sizes, m)]):
                if math.log2(m / at_m) > nearest.distance + TIE_OCTAVES:
                    break
                if numbers := self._blend([(at_m, 1.0)], around_k, around_n):
                    return self._make(shape, nearest, numbers, LinearShape(at_m, k, n), interpolated=True)
            if not self._in_table(around_m, around_k, around_n):
                nearest = nearest._replace(outside=True)
        return self._make(shape, nearest, _numbers(nearest.point), nearest.point.shape, interpolated=False)

    def _blend(self, *around: Sequence[tuple[int, float]]) -> list[float] | None:
        """The `_numbers` between these sizes of each axis, or None if one of the corners was not measured."""
        weights, corners = [], []
        for (m, weight_m), (k, weight_k), (n, weight_n) in itertools.product(*around):
            logs = self._logs.get((m, k, n))
            if logs is None:
                return None
            weights.append(weight_m * weight_k * weight_n)
            corners.append(logs)
        return [math.exp(sum(map(mul, weights, column))) for column in zip(*corners, strict=True)]

    def _in_table(self, *around: Sequence[tuple[int, float]]) -> bool:
        """Whether every corner has a row in the table, with or without numbers. True if there are no corners."""
        sizes = ([size for size, _ in sides] for sides in around)
        return all(corner in self._points for corner in itertools.product(*sizes))

    def _make(
        self,
        shape: LinearShape,
        nearest: _Nearest,
        numbers: Sequence[float],
        measured_at: LinearShape,
        *,
        interpolated: bool,
    ) -> Estimate:
        """An estimate for `shape` from the `_numbers` known at `measured_at`."""
        speedup, low, high, bf16_fwd_us, bf16_bwd_us, fp8_fwd_us, fp8_bwd_us = numbers
        work = shape.flop / measured_at.flop
        is_fewer = measured_at.m < shape.m and interpolated and measured_at.m < self._grid[0].bracket(shape.m)[0]
        from_tokens = measured_at.m if is_fewer else None
        is_inside = nearest.distance == 0 or not (is_fewer or nearest.outside or self._outside(shape))
        return Estimate(
            speedup=speedup,
            speedup_low=low,
            speedup_high=high,
            bf16_fwd_us=bf16_fwd_us * work,
            bf16_bwd_us=bf16_bwd_us * work,
            fp8_fwd_us=fp8_fwd_us * work,
            fp8_bwd_us=fp8_bwd_us * work,
            point=nearest.point,
            distance=nearest.distance,
            outside=not is_inside,
            gap=nearest.gap,
            interpolated=interpolated,
            octaves_outside=0.0 if is_inside else self._octaves_outside(shape),
            from_tokens=from_tokens,
        )

    def _find_nearest(self, shape: LinearShape) -> _Nearest:
        """The nearest point with numbers, and the status of a nearer point without numbers.

        Of equally near points, the one with the lower speedup counts: converting a layer that loses costs more than
        leaving one that wins.
        """
        at = (shape.m, shape.k, shape.n)
        if at in self._logs:
            return _Nearest(self._points[at], 0.0, None)
        on_m, on_k, on_n = self._everywhere
        m, m_away = on_m.nearest(shape.m)
        k, k_away = on_k.nearest(shape.k)
        n, n_away = on_n.nearest(shape.n)
        if (m, k, n) in self._logs:  # nearest on every axis, so no point is nearer
            return _Nearest(self._points[m, k, n], math.sqrt(m_away + k_away + n_away), None)
        return self._search(at)

    def _search(self, at: Sizes) -> _Nearest:
        """The same by a search outwards on every axis, up to the nearest point so far. It looks at no point twice.

        Distances are rounded, so that equal ones compare as equal whatever the order in which they were summed.
        """
        at_m, at_k, at_n = map(math.log2, at)
        best = (math.inf, math.inf, at)
        gaps: list[tuple[float, Sizes]] = []
        for m_away, by_k in nearest_first(self._by_m, at_m):
            if round(m_away, DISTANCE_DIGITS) > best[0]:
                break
            for k_away, by_n in nearest_first(by_k, at_k):
                if round(m_away + k_away, DISTANCE_DIGITS) > best[0]:
                    break
                for n_away, point in nearest_first(by_n, at_n):
                    away = round(m_away + k_away + n_away, DISTANCE_DIGITS)
                    if away > best[0]:
                        break
                    if point.speedup is None:
                        gaps.append((away, (point.m, point.k, point.n)))
                    else:
                        best = min(best, (away, point.speedup, (point.m, point.k, point.n)))
        gap = min((gap for gap in gaps if gap[0] < best[0]), default=None)
        return _Nearest(self._points[best[2]], math.sqrt(best[0]), self._points[gap[1]].status if gap else None)

    @cached_property
    def _by_m(self) -> list[tuple[float, list[tuple[float, list[tuple[float, Point]]]]]]:
        """All points by log2 of m, then k, then n. Built for the first shape that needs a search."""
        sizes: dict[int, dict[int, list[tuple[float, Point]]]] = {}
        for point in self._points.values():
            sizes.setdefault(point.m, {}).setdefault(point.k, []).append((math.log2(point.n), point))
        return [(math.log2(m), [(math.log2(k), by_n) for k, by_n in by_k.items()]) for m, by_k in sizes.items()]

    def _outside(self, shape: LinearShape) -> bool:
        sizes = (shape.m, shape.k, shape.n)
        return any(not low <= size <= high for size, (low, high) in zip(sizes, self._range, strict=True))

    def _octaves_outside(self, shape: LinearShape) -> float:
        sizes = (shape.m, shape.k, shape.n)
        away = (
            math.log2(max(low / size, size / high, 1.0)) for size, (low, high) in zip(sizes, self._range, strict=True)
        )
        return math.hypot(*away)


class _Nearest(NamedTuple):
    """The nearest measured point. See `Estimate` for the fields."""

    point: Point
    distance: float
    gap: Status | None
    outside: bool = False


def _numbers(point: Point) -> list[float]:
    """The speedup, its bounds and the four times of a point that has numbers."""
    numbers = [x for x in point.numbers if x is not None]
    assert len(numbers) == 7, point
    return [*numbers[4:], *numbers[:4]]
