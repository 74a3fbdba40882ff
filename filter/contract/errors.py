"""The errors that a user sees: each carries the exit code of a command that ends with it.

`fp8gate.cli` turns them into one line on standard error; nothing else has to catch them.
"""

from __future__ import annotations

EXIT_FOUND = 1
"""A command found something, or ended before it was done."""
EXIT_USAGE = 2
"""What was asked for, or a file that it needs, is wrong."""
EXIT_INTERRUPTED = 130
"""Ctrl-C, as shells report it: 128 + SIGINT."""


class InputError(ValueError):
    """An argument or a file that cannot be used; the message names it and says what was expected."""

    exit_code = EXIT_USAGE
    on_command_line: str | None = None
    """What a command says in place of the message, if that gives advice to a caller in Python."""


class UnfinishedError(RuntimeError):
    """Not everything could be measured; the message says why, and what to do next."""

    exit_code = EXIT_FOUND
