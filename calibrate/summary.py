"""What a sweep found, for people: speedups by K x N for each M."""

from __future__ import annotations

import pandas as pd
from tabulate import tabulate

from fp8gate.filter.table import Point, Table


def summarize(table: Table) -> str:
    """One table of speedups for each m, rows k and columns n; where there is no number, its reason."""
    frame = pd.DataFrame({"m": p.m, "k": p.k, "n": p.n, "speedup": _cell(p)} for p in table.points)
    blocks = []
    for m, rows in frame.groupby("m"):
        cells = rows.pivot(index="k", columns="n", values="speedup").fillna("")
        text = tabulate(cells, headers=["k \\ n", *map(str, cells.columns)], disable_numparse=True, stralign="right")
        blocks.append(f"{table.recipe} speedup, {m} tokens\n{text}")
    return "\n\n".join(blocks)


def _cell(point: Point) -> str:
    if point.speedup is None:
        return point.status
    return f"{point.speedup:.2f}{'?' if point.status == 'ambiguous' else ''}"
