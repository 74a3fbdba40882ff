"""`fp8gate merge`: make one table of several.

Try it: fp8gate merge monday/rowwise.yaml tuesday/rowwise.yaml --out rowwise.yaml
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from fp8gate.cli.options import JsonOption, print_json
from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.contract.table import read_table, write_table


def merge_command(
    tables: Annotated[list[Path], typer.Argument(help="Tables of one recipe, device, software and protocol.")],
    out: Annotated[Path, typer.Option(help="File to write; not one of the tables.")],
    as_json: JsonOption = False,
) -> None:
    """Make one table of several: sweeps of several days, or of a job array.

    Points that several tables have are combined by their bounds, which widen where the tables disagree; where they
    disagree too far, the point is noisy and has no numbers. The order of the tables does not matter. What differs in
    recipe, device, software or protocol is refused. Merge what was measured, not what was merged before: a table that
    goes in twice counts twice. With an incomplete table, of a sweep that was stopped, the merged one is incomplete.
    """
    from fp8gate.calibrate.comparison.merge import merge_tables

    if out.resolve() in [path.resolve() for path in tables]:
        raise InputError(f"--out: expected another file than the tables, which would count again next time; got {out}")
    if len({path.resolve() for path in tables}) < len(tables):
        raise InputError(f"tables: expected each table once; got {', '.join(map(str, tables))}")
    read = {path: read_table(path) for path in tables}
    merged = merge_tables({str(path): table for path, table in read.items()})
    write_table(merged, out)
    noisy = sum(point.status == "noisy" for point in merged.points)
    if as_json:
        counts = {"points": len(merged.points), "noisy": noisy, "tables": len(tables)}
        print_json({"table": str(out), **counts, "incomplete": msgspec.to_builtins(merged.incomplete)})
    else:
        doubt = f", {noisy} of them noisy" if noisy else ""
        typer.echo(f"wrote {out}: {len(merged.points)} points of {len(tables)} tables{doubt}")
        for path, table in read.items():
            if table.incomplete:
                typer.echo(f"incomplete, as {path} is, with {table.incomplete}: complete that one and merge again")
