"""A table as plain text that fits the terminal. Pure, but for asking how wide the terminal is.

In: headers and rows. Out: lines in the style of tabulate's "simple" format, without colours. Where the table is too
wide, headers and long texts wrap; then long texts move to lines of their own beneath their row; then columns are dealt
out over several tables, each with the first column. Numbers are never wrapped, and nothing is cut off.

Try it: COLUMNS=60 fp8gate explain llama3-8b --recipe rowwise --tokens 8192 --device "NVIDIA H200"
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import sys
from collections.abc import Sequence
from typing import Literal

Align = Literal["left", "right"]

GAP = "  "
LEAST_WIDTH = 20
"""Characters: in narrower terminals lines are that long."""
NARROWEST = 16
"""Characters: narrower columns of text are harder to read than lines of their own beneath the row."""
WHOLE_NAME = 32
"""Characters: as long as the name of a linear in transformers; shorter names do not wrap."""
NUMBER = re.compile(r"[^A-Za-z]*\d[^A-Za-z]*x?")
"""A number with its unit or its bounds: 8192, +1.5%, 1.32x, (8192, 4096, 1024)."""
WORD = re.compile(r"\s*(?:\([\d, ]+\)\S*|\S+)\s*")
"""What stands between spaces; a shape is one word."""
BREAKS = re.compile(r"(?<=[\s./\\_,:-])(?=\S)")
"""A text may continue on the next line after a space, and after what joins the parts of a name or a path."""


def render_table(
    headers: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    align: Sequence[Align] | None = None,
    width: int | None = None,
) -> str:
    """The table as lines of at most `width` characters.

    align: of each column; by default numbers stand right and texts left. width: None means that of the terminal that
    standard output is, or COLUMNS if it is set; elsewhere (a pipe, a log) lines are as long as they need to be.
    """
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    chosen = list(align) if align is not None else [_usual_align(column) for column in _columns(headers, cells)]
    asked = width if width is not None else terminal_width()
    return _render(list(headers), cells, chosen, None if asked is None else max(asked, LEAST_WIDTH))


def terminal_width() -> int | None:
    """How many characters fit in a line of standard output; None if it is no terminal and COLUMNS is not set."""
    asked = os.environ.get("COLUMNS", "")
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def _render(headers: list[str], rows: list[list[str]], align: list[Align], width: int | None) -> str:
    columns = _columns(headers, rows)
    natural = [_natural_width(header, column) for header, column in zip(headers, columns, strict=True)]
    if width is None or _total(natural) <= width:
        return _lines(headers, rows, align, natural)
    least = [_least_width(header, column) for header, column in zip(headers, columns, strict=True)]
    below = _texts_to_move(columns, least, width)
    kept = [index for index in range(len(headers)) if index not in below]
    if _total([least[index] for index in kept]) > width and len(headers) > 2:
        return _render_in_parts(headers, rows, align, least, width)
    texts = [max(least[index], _natural_width("", columns[index])) for index in kept]
    widths = _shrink([natural[index] for index in kept], texts, width)  # headers wrap before texts do
    widths = _shrink(widths, [least[index] for index in kept], width)
    notes = [[(headers[index], row[index]) for index in below if row[index]] for row in rows]
    return _lines(
        [headers[index] for index in kept],
        [[row[index] for index in kept] for row in rows],
        [align[index] for index in kept],
        widths,
        [[line for header, text in note for line in _note(header, text, width)] for note in notes],
    )


def _render_in_parts(
    headers: list[str], rows: list[list[str]], align: list[Align], least: list[int], width: int
) -> str:
    """Several tables, each with the first column and as many of the others as fit."""
    parts: list[list[int]] = []
    for index in range(1, len(headers)):
        if parts and _total([least[one] for one in (*parts[-1], index)]) <= width:
            parts[-1].append(index)
        else:
            parts.append([0, index])
    return "\n\n".join(
        _render(
            [headers[index] for index in part],
            [[row[index] for index in part] for row in rows],
            [align[index] for index in part],
            width,
        )
        for part in parts
    )


def _texts_to_move(columns: list[list[str]], least: list[int], width: int) -> tuple[int, ...]:
    """The columns whose texts get lines of their own: as few as let the others fit, sentences before names.

    If the others never fit, it is all of them.
    """
    movable = [
        index for index in range(1, len(columns)) if least[index] >= NARROWEST and not _is_numbers(columns[index])
    ]
    movable.sort(key=lambda index: (_is_names(columns[index]), -sum(map(len, columns[index]))))
    chosen = (moved for count in range(len(movable) + 1) for moved in itertools.combinations(movable, count))
    for moved in chosen:
        if _total([size for index, size in enumerate(least) if index not in moved]) <= width:
            return tuple(sorted(moved))
    return tuple(movable)


def _shrink(natural: list[int], least: list[int], width: int) -> list[int]:
    """Make the widest column that may be narrower one narrower, until all fit."""
    widths = list(natural)
    while _total(widths) > width:
        shrinkable = [index for index, size in enumerate(widths) if size > least[index]]
        if not shrinkable:
            break
        widths[max(shrinkable, key=widths.__getitem__)] -= 1
    return widths


def _lines(
    headers: list[str],
    rows: list[list[str]],
    align: list[Align],
    widths: list[int],
    notes: list[list[str]] | None = None,
) -> str:
    lines = [*_row(headers, align, widths, bottom=True), GAP.join("-" * size for size in widths)]
    for row, below in zip(rows, notes or [[] for _ in rows], strict=True):
        lines += [*_row(row, align, widths), *below]
    return "\n".join(lines)


def _row(row: list[str], align: list[Align], widths: list[int], *, bottom: bool = False) -> list[str]:
    """The lines of one row. bottom: cells of fewer lines than others end with them, as headers do."""
    cells = [wrap(cell, size) for cell, size in zip(row, widths, strict=True)]
    height = max((len(cell) for cell in cells), default=0)
    padded = [[""] * (height - len(cell)) + cell if bottom else cell + [""] * (height - len(cell)) for cell in cells]
    return [GAP.join(map(_pad, line, widths, align)).rstrip() for line in zip(*padded, strict=True)]


def _note(header: str, text: str, width: int) -> list[str]:
    """A text beneath its row: "  reason: ...", its further lines further in."""
    first, *more = wrap(f"{header}: {text}", width - 2 * len(GAP))
    return [GAP + first, *(2 * GAP + line for line in more)]


def wrap(text: str, width: int) -> list[str]:
    """The text in lines of at most `width`, broken between words and parts of names; a number stays whole."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for part in _parts(paragraph, width):
            if line and _cell_len((line + part).rstrip()) > width:
                lines.append(line.rstrip())
                line = ""
            line += part
        lines.append(line.rstrip())
    return lines


def _parts(text: str, width: int) -> list[str]:
    """What stays together in a line: words, parts of names; what is longer than a line is cut to its width."""
    if NUMBER.fullmatch(text):
        return [text]
    parts: list[str] = []
    for word in WORD.findall(text):
        whole = NUMBER.fullmatch(word.strip()) or _cell_len(word.rstrip()) <= width
        for part in [word] if whole else BREAKS.split(word):
            parts += _chop(part, width) if not NUMBER.fullmatch(part.strip()) else [part]
    return parts


def _chop(part: str, width: int) -> list[str]:
    from rich.cells import chop_cells

    return chop_cells(part, width) if _cell_len(part.rstrip()) > width else [part]


def _natural_width(header: str, column: list[str]) -> int:
    return max(_cell_len(line) for cell in (header, *column) for line in cell.split("\n"))


def _least_width(header: str, column: list[str]) -> int:
    """The width of the longest number and of the longest word, up to where long texts and names wrap."""
    longest_text = WHOLE_NAME if _is_names(column) else NARROWEST
    texts = [cell for cell in column if not NUMBER.fullmatch(cell)]
    numbers = [_cell_len(cell) for cell in column if NUMBER.fullmatch(cell)]
    is_long = any(_natural_width("", [text]) > longest_text for text in texts)
    words = [min(_cell_len(word), longest_text) for text in texts for word in text.split()]
    headers = [_cell_len(word) for word in header.split()]
    return max([0, *headers, *numbers, *words, longest_text if is_long else 0])


def _usual_align(column: list[str]) -> Align:
    """Right for numbers, even if a word stands where there is none."""
    is_number = any(NUMBER.fullmatch(cell) for cell in column) and all(
        NUMBER.fullmatch(cell) or " " not in cell for cell in column
    )
    return "right" if is_number else "left"


def _is_numbers(column: list[str]) -> bool:
    return all(not cell or NUMBER.fullmatch(cell) for cell in column)


def _is_names(column: list[str]) -> bool:
    """Words without spaces, such as names of linears or paths."""
    return not any(" " in cell for cell in column)


def _pad(text: str, width: int, align: Align) -> str:
    space = " " * (width - _cell_len(text))
    return space + text if align == "right" else text + space


def _columns(headers: Sequence[str], rows: list[list[str]]) -> list[list[str]]:
    return [[row[index] for row in rows] for index in range(len(headers))]


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + len(GAP) * (len(widths) - 1)


def _cell_len(text: str) -> int:
    """How many characters wide a terminal draws the text: those of East Asian scripts take two."""
    from rich.cells import cell_len  # importing fp8gate and deciding need no rich

    return cell_len(text)
