"""The text of an error about a file: one line of bounded length, whatever the file holds."""

from __future__ import annotations

from fp8gate.filter.contract.errors import InputError

MAX_MESSAGE = 1000
"""Characters of a message. It leaves room for a long path and for the names of a table's eleven columns, twice."""
MAX_END = 400
"""Characters that are kept of a longer message's end, where msgspec names the field."""


class FileError(InputError):
    """A file that cannot be used. Its message is one line, however long and strange the file's content and name are."""

    def __init__(self, message: str, *, on_command_line: str | None = None) -> None:
        super().__init__(one_line(message))
        self.on_command_line = on_command_line and one_line(on_command_line)


def one_line(text: str) -> str:
    """The text without its middle if it is too long. Line breaks and control characters are escaped."""
    return _shortened(_escaped(_shortened(text)))


def _shortened(text: str) -> str:
    if len(text) <= MAX_MESSAGE:
        return text
    return f"{text[: MAX_MESSAGE - MAX_END - 5]} ... {text[-MAX_END:]}"


def _escaped(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
