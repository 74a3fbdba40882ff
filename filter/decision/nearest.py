"""The measured point that is nearest to a shape. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cached_property
from typing import NamedTuple

from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.contract.table import Point, Status
from fp8gate.filter.decision.axis import DISTANCE_DIGITS, Axis, nearest_first

Sizes = tuple[int, int, int]


class Nearest(NamedTuple):
    """The nearest measured point. See `Estimate` for the fields."""

    point: Point
    distance: float
    gap: Status | None
    outside: bool = False
    is_proven: bool = True


class NearestPoint:
    """Finds the point nearest to a shape. Building it takes time linear in the points, as does the slowest call."""

    def __init__(self, points: Iterable[Point]) -> None:
        self._points: dict[Sizes, Point] = {(p.m, p.k, p.n): p for p in points}
        self._everywhere = tuple(Axis(sizes) for sizes in zip(*self._points, strict=True))

    def __call__(self, shape: LinearShape) -> Nearest:
        """The nearest point with numbers, and the status of a nearer point without numbers.

        Of equally near points, the one with the lower speedup counts: converting a layer that loses costs more than
        leaving one that wins.
        """
        at = (shape.m, shape.k, shape.n)
        if self._has_numbers(at):
            return Nearest(self._points[at], 0.0, None)
        on_m, on_k, on_n = self._everywhere
        m, m_away = on_m.nearest(shape.m)
        k, k_away = on_k.nearest(shape.k)
        n, n_away = on_n.nearest(shape.n)
        if self._has_numbers((m, k, n)):  # nearest on every axis, so no point is nearer
            return Nearest(self._points[m, k, n], math.sqrt(m_away + k_away + n_away), None)
        return self._search(at)

    def _search(self, at: Sizes) -> Nearest:
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
        return Nearest(self._points[best[2]], math.sqrt(best[0]), self._points[gap[1]].status if gap else None)

    def _has_numbers(self, at: Sizes) -> bool:
        return at in self._points and self._points[at].speedup is not None

    @cached_property
    def _by_m(self) -> list[tuple[float, list[tuple[float, list[tuple[float, Point]]]]]]:
        """All points by log2 of m, then k, then n. Built for the first shape that needs a search."""
        sizes: dict[int, dict[int, list[tuple[float, Point]]]] = {}
        for point in self._points.values():
            sizes.setdefault(point.m, {}).setdefault(point.k, []).append((math.log2(point.n), point))
        return [(math.log2(m), [(math.log2(k), by_n) for k, by_n in by_k.items()]) for m, by_k in sizes.items()]
