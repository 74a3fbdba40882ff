"""From a journal's records to the tables, and what a new table may replace.

In: a journal, a folder. Out: the tables in the folder, either for all recipes or for none; of a stopped sweep, for
each recipe that has a number, marked as incomplete.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from fp8gate.calibrate.device.kind import NoiseLimits
from fp8gate.calibrate.device.registry import KINDS
from fp8gate.calibrate.grid.grid import union
from fp8gate.calibrate.grid.unaligned import unaligned_factor
from fp8gate.calibrate.points.noise import TOO_MANY, Row, calm, judge, judge_with_bounds
from fp8gate.calibrate.points.point_record import CONTROL, PointRecord
from fp8gate.calibrate.points.setup import Setup
from fp8gate.calibrate.sweep.journal import SweepJournal
from fp8gate.calibrate.sweep.spread import (
    between_devices,
    control_spread,
    devices_of,
    repeat_spread,
    repeated_speedups,
)
from fp8gate.filter.contract import table as contract
from fp8gate.filter.contract.devices import require_own_file
from fp8gate.filter.contract.errors import InputError, UnfinishedError
from fp8gate.filter.contract.recipes import Recipe
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.contract.table import WITH_NUMBERS, Grid, Incomplete, Table, TableError, read_table


class TooNoisyError(UnfinishedError):
    """So much of what was measured is noise that it must not replace what was known before."""


def rows_of(recipe: Recipe, setup: Setup, records: Sequence[PointRecord]) -> dict[LinearShape, Row]:
    """The rows of a recipe's table, sorted by shape, each with why it is noise if it is."""
    return judge(records, recipe, setup.protocols[recipe], _limits(setup))


def make_table(grid: Grid, recipe: Recipe, setup: Setup, records: Sequence[PointRecord]) -> Table:
    """A recipe's table from a journal's records. What counts of several records of a shape, `judge` says.

    `measured_at` is that of the newest record, so that the same measurements give the same file. Repeats only go into
    the protocol's spread, into the bounds and into the factor for unaligned tokens. `estimate` is set here and not in
    the set-up, as it says what was made of the samples, not how they were taken: samples of an older journal give a
    table like any other.
    """
    firsts = [record for record in records if recipe in record.arms and not record.repeat]
    controlled = {record.shape: record for record in firsts if CONTROL in record.arms}
    protocol = setup.protocols[recipe]
    rows, bounds = judge_with_bounds(records, recipe, protocol, _limits(setup))
    speedups = {shape: row.point.speedup for shape, row in rows.items() if row.point.speedup}
    undisturbed = calm(records, _limits(setup))
    return Table(
        recipe=recipe,
        device=setup.device,
        software=setup.software,
        protocol=msgspec.structs.replace(
            protocol,
            spread=repeat_spread(recipe, protocol, undisturbed),
            controls=control_spread(protocol, controlled.values()),
            devices=len(devices_of(records)),
            between=between_devices(recipe, protocol, records),
            estimate="quotient_of_times",
            bounds=bounds,
            unaligned=unaligned_factor(speedups, repeated_speedups(recipe, protocol, undisturbed)),
        ),
        measured_at=max(record.measured_at for record in firsts),
        grid=grid,
        points=tuple(row.point for row in rows.values()),
    )


def _limits(setup: Setup) -> NoiseLimits:
    return KINDS[setup.device.kind].defaults.noise


def is_to_be_replaced(path: Path, recipe: Recipe, journal: SweepJournal) -> bool:
    """Whether the fresh start of a journal is to replace the table that is there.

    Not one that came later, of another set-up or merged: nobody has asked for its points to be lost.
    """
    if recipe not in journal.replaces:
        return False
    begun = min((record.measured_at for record in journal.records), default=None)
    return begun is None or read_table(path).measured_at <= begun


def require_nothing_lost(
    folder: Path, recipes: Sequence[Recipe], wanted: Sequence[LinearShape], journal: SweepJournal
) -> None:
    """Raise InputError, before anything is measured, if a table that is kept has points that this sweep has not.

    A small sweep must not replace a large table.
    """
    for recipe in recipes:
        path = folder / journal.setup.variant(recipe).file
        if path.exists() and not is_to_be_replaced(path, recipe, journal):
            rows = {record.shape for record in journal.records if recipe in record.arms and not record.repeat}
            kept = {*wanted, *rows}
            lost = sum(point.shape not in kept for point in read_table(path).points)
            if lost:
                raise InputError(
                    f"{path}: {lost} of its points are not in this sweep and would be lost; "
                    "give another --out, or --fresh to replace the table"
                )


def require_same_device(folder: Path, recipes: Sequence[Recipe], setup: Setup) -> None:
    """Raise InputError, before anything is measured, if a table that is there is of a device of another name."""
    for path in (folder / setup.variant(recipe).file for recipe in recipes):
        with contextlib.suppress(TableError):  # one that cannot be read is dealt with where its points matter
            if path.exists():
                require_own_file(path, read_table(path).device.name, setup.device.name)


def write_tables(
    folder: Path, grid: Grid, recipes: Sequence[Recipe], journal: SweepJournal, fresh: bool
) -> dict[Path, Table]:
    """Write everything that the journal holds for each recipe, so that a later, smaller sweep adds to a table.

    Raises InputError, and writes no table, if points of an earlier table would lose their numbers: then something is
    broken, and rarely the hardware. Raises TooNoisyError if too many of them would lose theirs to noise. With `fresh`
    the earlier tables are replaced whatever they hold, as with a journal that was begun so.
    """
    tables = {}
    for recipe in recipes:
        path = folder / journal.setup.variant(recipe).file
        table = make_table(grid, recipe, journal.setup, journal.records)
        if path.exists() and not fresh and not is_to_be_replaced(path, recipe, journal):
            earlier = read_table(path)
            _require_no_number_lost(table, earlier, path, journal.records)
            _require_little_noise(table, earlier, path)
            table = _with_earlier_axes(table, path)
        tables[path] = table
    contract.write_tables(tables)
    return tables


@dataclass(frozen=True, slots=True)
class IncompleteTables:
    """written: by file. withheld: why there is none, or why an earlier one was kept, by file."""

    written: Mapping[Path, Table]
    withheld: Mapping[Path, str]


def write_incomplete_tables(
    folder: Path, grid: Grid, recipes: Sequence[Recipe], journal: SweepJournal, incomplete: Incomplete, fresh: bool
) -> IncompleteTables:
    """Write what a stopped sweep has measured for each recipe that has a number: one answers its own shape already.

    A complete table is never replaced by an incomplete one, whatever `fresh` says, and neither is an incomplete one
    in which more points were timed.
    """
    records, tables, withheld = tuple(journal.records), {}, {}
    for recipe in recipes:
        path = folder / journal.setup.variant(recipe).file
        if not any(row.point.speedup for row in rows_of(recipe, journal.setup, records).values()):
            withheld[path] = "is not written: no point has a number yet"
            continue
        table = msgspec.structs.replace(make_table(grid, recipe, journal.setup, records), incomplete=incomplete)
        if reason := _why_kept(path, table, fresh):
            withheld[path] = f"is kept: {reason}"
        else:
            tables[path] = table if fresh else _with_earlier_axes(table, path)
    contract.write_tables(tables)
    return IncompleteTables(tables, withheld)


def _why_kept(path: Path, table: Table, fresh: bool) -> str | None:
    """Why the table that is there is better than an incomplete one; None if there is none, or a worse one."""
    if not path.exists():
        return None
    try:
        earlier = read_table(path)
    except TableError as error:
        return None if fresh else f"it cannot be read ({error})"
    if earlier.incomplete is None:
        return "it is complete"
    had, has = (sum(point.status in (*WITH_NUMBERS, "noisy") for point in one.points) for one in (earlier, table))
    return f"it has {had} points that were timed, this sweep {has}" if had > has else None


def _require_no_number_lost(table: Table, earlier: Table, path: Path, records: Sequence[PointRecord]) -> None:
    had = {p.shape for p in earlier.points if p.status in WITH_NUMBERS}
    lost = [p.shape for p in table.points if p.status not in (*WITH_NUMBERS, "noisy") and p.shape in had]
    if not lost:
        return
    last = [record for record in records if record.shape == lost[0] and table.recipe in record.arms][-1]
    details = (last.arms[arm].detail.split("\n")[0] for arm in ("bf16", table.recipe))
    raise InputError(
        f"{path}: {len(lost)} of its points would lose their numbers; {lost[0]} {last.status(table.recipe)}: "
        f"{next(filter(None, details), 'no reason given')}; to measure again when this is mended, or to replace the "
        "table all the same: --fresh"
    )


def _require_little_noise(table: Table, earlier: Table, path: Path) -> None:
    """A table of numbers must not be replaced by one of noise, as a busy host gives it.

    The numbers of an incomplete table may be: they were not looked at twice yet.
    """
    if earlier.incomplete:
        return
    had = {p.shape for p in earlier.points if p.status in WITH_NUMBERS}
    lost = [p for p in table.points if p.status == "noisy" and p.shape in had]
    if len(lost) > TOO_MANY * len(had):
        raise TooNoisyError(
            f"{path} is kept: {len(lost)} of its {len(had)} points would lose their numbers to noise; run the same "
            "command when nothing else runs here: it measures these again; or replace the table all the same: --fresh"
        )


def _with_earlier_axes(table: Table, path: Path) -> Table:
    """The table, with the axes of the one that it replaces added to its grid if it has all the points of that one."""
    if not path.exists():
        return table
    earlier, shapes = read_table(path), {point.shape for point in table.points}
    if not shapes.issuperset(point.shape for point in earlier.points):
        return table
    return msgspec.structs.replace(table, grid=union(earlier.grid, table.grid))
