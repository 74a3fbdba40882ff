"""Estimate any shape from a table: by the nearest measured point, or by interpolation between measured points.

In: a `Table` and a `LinearShape`. Out: an `Estimate`. Pure: no files, no torch.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from operator import mul
from typing import Literal, get_args

from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.contract.shapes import TOKEN_TILE, LinearShape
from fp8gate.filter.contract.table import Point, Table
from fp8gate.filter.decision.axis import Axis
from fp8gate.filter.decision.estimate import Estimate
from fp8gate.filter.decision.nearest import Nearest, NearestPoint, Sizes

LookupName = Literal["nearest", "interpolate"]
LOOKUPS: tuple[LookupName, ...] = get_args(LookupName)
DEFAULT_LOOKUP: LookupName = "interpolate"
"""Judged where float8 breaks even (`min_speedup` 1.0), interpolation loses less than half of what the nearest point
loses. Over 110 shapes off the grid of one NVIDIA H200 its mean loss is 0.05, 0.06 and 0.05 % against 0.16, 0.39 and
0.17 % (tensorwise, rowwise, rowwise_with_gw_hp); over 40 on one NVIDIA H100 it is 0.00, 0.00 and 0.14 % against 0.00,
0.43 and 0.54 %. At the default of 1.05 the means are 0.06, 0.21 and 0.16 % against 0.00, 0.22 and 0.07 %. Most of that
is what the layers below 1.05 would gain by themselves, whatever the lookup.
Source: `python benchmarks/against_torchao_rule.py --min-speedup 1.0`, and LOG.md."""

TIE_OCTAVES = 1e-9  # distances that differ by less are equal


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
        self._nearest_point = NearestPoint(table.points)
        on_grid = [
            at for at in self._logs if all(size in axis.sizes for size, axis in zip(at, self._grid, strict=True))
        ]
        self._measured_box = cache(self._find_measured_box)
        self._range = [(min(sizes), max(sizes)) for sizes in zip(*(on_grid or self._logs), strict=True)]

    def __call__(self, shape: LinearShape) -> Estimate | None:
        """The estimate for `shape`, or None if the table holds no number at all."""
        if not self._logs:
            return None
        estimate, unaligned = self._estimate(shape), self.table.protocol.unaligned
        if shape.is_aligned or not self._is_of_aligned(shape, estimate):
            return estimate  # points with such tokens, which may be the shape itself, were measured as slow as they are
        return estimate.with_unaligned_tokens(unaligned.factor if unaligned else None)

    def _is_of_aligned(self, shape: LinearShape, estimate: Estimate) -> bool:
        """Whether the points that an estimate was made of have tokens that are a multiple of 128.

        An interpolation takes none that is off the grid, however near.
        """
        if not estimate.interpolated:
            return estimate.point.shape.is_aligned
        return all(m % TOKEN_TILE == 0 for m, _ in self._grid[0].bracket(shape.m)[1])

    def _nearest(self, shape: LinearShape) -> Estimate:
        """The nearest point's speedup as it was measured, and its times scaled with the work."""
        nearest = self._nearest_point(shape)
        if self.table.incomplete and nearest.distance > 0:
            sizes = (shape.m, shape.k, shape.n)
            around = [axis.bracket(size)[1] for axis, size in zip(self._grid, sizes, strict=True)]
            nearest = nearest if self._blend(*around) else self._proven(shape, nearest)
        return self._make(shape, nearest, _numbers(nearest.point), nearest.point.shape, interpolated=False)

    def _interpolate(self, shape: LinearShape) -> Estimate:
        """The numbers between the 8 grid points around the shape: ln of each is linear in log2 of each axis.

        A shape outside the grid is moved to its border (times still scale with the work). Far from 1, a sweep measures
        a coarse grid alone. If one of the 8 points was not measured, those of a wider box stand in. The largest shapes
        of a grid are not measured at all. If one of them is among the 8 points, the next smaller m at which all were
        measured is used, unless the nearest point is nearer. The nearest point is also used if there is no such m, or
        if the shape itself was measured. In an incomplete table any of the 8 may be missing, so that there the point
        must be `_proven`.
        """
        nearest = self._nearest_point(shape)
        if nearest.distance > 0:
            on_m, on_k, on_n = self._grid
            m, around_m = on_m.bracket(shape.m)
            k, around_k = on_k.bracket(shape.k)
            n, around_n = on_n.bracket(shape.n)
            at_border = LinearShape(m, k, n)
            numbers = self._blend(around_m, around_k, around_n)
            if not numbers and not self.table.incomplete:
                numbers = self._blend_wider(at_border)
            if numbers:
                return self._make(shape, nearest, numbers, at_border, interpolated=True)
            inside = nearest.distance if at_border == shape else self._nearest_point(at_border).distance
            for at_m in reversed(on_m.sizes[: bisect_left(on_m.sizes, m)]):
                if math.log2(m / at_m) > inside + TIE_OCTAVES:
                    break
                if numbers := self._blend([(at_m, 1.0)], around_k, around_n):
                    return self._make(shape, nearest, numbers, LinearShape(at_m, k, n), interpolated=True)
            if not self._in_table(around_m, around_k, around_n):
                nearest = nearest._replace(outside=True)
            if self.table.incomplete:
                nearest = self._proven(shape, nearest)
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

    def _blend_wider(self, shape: LinearShape) -> list[float] | None:
        """The `_numbers` in the smallest box around a shape of the grid's range whose corners were all measured.

        Its sides are at most two steps of an axis, which is what a sweep leaves out where float8 is far from bf16.
        """
        sizes = (shape.m, shape.k, shape.n)
        box = self._measured_box(*(axis.cell(size) for axis, size in zip(self._grid, sizes, strict=True)))
        if not box:
            return None
        sides = zip(self._grid, sizes, box, strict=True)
        return self._blend(*(axis.weighted(size, indices) for axis, size, indices in sides))

    def _find_measured_box(self, *cells: int) -> tuple[tuple[int, ...], ...] | None:
        """The sides of that box, which is the same for all shapes of these cells. None if there is no such box."""
        sides = (axis.sides(cell) for axis, cell in zip(self._grid, cells, strict=True))
        for box in sorted(itertools.product(*sides), key=lambda box: sum(octaves for octaves, _ in box)):
            corners = ([axis.sizes[i] for i in indices] for axis, (_, indices) in zip(self._grid, box, strict=True))
            if all(corner in self._logs for corner in itertools.product(*corners)):
                return tuple(indices for _, indices in box)
        return None

    def _proven(self, shape: LinearShape, nearest: Nearest) -> Nearest:
        """What counts beside points that a stopped sweep did not come to: the nearest point, but no win of larger ones.

        Float8 gains more the larger a shape is, so the fastest of the points that are at most as large in every size
        is what the shape gains at least. If the nearest point is faster, that one stands for it; without one, nothing
        proves a win. Asked about the bundled models, random parts of the H200's tables so claim no win that the whole
        table denies (tests/test_incomplete_tables.py), where the nearest point claims one for up to 2 % of the shapes.
        """
        smaller = [p for p in self._with_numbers if p.m <= shape.m and p.k <= shape.k and p.n <= shape.n]
        if not smaller:
            return nearest._replace(is_proven=False, outside=True)
        best = max(smaller, key=_speedup)
        if _speedup(best) >= _speedup(nearest.point):
            return nearest
        away = (math.log2(shape.m / best.m), math.log2(shape.k / best.k), math.log2(shape.n / best.n))
        return nearest._replace(point=best, distance=math.hypot(*away))

    def _in_table(self, *around: Sequence[tuple[int, float]]) -> bool:
        """Whether every corner has a row in the table, with or without numbers. True if there are no corners."""
        sizes = ([size for size, _ in sides] for sides in around)
        return all(corner in self._points for corner in itertools.product(*sizes))

    def _make(
        self,
        shape: LinearShape,
        nearest: Nearest,
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
        trend = 1.0 if is_inside else self._trend(shape)
        return Estimate(
            speedup=speedup * (trend or 1.0),
            speedup_low=low * (trend or 1.0),
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
            trend=trend,
            from_tokens=from_tokens,
            is_proven=nearest.is_proven,
            bounds_cover="" if self.table.protocol.bounds else "within one run",
        )

    def _trend(self, shape: LinearShape) -> float | None:
        """The `trend` of an estimate: along each axis that the shape is outside of, that of the two outermost sizes."""
        sizes = (shape.m, shape.k, shape.n)
        falls = 0.0
        for i, (axis, size) in enumerate(zip(self._grid, sizes, strict=True)):
            if axis.sizes and axis.sizes[0] <= size <= axis.sizes[-1]:
                continue
            if len(axis.sizes) < 2:
                return None
            border, inner = axis.sizes[:2] if size < axis.sizes[0] else axis.sizes[:-3:-1]
            slope = self._slope(i, border, inner, sizes)
            if slope is None:
                return None
            falls += min(0.0, slope) * abs(math.log2(size / border))
        return math.exp(falls)

    def _slope(self, i: int, border: int, inner: int, sizes: Sizes) -> float | None:
        """By how much ln of the speedup rises per octave towards the border of axis `i`, at the shape's other sizes.

        Where the largest were not measured, at the most tokens for which both were. None if there are none.
        """
        inside = [axis.bracket(size)[0] for axis, size in zip(self._grid, sizes, strict=True)]
        fewer = [m for m in reversed(self._grid[0].sizes) if m < inside[0]]
        for tokens in [inside[0], *(fewer if i else [])]:
            ends = []
            for end in (border, inner):
                at = [tokens, *inside[1:]]
                at[i] = end
                around = [axis.bracket(size)[1] for axis, size in zip(self._grid, at, strict=True)]
                ends.append(self._blend(*around) or self._blend_wider(LinearShape(*at)))
            if ends[0] and ends[1]:
                return math.log(ends[0][0] / ends[1][0]) / abs(math.log2(border / inner))
        return None

    @cached_property
    def _with_numbers(self) -> list[Point]:
        return [self._points[at] for at in self._logs]

    def _outside(self, shape: LinearShape) -> bool:
        sizes = (shape.m, shape.k, shape.n)
        return any(not low <= size <= high for size, (low, high) in zip(sizes, self._range, strict=True))

    def _octaves_outside(self, shape: LinearShape) -> float:
        """Along the farthest axis."""
        sizes = zip((shape.m, shape.k, shape.n), self._range, strict=True)
        return max(math.log2(max(low / size, size / high, 1.0)) for size, (low, high) in sizes)


def _speedup(point: Point) -> float:
    assert point.speedup is not None, point
    return point.speedup


def _numbers(point: Point) -> list[float]:
    """The speedup, its bounds and the four times of a point that has numbers."""
    numbers = [x for x in point.numbers if x is not None]
    assert len(numbers) == 7, point
    return [*numbers[4:], *numbers[:4]]
