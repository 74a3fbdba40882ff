"""Tokens that are no multiple of 128: where they are measured, and the factor that a table states for them. Pure.

A grid has multiples of 128 only. Between them, float8 is slower in the recipes that multiply over the tokens in float8:
speedups that are interpolated are 6 % (NVIDIA H200) and 8 % (NVIDIA H100) too high in the median, and those of
rowwise_with_gw_hp 1 and 4 % (`python benchmarks/unaligned_tokens.py`; LOG.md, 2026-11-26).

In: the speedups of a grid's points. Out: the shapes to measure with fewer tokens; then the factor.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Mapping
from statistics import median

import msgspec

from fp8gate.calibrate.grid.refinement import HIGHEST, LOWEST
from fp8gate.filter.contract.bounds import Unaligned
from fp8gate.filter.contract.recipes import Recipe
from fp8gate.filter.contract.shapes import FLOAT8_MULTIPLE, LinearShape

FEWER = FLOAT8_MULTIPLE
"""The tokens left out: the fewest that leave a shape which float8 can compute."""
LEAST_POINTS = 5
"""Of fewer, no factor is stated. Speedups of single shapes scatter by 4 % around it."""
MAX_SHARE = 0.05
"""For each recipe, of a grid's points. Small grids, such as quick, take no such points: a sweep must not take much
longer for them."""
DIGITS = 4


def with_fewer_tokens(shape: LinearShape) -> LinearShape:
    return msgspec.structs.replace(shape, m=shape.m - FEWER)


def unaligned_shapes(
    speedups: Mapping[Recipe, Mapping[LinearShape, float]],
    measured: Collection[LinearShape],
    *,
    count: int,
    seed: int,
) -> list[LinearShape]:
    """The shapes to measure: for each recipe, `count` random points near which it breaks even, with fewer tokens.

    measured: shapes that are being measured or were, which count. Recipes share points where they can.
    """
    order = sorted({shape for by_shape in speedups.values() for shape in by_shape if shape.is_aligned})
    random.Random(seed).shuffle(order)
    chosen: list[LinearShape] = []
    for by_shape in speedups.values():
        near = [with_fewer_tokens(shape) for shape in order if shape in by_shape and _is_near(by_shape[shape])]
        missing = [shape for shape in near if shape not in measured and shape not in chosen]
        chosen += missing[: max(0, count - (len(near) - len(missing)))]
    return chosen


def unaligned_factor(
    speedups: Mapping[LinearShape, float], with_fewer: Mapping[LinearShape, float]
) -> Unaligned | None:
    """What a recipe's speedup near break-even is multiplied by. None where too few points tell.

    speedups: of the grid. with_fewer: of shapes that were measured with fewer tokens.
    """
    factors = [
        with_fewer[fewer] / speedup
        for shape, speedup in speedups.items()
        if shape.is_aligned and _is_near(speedup) and (fewer := with_fewer_tokens(shape)) in with_fewer
    ]
    if len(factors) < LEAST_POINTS:
        return None
    return Unaligned(points=len(factors), factor=round(median(factors), DIGITS))


def _is_near(speedup: float) -> bool:
    return LOWEST < speedup < HIGHEST
