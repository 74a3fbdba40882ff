"""Which points of a grid are worth measuring: first a coarse grid, then the points near which float8 breaks even. Pure.

The decision hangs on the points whose speedup is about 1. Of those that are far from it, a quarter tells enough. Over
110 shapes off the grid, the tables of an NVIDIA H200 decide the same with 240 points as with all 407 (LOG.md,
2026-11-26; `python benchmarks/grid_density.py`).

In: the shapes of a grid, the speedups known so far. Out: the shapes to measure next.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence

from fp8gate.calibrate.grid.grid import grid_shapes
from fp8gate.filter.contract.recipes import RECIPES, Recipe
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.contract.table import Grid
from fp8gate.filter.decision.axis import Axis

LOWEST, HIGHEST = 0.8, 1.25
"""A point is measured if a recipe's speedup between the coarse points around it lies within."""

Speedups = Mapping[LinearShape, Mapping[Recipe, float]]
"""Of each shape that was tried, the speedup of each recipe that could be measured there."""


def coarse_sizes(sizes: Sequence[int]) -> tuple[int, ...]:
    """Every other size, beginning with the smallest, and the largest."""
    return tuple(sorted({*sizes[::2], *sizes[-1:]}))


class Refinement:
    """The points of a sweep: `first` is measured in any case, the others if they are `due`.

    wanted: what may be measured, in that order. A shape that is not on the grid belongs to `first`: somebody asked for
    it. So do those of `always`, which an earlier table has, and those beside a coarse point that is too large to be
    measured: nothing could stand in for them. first_of_any: what is in `first` whatever `always` has.
    """

    def __init__(self, grid: Grid, wanted: Sequence[LinearShape], always: Collection[LinearShape] = ()) -> None:
        self._axes = tuple(Axis(coarse_sizes(sizes)) for sizes in (grid.m, grid.k, grid.n))
        on_grid = set(grid_shapes(grid)).intersection(wanted)
        around = {shape: self._corners(shape) for shape in on_grid}
        surrounded = {
            shape: around[shape]
            for shape in wanted
            if shape in on_grid and len(around[shape]) > 1 and all(corner in on_grid for corner, _ in around[shape])
        }
        self._open = {shape: corners for shape, corners in surrounded.items() if shape not in always}
        self.first = [shape for shape in wanted if shape not in self._open]
        self.first_of_any = [shape for shape in wanted if shape not in surrounded]

    @property
    def undecided(self) -> int:
        """How many points may yet be due."""
        return len(self._open)

    def due(self, speedups: Speedups) -> list[LinearShape]:
        """The points that are now known to be worth measuring, each once.

        A point is decided as soon as all coarse points around it have been tried. Those without numbers say nothing;
        where none has any, the point is measured.
        """
        decided = [shape for shape, around in self._open.items() if all(corner in speedups for corner, _ in around)]
        return [shape for shape in decided if _is_near(self._open.pop(shape), speedups)]

    def _corners(self, shape: LinearShape) -> list[tuple[LinearShape, float]]:
        """The coarse points around, each with its weight in the interpolation, which is linear in log2 of each axis.

        Of a coarse point, itself.
        """
        sizes = (shape.m, shape.k, shape.n)
        around = [axis.bracket(size)[1] for axis, size in zip(self._axes, sizes, strict=True)]
        return [
            (LinearShape(m, k, n), by_m * by_k * by_n) for (m, by_m), (k, by_k), (n, by_n) in itertools.product(*around)
        ]


def _is_near(around: Sequence[tuple[LinearShape, float]], speedups: Speedups) -> bool:
    """Whether the speedup of some recipe between these points is about 1, or nothing is known there."""
    between = []
    for recipe in RECIPES:
        known = [(math.log(of[recipe]), weight) for corner, weight in around if recipe in (of := speedups[corner])]
        if known:
            between.append(math.exp(sum(log * weight for log, weight in known) / sum(weight for _, weight in known)))
    return not between or any(LOWEST < speedup < HIGHEST for speedup in between)
