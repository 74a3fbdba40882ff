"""From a journal to the tables, and what may replace a table that is there.

In: a journal's records, a folder. Out: `<folder>/<recipe>.yaml`, all or none of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from fp8gate.calibrate.points.point_record import PointRecord
from fp8gate.calibrate.sweep.grid import union
from fp8gate.calibrate.sweep.journal import Journal, Setup
from fp8gate.calibrate.sweep.spread import between_devices, devices_of
from fp8gate.calibrate.sweep.sweep_report import control_spread, spread
from fp8gate.filter.contract.recipes import Recipe
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.contract.table import WITH_NUMBERS, Grid, Table, read_table, write_table


def make_table(grid: Grid, recipe: Recipe, setup: Setup, records: Sequence[PointRecord]) -> Table:
    """A recipe's table from a journal's records; where a shape was measured twice, the last with numbers counts.

    `measured_at` is that of its newest record, so that the same measurements give the same file. Repeats only go into
    the protocol's spread.
    """
    latest: dict[LinearShape, PointRecord] = {}
    for record in (r for r in records if recipe in r.arms and not r.repeat):
        if record.shape not in latest or record.status(recipe) == "measured":
            latest[record.shape] = record
    protocol = setup.protocols[recipe]
    return Table(
        recipe=recipe,
        device=setup.device,
        software=setup.software,
        protocol=msgspec.structs.replace(
            protocol,
            spread=spread(recipe, protocol, records),
            controls=control_spread(protocol, latest.values()),
            devices=len(devices_of(records)),
            between=between_devices(recipe, protocol, records),
        ),
        measured_at=max(r.measured_at for r in latest.values()),
        grid=grid,
        points=tuple(latest[shape].point(recipe, protocol) for shape in sorted(latest)),
    )


def require_nothing_lost(
    folder: Path, recipes: Sequence[Recipe], wanted: Sequence[LinearShape], records: Sequence[PointRecord]
) -> None:
    """A small sweep must not replace a large table: raise ValueError before measuring, not after."""
    for recipe in recipes:
        path = folder / f"{recipe}.yaml"
        if path.exists():
            kept = {*wanted, *(record.shape for record in records if recipe in record.arms)}
            lost = sum(point.shape not in kept for point in read_table(path).points)
            if lost:
                raise ValueError(
                    f"{path}: {lost} of its points are not in this sweep and would be lost; "
                    "give another --out, or --fresh to replace the table"
                )


def write_tables(
    folder: Path, grid: Grid, recipes: Sequence[Recipe], journal: Journal, fresh: bool
) -> dict[Path, Table]:
    """Write everything the journal holds for each recipe: a later, smaller sweep adds to a table.

    Raises ValueError, and writes none, if points of an earlier table would lose their numbers, unless fresh: then
    something is broken, and rarely the hardware.
    """
    tables = {}
    for recipe in recipes:
        path = folder / f"{recipe}.yaml"
        table = make_table(grid, recipe, journal.setup, journal.records)
        if path.exists() and not fresh:
            _require_no_number_lost(table, read_table(path), path, journal.records)
        tables[path] = table if fresh else _with_earlier_axes(table, path)
    for path, table in tables.items():
        write_table(table, path)
    return tables


def _require_no_number_lost(table: Table, earlier: Table, path: Path, records: Sequence[PointRecord]) -> None:
    had = {p.shape for p in earlier.points if p.status in WITH_NUMBERS}
    lost = [p.shape for p in table.points if p.status not in WITH_NUMBERS and p.shape in had]
    if not lost:
        return
    last = [record for record in records if record.shape == lost[0] and table.recipe in record.arms][-1]
    details = (last.arms[arm].detail.split("\n")[0] for arm in ("bf16", table.recipe))
    raise ValueError(
        f"{path}: {len(lost)} of its points would lose their numbers; {lost[0]} {last.status(table.recipe)}: "
        f"{next(filter(None, details), 'no reason given')}; to measure again when this is mended, or to replace the "
        "table all the same: --fresh"
    )


def _with_earlier_axes(table: Table, path: Path) -> Table:
    """State the axes of the table being replaced too, where their points are in the new one."""
    if not path.exists():
        return table
    earlier, shapes = read_table(path), {point.shape for point in table.points}
    if not shapes.issuperset(point.shape for point in earlier.points):
        return table
    return msgspec.structs.replace(table, grid=union(earlier.grid, table.grid))
