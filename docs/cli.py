"""Write docs/cli.md: every command's --help, in lines of one length on any terminal.

Run it: make docs
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer.main

from fp8gate.cli import app

PATH = Path(__file__).with_name("cli.md")
WIDTH = 110
INTRODUCTION = """# Commands

Written by `make docs` from `fp8gate COMMAND --help`.

| exit code | meaning |
|---|---|
| 0 | fine |
| 1 | findings; or it cannot tell; or stopped before the end, for which standard error says why |
| 2 | usage or bad input |
| 130 | Ctrl-C |

With `--json`, standard output holds one JSON object; progress and messages go to standard error.
"""


def markdown() -> str:
    """A section for each command, in the order of `fp8gate --help`."""
    group: Any = typer.main.get_command(app)
    commands = {"fp8gate": group, **{f"fp8gate {name}": command for name, command in group.commands.items()}}
    sections = [_section(name, command) for name, command in commands.items()]
    return "\n".join([INTRODUCTION, *sections])


def _section(name: str, command: Any) -> str:
    with command.make_context(name, [], resilient_parsing=True, terminal_width=WIDTH) as context:
        lines = [line.rstrip() for line in command.get_help(context).splitlines()]
    return f"## {name}\n\n```text\n" + "\n".join(lines) + "\n```\n"


if __name__ == "__main__":
    PATH.write_text(markdown())
