"""What a sweep found: for people, speedups over K x N for each M; for programs, the files and how the sweep went."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pandas as pd

from fp8gate.filter.contract.table import Point, Table
from fp8gate.filter.terminal_table import render_table

if TYPE_CHECKING:
    from fp8gate.calibrate.sweep.run_sweep import SweepResult


def summarize(table: Table) -> str:
    """A table of speedups for each m, with k down and n across. A point without a number shows why it has none."""
    frame = pd.DataFrame({"m": p.m, "k": p.k, "n": p.n, "speedup": _cell(p)} for p in table.points)
    blocks = []
    for m, rows in frame.groupby("m"):
        cells = rows.pivot(index="k", columns="n", values="speedup").fillna("")
        headers = ["k \\ n", *map(str, cells.columns)]
        text = render_table(headers, list(cells.itertuples()), align=["right"] * len(headers))
        blocks.append(f"{table.variant} speedup, {m} tokens\n{text}")
    return "\n\n".join(blocks)


def sweep_json(result: SweepResult) -> dict[str, Any]:
    """The tables that were written, by file name; the report; and the points that are left, left out, or were off."""
    return {
        "tables": _tables_json(result.tables),
        "incomplete": _tables_json(result.incomplete),
        "report": msgspec.to_builtins(result.report),
        "remaining": result.remaining,
        "capped": {str(shape): why for shape, why in sorted(result.capped.items())},
        "off": {str(shape): error for shape, error in sorted(result.off.items())},
    }


def _tables_json(tables: Mapping[Path, Table]) -> dict[str, Any]:
    return {
        table.variant.name: {"path": str(path), "points": Counter(point.status for point in table.points)}
        for path, table in tables.items()
    }


def _cell(point: Point) -> str:
    if point.speedup is None:
        return point.status
    return f"{point.speedup:.2f}{'?' if point.status == 'ambiguous' else ''}"
