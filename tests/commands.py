"""fp8gate's commands as messages and documents write them."""

from __future__ import annotations

import re
import shlex
from typing import Any

from typer.main import get_command

from fp8gate.cli import app

COMMANDS: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]
_NAMED = re.compile(r"(?<![\w./-])(?=fp8gate [a-z])")
_END = re.compile(r";|,(?= |$)|\.(?= |$)")


def parse(command: str) -> dict[str, Any]:
    """What a command asks for, by the names of its options. An error if it does not exist or cannot be parsed."""
    program, name, *arguments = shlex.split(command)
    assert program == "fp8gate", command
    params: dict[str, Any] = COMMANDS[name].make_context(name, arguments).params
    return params


def commands_in(message: str) -> list[str]:
    """The commands of a message: each goes on to the next, to a mark behind a word, or to the end."""
    return [_END.split(text)[0].strip() for text in _NAMED.split(message)[1:]]
