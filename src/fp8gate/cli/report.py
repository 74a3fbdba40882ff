"""`fp8gate report`: draw tables.

Try it: fp8gate report thresholds/nvidia-h200 --out report
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from fp8gate.cli.options import require
from fp8gate.filter.contract.table import TableError
from fp8gate.filter.locate.find_table import table_files

DRAWING_PACKAGES = ("jinja2", "matplotlib", "numpy", "PIL")
OUT = Path("report")


def report_command(
    tables: Annotated[
        list[Path], typer.Argument(help="Tables of one device, or its folder, such as thresholds/nvidia-h200.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for index.html and its pictures.")] = OUT,
) -> None:
    """Draw tables: one HTML page to look at, question and pass on, and its pictures as PNG files.

    The page begins with the verdict: for each bundled model and recipe what to convert, and how many milliseconds that
    saves, from measured plans where there are any. Then come maps of the speedup over k and n for each recipe and
    number of tokens, with the lines where the filter and torchao's fixed rule begin to convert; the same numbers as
    text; the models layer by layer; what measured it all, and how far the numbers can be trusted. Recipes of one device
    stand side by side: give all its tables at once. The page needs no network and nothing beside it, fits narrow
    screens, and follows the browser's dark or light mode; so do the pictures, which come in both. Needs no GPU.

    For example: fp8gate report thresholds/nvidia-h200 --out report

    Exit code 2 if a table cannot be read, if two are of one device and recipe, if a folder holds several devices, or if
    --out cannot be written.
    """
    require("report", DRAWING_PACKAGES)
    from fp8gate.calibrate.report.page.write_page import write_report

    files = [file for location in tables for file in _files_of_one_device(location, out)]
    for path in write_report(files, out):
        typer.echo(f"wrote {path}")


def _files_of_one_device(location: Path, out: Path) -> list[Path]:
    """The tables of a location. Raises TableError if they lie in several devices' folders."""
    files = table_files(location)
    folders = list(dict.fromkeys(file.parent for file in files))
    if len(folders) > 1:
        to = [] if out == OUT else ["--out", str(out)]
        commands = "; ".join(shlex.join(["fp8gate", "report", str(folder), *to]) for folder in folders)
        raise TableError(
            f"{location}: expected the tables of one device, found {', '.join(folder.name for folder in folders)}; "
            f"draw one of them: {commands}"
        )
    return files
