"""The command `fp8gate doctor`."""

from __future__ import annotations

import typer

from fp8gate.cli.doctor.checkup import check_up
from fp8gate.cli.doctor.next_steps import problems
from fp8gate.cli.doctor.text import checkup_json, checkup_text
from fp8gate.cli.options import JsonOption, print_json
from fp8gate.filter.contract.errors import EXIT_FOUND


def doctor_command(as_json: JsonOption = False) -> None:
    """Say what is here, which tables and plans the filter would find, and what to run next. Needs no GPU, nor torch.

    For a bug report: its output says most of what is asked. Exit code 0 if all is well, 1 if something is to be done.
    """
    checkup = check_up()
    if as_json:
        print_json(checkup_json(checkup))
    else:
        typer.echo(checkup_text(checkup))
    if problems(checkup):
        raise typer.Exit(EXIT_FOUND)
