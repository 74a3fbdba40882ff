"""`fp8gate verify`: measure a sample of the committed tables again.

Try it: fp8gate verify --tables thresholds
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fp8gate.cli.options import (
    DeviceOption,
    JsonOption,
    MinSpeedupOption,
    WorkersOption,
    print_json,
    require,
    start_measuring,
)
from fp8gate.filter.contract.errors import EXIT_FOUND
from fp8gate.filter.decision.decide import DEFAULT_MIN_SPEEDUP


def verify_command(
    tables: Annotated[Path, typer.Option(help="Folder of tables.")] = Path("thresholds"),
    points: Annotated[int, typer.Option(min=8, help="How many of their points to measure again.")] = 24,
    device: DeviceOption = None,
    workers: WorkersOption = None,
    min_speedup: MinSpeedupOption = DEFAULT_MIN_SPEEDUP,
    as_json: JsonOption = False,
) -> None:
    """Measure a sample of the committed tables again and say whether they still hold here.

    Every table under the folder is read and checked. Those of this device are measured again at some points, spread
    over all sizes; if there are none, only the files are checked.

    Exit code 1 if they do not hold, or if the device cannot be measured. Exit code 1 too if it cannot tell: if a change
    of all speedups by 10 %, or of half of the points by 25 % each, would not show, as measurements of one point differ
    so much.
    """
    require("verify")
    start_measuring(device, workers)
    from fp8gate.calibrate.comparison.verify import verify
    from fp8gate.calibrate.device.registry import choose_device
    from fp8gate.calibrate.report.comparison_text import verification_json, verification_text

    found = verify(tables, choose_device(device), points=points, min_speedup=min_speedup, workers=workers)
    if as_json:
        print_json(verification_json(found))
    else:
        typer.echo(verification_text(found))
    if found.has_findings or not found.can_tell:
        raise typer.Exit(EXIT_FOUND)
