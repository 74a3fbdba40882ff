"""What a value in a file may be: a finite number below a maximum, or text that can be written again. Pure."""

from __future__ import annotations

from typing import Any

MAX_NUMBER = 2.0**63
"""No time, size or seed is larger: it is what 64 bits hold. A product of five such numbers is still a finite float."""
MAX_SIZE = 2**31 - 1
"""No dimension of a linear layer, and no count, is near it: it is what 32 bits hold."""
MAX_DIGITS = 40
"""Digits of an integer that are read; MAX_NUMBER has 19. Converting a million digits would take seconds."""

Path = tuple[Any, Any] | None
"""The path to a value: (the path to its parent, its key or index). It takes the same memory at any depth."""


def require_plain_values(data: Any, *, source: str, error: type[ValueError], on_one_line: bool) -> None:
    """Raise `error`, with the source and the field, for a number or a text that is out of bounds. data: no cycles.

    on_one_line: texts are printable and on one line, so that no name from a file moves the cursor of a terminal.
    """
    waiting: list[tuple[Any, Path]] = [(data, None)]
    while waiting:
        value, path = waiting.pop()
        if isinstance(value, dict):
            waiting.extend((child, (path, key)) for key, child in reversed(value.items()))
            waiting.extend((key, path) for key in value)
        elif isinstance(value, list):
            waiting.extend((child, (path, i)) for i, child in reversed(list(enumerate(value))))
        elif problem := _problem(value, on_one_line):
            raise error(f"{source}: {field_name(path)}: {problem}")


def field_name(path: Path) -> str:
    """The path as messages write it: "$.points[1][3]"."""
    steps = []
    while path is not None:
        path, step = path
        steps.append(f"[{step}]" if isinstance(step, int) else f".{step}")
    return "".join(["$", *reversed(steps)])


def _problem(value: Any, on_one_line: bool) -> str | None:
    if isinstance(value, (int, float)) and not abs(value) <= MAX_NUMBER:
        return f"expected a finite number, at most {MAX_NUMBER:.3g} either way; found {value:.3g}"
    if isinstance(value, str) and not _is_unicode(value):
        return f"expected Unicode text, found {value!r}"
    if on_one_line and isinstance(value, str) and not value.isprintable():
        return f"expected printable text on one line, found {value!r}"
    return None


def _is_unicode(text: str) -> bool:
    """Whether a file can hold the text: half of a surrogate pair, which an escape can produce, has no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
