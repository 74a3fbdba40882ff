"""Distances between sizes, in octaves: along one dimension of a table, and of items in order. Pure."""

from __future__ import annotations

import math
from bisect import bisect_right
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
        self.wider_brackets = cache(self._wider_brackets)
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

    def _wider_brackets(self, size: int) -> list[tuple[float, list[tuple[int, float]]]]:
        """What `bracket` gives, and sizes on both sides that are two steps apart, each with its width in octaves."""
        _, around = self._bracket(size)
        found = [(0.0 if len(around) < 2 else math.log2(around[1][0] / around[0][0]), around)] if around else []
        for i in range(len(self.sizes) - 2):
            if self.sizes[i] < size < self.sizes[i + 2]:
                found.append((self._log2[i + 2][0] - self._log2[i][0], self._between(i, i + 2, size)))
        return found

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
