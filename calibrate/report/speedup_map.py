"""What a table says over K x N for one M, ready to be drawn. Pure.

In: a `Table`. Out: a `SpeedupMap` for each M: what the default lookup answers everywhere, which points were measured or
have no number, and which sizes torchao's rule converts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fp8gate.calibrate.grid.grid import too_large
from fp8gate.filter.contract.recipes import Recipe, Variant
from fp8gate.filter.contract.shapes import FLOAT8_MULTIPLE, LinearShape
from fp8gate.filter.contract.table import WITH_NUMBERS, Point, Status, Table, TableError
from fp8gate.filter.decision.estimate import Estimate
from fp8gate.filter.decision.lookup import Lookup
from fp8gate.filter.decision.torchao_rule import torchao_converts

MARGIN = 0.5  # octaves beyond the outermost points, so that the text at these points is on the map
SAMPLES = 8  # per octave: interpolation between the points is bilinear, so lines are exact except at their corners
CAPPED, UNMEASURED = "cap", "-"
SHORT = {"out_of_memory": "oom", "unstable": "unst", "failed": "fail"}
"""How the maps write a status without numbers. Others are written as they are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """The text at one (k, n): "1.31", "1.00?" if ambiguous, or why there is no speedup: its status, cap, -.

    cap and - stand where the table has no row for a shape of the grid: cap if a sweep leaves the shape out as too
    large, - if it was not measured: a sweep leaves out points far from break-even, or nobody asked for it.
    """

    k: int
    n: int
    text: str
    speedup: float | None = None

    @property
    def short(self) -> str:
        """Only what needs attention: "?", or why a shape that was tried, or is too large, has no speedup."""
        if self.speedup is None:
            return "" if self.text == UNMEASURED else self.text
        return "?" if self.text.endswith("?") else ""


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeedupMap:
    """One table at one m. k, n: the sizes of the samples. log2_speedup, stands_in and torchao are indexed by [k, n].

    stands_in: whether the points around a sample were not measured, so that fewer tokens or the nearest point answer.
    torchao: whether torchao's rule converts, None if it has no rule. k_ticks, n_ticks: the sizes that were measured.
    """

    variant: Variant
    m: int
    k: npt.NDArray[np.float64]
    n: npt.NDArray[np.float64]
    log2_speedup: npt.NDArray[np.float64]
    stands_in: npt.NDArray[np.bool_]
    torchao: npt.NDArray[np.bool_] | None
    marks: tuple[Mark, ...]
    k_ticks: tuple[int, ...]
    n_ticks: tuple[int, ...]


def map_tokens(table: Table) -> tuple[int, ...]:
    """The m that have a map: those of the grid, or those of all points if the table states no grid."""
    return table.grid.m or tuple(sorted({point.m for point in table.points}))


def speedup_maps(table: Table) -> dict[int, SpeedupMap]:
    """A map for each of `map_tokens`, all over the same K x N. Raises TableError for a table without any number."""
    if all(point.status not in WITH_NUMBERS for point in table.points):
        raise TableError(f"{table.variant} on {table.device.name}: $.points: expected a measured point, found none")
    k_ticks = table.grid.k or tuple(sorted({point.k for point in table.points}))
    n_ticks = table.grid.n or tuple(sorted({point.n for point in table.points}))
    k, n = samples([*k_ticks, *(p.k for p in table.points)]), samples([*n_ticks, *(p.n for p in table.points)])
    lookup, torchao = Lookup(table), _torchao(table.recipe, k, n)
    maps = {}
    for m in map_tokens(table):
        estimates = [[_estimate(lookup, m, at_k, at_n) for at_n in n] for at_k in k]
        maps[m] = SpeedupMap(
            variant=table.variant,
            m=m,
            k=k,
            n=n,
            log2_speedup=np.array([[math.log2(estimate.speedup) for estimate in row] for row in estimates]),
            stands_in=np.array([[_stands_in(estimate) for estimate in row] for row in estimates]),
            torchao=torchao,
            marks=tuple(_marks(table, m)),
            k_ticks=k_ticks,
            n_ticks=n_ticks,
        )
    return maps


def samples(sizes: Iterable[int]) -> npt.NDArray[np.float64]:
    """Sizes evenly spaced in log2, from MARGIN below the smallest to MARGIN above the largest."""
    sizes = set(sizes)
    low, high = math.log2(min(sizes)) - MARGIN, math.log2(max(sizes)) + MARGIN
    return np.asarray(2 ** np.linspace(low, high, round((high - low) * SAMPLES) + 1), dtype=np.float64)


def without_row(table: Table, m: int) -> dict[tuple[int, int], str]:
    """The (k, n) of the grid that have no row at this m, each with CAPPED or UNMEASURED.

    Empty if m itself is not one of the grid's.
    """
    known = {(point.k, point.n) for point in table.points if point.m == m}
    holes = [(k, n) for k in table.grid.k for n in table.grid.n if m in table.grid.m and (k, n) not in known]
    return {
        (k, n): CAPPED if too_large(LinearShape(m, k, n), table.device, on_grid=True) else UNMEASURED for k, n in holes
    }


def _marks(table: Table, m: int) -> Iterable[Mark]:
    for point in table.points:
        if point.m == m:
            yield Mark(k=point.k, n=point.n, text=_text(point), speedup=point.speedup)
    for (k, n), why in without_row(table, m).items():
        yield Mark(k=k, n=n, text=why)


def short_status(status: Status) -> str:
    """A status without numbers, as the maps write it."""
    return SHORT.get(status, status.replace("_", " "))


def _text(point: Point) -> str:
    if point.speedup is None:
        return short_status(point.status)
    return f"{point.speedup:.2f}{'?' if point.status == 'ambiguous' else ''}"


def _estimate(lookup: Lookup, m: int, k: float, n: float) -> Estimate:
    estimate = lookup(LinearShape(m, round(k), round(n)))
    assert estimate, "a table with numbers answers everywhere"
    return estimate


def _stands_in(estimate: Estimate) -> bool:
    return estimate.distance > 0 and (estimate.from_tokens is not None or not estimate.interpolated)


def _torchao(recipe: Recipe, k: Iterable[float], n: Iterable[float]) -> npt.NDArray[np.bool_] | None:
    """What the rule answers for the nearest sizes that float8 can compute. None if torchao has no rule."""
    answers = [
        [torchao_converts(recipe, in_features=_multiple(at_k), out_features=_multiple(at_n)) for at_n in n]
        for at_k in k
    ]
    return None if answers[0][0] is None else np.array(answers, dtype=np.bool_)


def _multiple(size: float) -> int:
    return max(1, round(size / FLOAT8_MULTIPLE)) * FLOAT8_MULTIPLE
