"""Distances between sizes, in octaves: along one dimension of a table, and of items in order. Pure."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from functools import cache
from operator import itemgetter
from typing import TypeVar

T = TypeVar("T")
DISTANCE_DIGITS = 9  # to which squared distances in octaves are rounded, so that equal ones compare as equal


class Axis:
    """The sizes along one dimension, ascending, and the distances between them in octaves."""

    def __init__(self, sizes: Iterable[int]) -> None:
        self.sizes = sorted(set(sizes))
        self._log2 = [(math.log2(size), size) for size in self.sizes]
        self.bracket = cache(self._bracket)  # a model's layers share their tokens and most of their sizes
        self.sides = cache(self._sides)
        self.nearest = cache(self._nearest)

    def _bracket(self, size: int) -> tuple[int, list[tuple[int, float]]]:
        """The size, moved to the border if it is outside of the axis, and the axis' sizes on both sides of it."""
        inside = min(max(size, self.sizes[0]), self.sizes[-1]) if self.sizes else size
        return inside, self._around(inside)

    def _around(self, size: int) -> list[tuple[int, float]]:
        """The sizes on both sides with their weights in log2. A single one if the size is on the axis; none outside."""
        i = bisect_right(self._log2, (math.log2(size), size))
        if i and self.sizes[i - 1] == size:
            return [(size, 1.0)]
        if not 0 < i < len(self.sizes):
            return []
        return self._between(i - 1, i, size)

    def cell(self, size: int) -> int:
        """2 i + 1 at the axis' i-th size, counted from 0, and 2 i between that one and the one before."""
        return bisect_left(self.sizes, size) + bisect_right(self.sizes, size)

    def _sides(self, cell: int) -> list[tuple[float, tuple[int, ...]]]:
        """Indices of the sizes that `bracket` gives in a cell, and of those two steps apart, with octaves between."""
        i, is_size = divmod(cell, 2)
        found: list[tuple[float, tuple[int, ...]]] = []
        if is_size:
            found.append((0.0, (i,)))
        elif 0 < i < len(self.sizes):
            found.append((math.log2(self.sizes[i] / self.sizes[i - 1]), (i - 1, i)))
        for low in range(len(self.sizes) - 2):
            if 2 * low + 1 < cell < 2 * low + 5:
                found.append((self._log2[low + 2][0] - self._log2[low][0], (low, low + 2)))
        return found

    def weighted(self, size: int, sides: tuple[int, ...]) -> list[tuple[int, float]]:
        """The sizes of these indices with the weights of a size between them, or of the only one."""
        return self._between(*sides, size) if len(sides) == 2 else [(self.sizes[sides[0]], 1.0)]

    def _between(self, low: int, high: int, size: int) -> list[tuple[int, float]]:
        """Two sizes, by their index, with the weights of a size between them."""
        (low_log2, below), (high_log2, above) = self._log2[low], self._log2[high]
        share = (math.log2(size) - low_log2) / (high_log2 - low_log2)
        return [(below, 1.0 - share), (above, share)]

    def _nearest(self, size: int) -> tuple[int, float]:
        """The nearest size with its squared distance. The size is 0 if two are equally near."""
        at = math.log2(size)
        i = bisect_right(self._log2, (at, size))
        sides = [((log2 - at) ** 2, other) for log2, other in self._log2[max(i - 1, 0) : i + 1]]
        if len(sides) == 2 and round(sides[0][0] - sides[1][0], DISTANCE_DIGITS) == 0:
            return 0, 0.0
        away, other = min(sides)
        return other, away


def nearest_first(items: Sequence[tuple[float, T]], at: float) -> list[tuple[float, T]]:
    """Items, each behind its place in octaves, by their squared distance from `at`."""
    return sorted((((place - at) ** 2, item) for place, item in items), key=itemgetter(0))
