"""The numbers of the maps as tables of text, which can be searched, copied and read aloud. Pure.

In: `SpeedupMap`s. Out: a `NumberTable` for each.
"""

from __future__ import annotations

from dataclasses import dataclass

from fp8gate.calibrate.report.speedup_map import SpeedupMap
from fp8gate.filter.decision.decide import DEFAULT_MIN_SPEEDUP


@dataclass(frozen=True, kw_only=True, slots=True)
class NumberCell:
    """What a map writes at one (k, n), if anything. wins: whether the speedup is one that the filter converts."""

    text: str = ""
    wins: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class NumberTable:
    """All numbers of one map. rows: a row of cells, one for each n, by k; the largest k first, as on the map."""

    m: int
    n: tuple[int, ...]
    rows: dict[int, tuple[NumberCell, ...]]


def number_table(map_: SpeedupMap) -> NumberTable:
    """The map's marks, as rows and columns."""
    cells = {
        (mark.k, mark.n): NumberCell(text=mark.text, wins=(mark.speedup or 0) >= DEFAULT_MIN_SPEEDUP)
        for mark in map_.marks
    }
    ks, ns = ({at[axis] for at in cells} for axis in (0, 1))
    n = tuple(sorted(ns))
    rows = {k: tuple(cells.get((k, at_n), NumberCell()) for at_n in n) for k in sorted(ks, reverse=True)}
    return NumberTable(m=map_.m, n=n, rows=rows)
