"""`fp8gate breakdown`: say where the time of one linear goes.

Try it: fp8gate breakdown 8192 4096 14336 --recipe rowwise
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fp8gate.cli.options import CastsOption, DeviceOption, JsonOption, print_json, require, say_if_untested
from fp8gate.filter.contract.errors import EXIT_FOUND
from fp8gate.filter.contract.recipes import Recipe, Variant
from fp8gate.filter.contract.shapes import LinearShape


def breakdown_command(
    m: Annotated[int, typer.Argument(min=1, help="Tokens: the rows of the input.")],
    k: Annotated[int, typer.Argument(min=1, help="in_features.")],
    n: Annotated[int, typer.Argument(min=1, help="out_features.")],
    recipe: Annotated[Recipe, typer.Option(help="The float8 recipe to set against bf16.")],
    casts: CastsOption = "inductor",
    device: DeviceOption = None,
    png: Annotated[Path | None, typer.Option(help="Write a picture to this file.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Say where the time of one linear goes, kernel by kernel, and so why float8 wins or loses.

    The kernels are those of the graphs that a sweep times, by torch.profiler; on a CPU, the ops of eager calls. Exit
    code 1 if they do not sum to the timing within 5 %.
    """
    require("breakdown")
    say_if_untested()
    from fp8gate.calibrate.breakdown.take_apart import break_down
    from fp8gate.calibrate.device.registry import choose_device
    from fp8gate.calibrate.report.breakdown_text import breakdown_json, breakdown_text

    found = break_down(LinearShape(m, k, n), Variant(recipe, casts), choose_device(device))
    if as_json:
        print_json(breakdown_json(found))
    else:
        typer.echo(breakdown_text(found))
    if png:
        from fp8gate.calibrate.report.breakdown_figure import write_png

        write_png(found, png)
    if found.has_findings:
        raise typer.Exit(EXIT_FOUND)
