"""`fp8gate diff`: say what changed between two tables.

Try it: fp8gate diff benchmarks/data/nvidia-h200-second-sweep thresholds/nvidia-h200
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fp8gate.cli.options import JsonOption, MinSpeedupOption, print_json
from fp8gate.filter.contract.errors import EXIT_FOUND
from fp8gate.filter.decision.decide import DEFAULT_MIN_SPEEDUP


def diff_command(
    before: Annotated[Path, typer.Argument(help="A table, or a folder of tables such as thresholds/nvidia-h200.")],
    after: Annotated[Path, typer.Argument(help="The same, measured later, elsewhere or with other software.")],
    min_speedup: MinSpeedupOption = DEFAULT_MIN_SPEEDUP,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown, for a pull request.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Say what changed between two tables, and what it means for models.

    Exit code 1 if points changed by more than two honest sweeps do, if all have shifted, or if numbers were lost. Exit
    code 1 too if it cannot tell: if a change of all speedups by 10 %, or of half of the points by 25 % each, would not
    show, as measurements of one point differ so much or too few are in both. 0 if not; 2 if something cannot be read.
    """
    from fp8gate.calibrate.comparison.diff import compare_paths
    from fp8gate.calibrate.report.comparison_text import comparison_json, comparison_text

    comparisons = compare_paths(before, after, min_speedup=min_speedup)
    if as_json:
        print_json({"comparisons": [comparison_json(comparison) for comparison in comparisons]})
    else:
        typer.echo(comparison_text(comparisons, "markdown" if markdown else "text"))
    if any(comparison.has_findings or not comparison.can_tell for comparison in comparisons):
        raise typer.Exit(EXIT_FOUND)
