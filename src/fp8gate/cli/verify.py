"""`fp8gate verify`: measure a sample of the committed tables again.

Try it: fp8gate verify --tables thresholds
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fp8gate.cli.options import (
    DeviceOption,
    JsonOption,
    MinSpeedupOption,
    TablesOption,
    WorkersOption,
    print_json,
    require,
    start_measuring,
)
from fp8gate.filter.contract.errors import EXIT_FOUND
from fp8gate.filter.decision.decide import DEFAULT_MIN_SPEEDUP
from fp8gate.filter.locate.places import is_searched, places

if TYPE_CHECKING:
    from fp8gate.calibrate.comparison.verify import Verification


def verify_command(
    tables: TablesOption = None,
    points: Annotated[int, typer.Option(min=8, help="How many of their points to measure again.")] = 24,
    device: DeviceOption = None,
    workers: WorkersOption = None,
    min_speedup: MinSpeedupOption = DEFAULT_MIN_SPEEDUP,
    files_only: Annotated[
        bool, typer.Option("--files", help="Only read and check the files. Needs neither a device nor torch.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure a sample of the committed tables again and say whether they still hold here.

    Every table under the folder is read and checked. Those of this device are measured again at some points, spread
    over all sizes; if there are none, only the files are checked.

    Exit code 1 if they do not hold, or if the device cannot be measured. Exit code 1 too if it cannot tell: if a change
    of all speedups by 10 %, or of half of the points by 25 % each, would not show, as measurements of one point differ
    so much. Then the last line is the command to run next.
    """
    location = tables or places()[0].path
    if files_only:
        _check_files(location, as_json)
        return
    require("verify")
    start_measuring(device, workers)
    from fp8gate.calibrate.comparison.verify import verify
    from fp8gate.calibrate.device.registry import choose_device
    from fp8gate.calibrate.report.comparison_text import verification_json, verification_text

    found = verify(location, choose_device(device), points=points, min_speedup=min_speedup, workers=workers)
    next_step = _next_step(found, tables, points)
    if as_json:
        print_json({**verification_json(found), "next": next_step})
    else:
        typer.echo(verification_text(found) + (f"\n\nnext: {next_step}" if next_step else ""))
    if found.has_findings or not found.can_tell:
        raise typer.Exit(EXIT_FOUND)


def _check_files(location: Path, as_json: bool) -> None:
    from fp8gate.calibrate.comparison.table_paths import incomplete_of, read_all
    from fp8gate.calibrate.report.comparison_text import files_text, incomplete_json

    tables, plans = read_all(location)
    incomplete = incomplete_of(tables)
    if as_json:
        files = {"files": [*map(str, tables)], "plans": [*map(str, plans)]}
        print_json({"measured": False, **files, "incomplete": incomplete_json(plans, incomplete)})
    else:
        typer.echo(files_text(tables, plans, incomplete))


def _next_step(found: Verification, tables: Path | None, points: int) -> str | None:
    """The command that cures what was found: tables that do not hold, or too few points to tell."""
    if contradicted := found.contradicted:
        first, grid = next(iter(contradicted.items()))
        out = grid.absolute().parent.parent
        recipes = [variant.recipe for variant in contradicted if variant.casts == first.casts]
        options = ["--fresh", "--grid", str(grid), "--recipes", ",".join(recipes), *first.option.split()]
        return shlex.join(["fp8gate", "calibrate", *options, *([] if is_searched(out) else ["--out", str(out)])])
    if not found.can_tell:
        where = ["--tables", str(tables)] if tables else []
        return shlex.join(["fp8gate", "verify", *where, *(["--points", str(2 * points)] if found.has_more else [])])
    return None
