"""A table's text -> its plain data. Points as fp8gate writes them are read 60 times faster than YAML.

Such points are rows, one a line, whose cells mean the same in YAML and in JSON; they become JSON, which msgspec reads.
All other texts are left to the YAML reader, so a table has one meaning, whichever way it is read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from fp8gate.filter.contract.plain_yaml import collections_paused, load_plain_yaml
from fp8gate.filter.contract.reading.yaml_data import MAX_CHARACTERS

FIRST_LINE = "schema: 1\n"
"""A text that begins with it is a mapping at the left margin. So a key at the margin, `points`, is one of its own."""
POINTS = "\npoints:\n"
DOCUMENT_END = "\n..."
_SIZE = r"[1-9]\d{0,11}"
_NUMBER = r"(?:(?:0|[1-9]\d{0,14})\.\d{1,17}|null)"
"""Numbers that YAML and JSON read alike. None is above MAX_NUMBER."""


class PointRows:
    """The rows of one kind of point: three sizes, some numbers, and a status.

    block_type: a Struct whose field `points` holds them. statuses: the words that may end a row. error: raised for a
    text that cannot be read; its message names the source and the field.
    """

    def __init__(
        self, block_type: type[Any], *, numbers: int, statuses: Sequence[str], error: type[ValueError]
    ) -> None:
        cells = ", ".join([_SIZE] * 3 + [_NUMBER] * numbers)
        self._row = re.compile(rf"^  - \[({cells}), ({'|'.join(statuses)})\]$", re.ASCII | re.MULTILINE)
        self._decoder = msgspec.json.Decoder(block_type)
        self._error = error

    def load(self, text: str, *, source: str) -> Any:
        """The text's plain data. `points` may already be points.

        Raises an error for a text that is not plain YAML, and for one that is too long for the YAML reader unless its
        points are rows.
        """
        data = self.load_rows(text, source=source)
        if data is not None:
            return data
        if len(text) > MAX_CHARACTERS:
            why = f"as the file has more than {MAX_CHARACTERS:,} characters"
            raise self._error(f"{source}: {self._complaint(text)}, {why}")
        return load_plain_yaml(text, source=source, error=self._error)

    def load_rows(self, text: str, *, source: str) -> dict[str, Any] | None:
        """The data that `load_plain_yaml` reads in the text, or None if its points are no rows.

        Raises an error only if `load_plain_yaml` raises one, or reads a point that is none. A header that does not end
        before the points, such as one with an open list, is an error in both: no row ends what is not its own.
        """
        parts = self._header_and_block(text)
        if parts is None:
            return None
        header, block = parts
        lines = block.removesuffix("\n").count("\n") + 1
        rows, count = self._row.subn(r'[\1,"\2"],', block)
        if count != lines:
            return None
        data: dict[str, Any] = load_plain_yaml(f"{header}\n", source=source, error=self._error)
        if "points" in data:
            raise self._error(f"{source}: not plain YAML data: key 'points' is there twice")
        return {**data, "points": self._decoded(rows, source)}

    def _header_and_block(self, text: str) -> tuple[str, str] | None:
        """What is before the line of `points`, and after it. None if the first part may be no mapping of its own."""
        header, found, block = text.partition(POINTS)
        if not found or not text.startswith(FIRST_LINE) or DOCUMENT_END in header:
            return None
        return header, block

    def _decoded(self, rows: str, source: str) -> Any:
        try:
            with collections_paused():
                return self._decoder.decode(f'{{"points":[{rows.rstrip()[:-1]}]}}').points
        except msgspec.ValidationError as cause:
            raise self._error(f"{source}: {cause}") from cause

    def _complaint(self, text: str) -> str:
        """What is not as fp8gate writes it: the header, or the first line of points that is no row."""
        parts = self._header_and_block(text)
        if parts is None:
            return f"expected the line {FIRST_LINE.strip()!r} first, and a line {POINTS.strip()!r} before all points"
        lines = re.finditer("^.*$", parts[1], re.MULTILINE)  # one after the other: a list of all could take 300 MB
        at = next((i for i, line in enumerate(lines) if not self._row.fullmatch(line[0])), 0)
        return f"$.points[{at}]: expected one line, such as '  - [16, 32, 48, 100.0, ..., measured]'"
