"""What a table says about any shape: the nearest measured point, or what lies between the measured points.

In: a `Table` and a `LinearShape`. Out: an `Estimate`. Pure: no files, no torch.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from fp8gate.filter.shapes import LinearShape
from fp8gate.filter.table import WITH_NUMBERS, Point, Status, Table

LookupName = Literal["nearest", "interpolate"]
LOOKUPS: tuple[LookupName, ...] = get_args(LookupName)
DEFAULT_LOOKUP: LookupName = "interpolate"
"""Of 110 shapes off the grid, interpolation lost less than half of what the nearest point lost with every recipe: the
mean loss was 0.00, 0.00 and 0.07 % against 0.12, 0.28 and 0.25 % (measured on one NVIDIA H200, LOG.md)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """Forward + backward of one shape, from the table. Times in microseconds.

    point: the nearest measured point. distance: how far it is, in octaves (Euclidean, log2 per axis; 0 = exact,
    1 = one dimension twice as large). outside: the shape was not measured and lies outside the
    measured part of the grid (without a grid, outside all points).
    gap: the status of a still nearer point that has no numbers, or None.
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

    @property
    def bf16_us(self) -> float:
        return self.bf16_fwd_us + self.bf16_bwd_us

    @property
    def fp8_us(self) -> float:
        """bf16 time over the paired speedup: consistent with the decision, unlike a quotient of medians."""
        return self.bf16_us / self.speedup


class Lookup:
    """An index over one table. Building it is linear in the points; `__call__` is what a decision costs."""

    def __init__(self, table: Table, kind: LookupName = DEFAULT_LOOKUP) -> None:
        if kind not in LOOKUPS:
            raise ValueError(f"lookup: expected one of {', '.join(LOOKUPS)}; got {kind!r}")
        self.table = table
        self._estimate: Callable[[LinearShape], Estimate] = self._nearest if kind == "nearest" else self._interpolate
        self._measured = {p.shape: p for p in table.points if p.status in WITH_NUMBERS}
        self._everything = [(_log2(p.shape), p) for p in table.points]
        grid = table.grid
        on_grid = [s for s in self._measured if s.m in grid.m and s.k in grid.k and s.n in grid.n]
        self._range = _bounding_box(on_grid or self._measured)

    def __call__(self, shape: LinearShape) -> Estimate | None:
        """The estimate for `shape`, or None if the table holds no number at all."""
        return self._estimate(shape) if self._measured else None

    def _nearest(self, shape: LinearShape) -> Estimate:
        """The nearest point's speedup as it was measured; its times scaled with the work."""
        point, *_ = self._nearest_point(shape)
        return self._estimate_from(shape, _numbers(point), measured_at=point.shape, interpolated=False)

    def _interpolate(self, shape: LinearShape) -> Estimate:
        """ln of every number, linear in log2 of each axis between the 8 grid points around the shape.

        Outside the grid the shape is moved to its border (times still scale with the work). Where one of the 8 was
        not measured, as the largest are not, fewer tokens stand in: the next m below at which all were. Without any,
        and where the shape itself was measured, this is the nearest point.
        """
        if shape in self._measured:
            return self._nearest(shape)
        inside = self._clamp(shape)
        fewer_tokens = (m for m in reversed(self.table.grid.m) if m < inside.m)
        for m in (inside.m, *fewer_tokens):
            at = LinearShape(m, inside.k, inside.n)
            if corners := self._corners(at):
                numbers = [0.0] * 7
                for point, weight in corners:
                    numbers = [t + weight * math.log(x) for t, x in zip(numbers, _numbers(point), strict=True)]
                return self._estimate_from(shape, list(map(math.exp, numbers)), measured_at=at, interpolated=True)
        return self._nearest(shape)

    def _estimate_from(
        self, shape: LinearShape, numbers: Sequence[float], *, measured_at: LinearShape, interpolated: bool
    ) -> Estimate:
        """An estimate for `shape` from the `_numbers` known at `measured_at`."""
        speedup, low, high, *times_us = numbers
        work = shape.flop / measured_at.flop
        bf16_fwd_us, bf16_bwd_us, fp8_fwd_us, fp8_bwd_us = (time_us * work for time_us in times_us)
        point, distance, gap = self._nearest_point(shape)
        return Estimate(
            speedup=speedup,
            speedup_low=low,
            speedup_high=high,
            bf16_fwd_us=bf16_fwd_us,
            bf16_bwd_us=bf16_bwd_us,
            fp8_fwd_us=fp8_fwd_us,
            fp8_bwd_us=fp8_bwd_us,
            point=point,
            distance=distance,
            outside=self._outside(shape),
            gap=gap,
            interpolated=interpolated,
        )

    def _nearest_point(self, shape: LinearShape) -> tuple[Point, float, Status | None]:
        """The nearest point with numbers, its distance, and the status of a nearer one without.

        Ties go to the lower speedup: converting a layer that loses costs more than leaving one that wins.
        """
        exact = self._measured.get(shape)
        if exact is not None:
            return exact, 0.0, None
        at = _log2(shape)
        # rounded, so that equal distances stay equal whatever the order of their sums
        ranked = [(round(math.dist(at, where), 9), p) for where, p in self._everything]
        distance, point = min(
            ((d, p) for d, p in ranked if p.speedup is not None),
            key=lambda dp: (dp[0], dp[1].speedup, dp[1].shape),
        )
        nearer = [(d, p) for d, p in ranked if p.speedup is None and d < distance]
        gap = min(nearer, key=lambda dp: (dp[0], dp[1].shape))[1].status if nearer else None
        return point, distance, gap

    def _corners(self, shape: LinearShape) -> list[tuple[Point, float]] | None:
        """The measured grid points around a shape with their weights, or None where one was not measured."""
        grid = self.table.grid
        sides = [_bracket(size, axis) for size, axis in zip(_sizes(shape), (grid.m, grid.k, grid.n), strict=True)]
        corners = []
        for (m, wm), (k, wk), (n, wn) in itertools.product(*sides):
            point = self._measured.get(LinearShape(m, k, n))
            if point is None:
                return None
            corners.append((point, wm * wk * wn))
        return corners or None

    def _clamp(self, shape: LinearShape) -> LinearShape:
        grid = self.table.grid
        axes = zip(_sizes(shape), (grid.m, grid.k, grid.n), strict=True)
        return LinearShape(*(min(max(size, axis[0]), axis[-1]) if axis else size for size, axis in axes))

    def _outside(self, shape: LinearShape) -> bool:
        return shape not in self._measured and any(
            not low <= size <= high for size, (low, high) in zip(_sizes(shape), self._range, strict=True)
        )


def _sizes(shape: LinearShape) -> tuple[int, int, int]:
    return shape.m, shape.k, shape.n


def _log2(shape: LinearShape) -> tuple[float, ...]:
    return tuple(map(math.log2, _sizes(shape)))


def _bounding_box(shapes: Iterable[LinearShape]) -> list[tuple[int, int]]:
    return [(min(axis), max(axis)) for axis in zip(*map(_sizes, shapes), strict=True)]


def _bracket(size: int, axis: tuple[int, ...]) -> list[tuple[int, float]]:
    """The axis values around a size, each with its weight in log2 space; one value if it is on the axis."""
    if size in axis:
        return [(size, 1.0)]
    i = bisect_right(axis, size)
    if not 0 < i < len(axis):
        return []
    low, high = axis[i - 1], axis[i]
    share = math.log2(size / low) / math.log2(high / low)
    return [(low, 1.0 - share), (high, share)]


def _numbers(point: Point) -> list[float]:
    """Speedup, its bounds, then the four times, of a point that has them."""
    numbers = [x for x in point.numbers if x is not None]
    assert len(numbers) == 7, point
    return [*numbers[4:], *numbers[:4]]
