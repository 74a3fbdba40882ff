"""What to say of a table whose sweep was stopped: how far it came, what completes it, and where a complete one lies.

In: a table and its file. Out: a sentence, or nothing for a complete table.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.contract.table import Table, TableError, read_table
from fp8gate.filter.locate.places import default_out, places


def incomplete_remark(table: Table, path: Path) -> str | None:
    """How far the table's sweep came, and the commands that complete it. None for a complete table.

    The table tells its grid, but not which single shapes were asked for beside it.
    """
    if table.incomplete is None:
        return None
    again, grid = completing_command(table, path), table.grid
    by_grid = f"; or, for its grid alone: {again} --recipes {table.recipe} --grid {shlex.quote(str(path))}"
    return (
        f"{path} is incomplete, its sweep was stopped after {table.incomplete}; to complete it, run on "
        f"{table.device.name} with the options that it was begun with: {again}"
        + (by_grid if grid.m and grid.k and grid.n else "")
    )


def completing_command(table: Table, path: Path) -> str:
    """`fp8gate calibrate`, with the casts if they are not Inductor's, and the folder if it writes elsewhere by itself.

    The grid is the user's to repeat.
    """
    return f"fp8gate calibrate{table.variant.option}{out_option(path.absolute().parent.parent)}"


def out_option(folder: Path) -> str:
    """ " --out FOLDER", or nothing if a command writes there by itself."""
    try:
        is_told = os.path.realpath(folder) != os.path.realpath(default_out())
    except InputError:  # FP8GATE_THRESHOLDS names a table or its folder: nothing is written without --out
        is_told = True
    return f" --out {shlex.quote(str(folder))}" if is_told else ""


def complete_table_elsewhere(path: Path) -> Path | None:
    """The first complete table of the same device and recipe in one of the other places, which come later."""
    for place in places():
        other = place.path / path.parent.name / path.name
        if os.path.isfile(other) and not os.path.samefile(other, path) and _is_complete(other):
            return other
    return None


def _is_complete(path: Path) -> bool:
    """A file that cannot be used is no better than one that is incomplete."""
    try:
        return read_table(path).incomplete is None
    except TableError:
        return False
