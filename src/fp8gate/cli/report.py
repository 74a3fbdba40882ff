"""`fp8gate report`: draw tables.

Try it: fp8gate report thresholds/nvidia-h200 --out report
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fp8gate.cli.options import require

DRAWING_PACKAGES = ("jinja2", "matplotlib", "numpy", "PIL")


def report_command(
    tables: Annotated[list[Path], typer.Argument(help="Tables, or folders of tables such as thresholds/nvidia-h200.")],
    out: Annotated[Path, typer.Option(help="Folder for index.html and its pictures.")] = Path("report"),
) -> None:
    """Draw tables: one HTML page to look at, question and pass on, and its pictures as PNG files.

    For each device: maps of the speedup over k and n for each recipe and number of tokens, where float8 begins to win,
    where torchao's fixed rule begins to convert, which points are ambiguous or have no number, where the layers of
    the bundled models lie, what measured it all, and how far the numbers can be trusted. Recipes of one device stand
    side by side: give all its tables at once. The page needs no network and nothing beside it, and follows the
    browser's dark or light mode; so do the pictures, which come in both. Needs no GPU.

    For example: fp8gate report thresholds/nvidia-h200 --out report

    Exit code 2 if a table cannot be read, if two are of one device and recipe, or if --out cannot be written.
    """
    require("report", DRAWING_PACKAGES)
    from fp8gate.calibrate.report.page import write_report

    for path in write_report(tables, out):
        typer.echo(f"wrote {path}")
