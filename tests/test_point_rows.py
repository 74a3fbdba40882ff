"""A table's points are read by rows or by YAML: two ways, one meaning."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from builders import make_point, make_table
from edited_files import NUMBERS, TRICKS, WORDS, boundaries, edited
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8gate.filter.contract.plain_yaml import convert, load_plain_yaml
from fp8gate.filter.contract.table import POINT_ROWS, Table, TableError, format_table

few = settings(max_examples=60, deadline=None)
TABLE = format_table(
    make_table(make_point(16, 32, 48, 0.5), make_point(16, 32, 64, 2.0), make_point(32, 32, 48, status="failed"))
)
HEADER = TABLE[: TABLE.index("  - [")]


def table_of(read: Callable[[], Any]) -> Table | None:
    """The table that the data is, or None if reading it or its fields ends in an error."""
    try:
        return convert(read(), Table, source="FILE.yaml", error=TableError)
    except TableError:
        return None


def assert_same_meaning(text: str) -> bool:
    """Whether rows were read. If so, or if they ended in an error, the YAML reader must say the same."""
    with contextlib.suppress(TableError):
        if POINT_ROWS.load_rows(text, source="FILE.yaml") is None:
            return False
    by_rows = table_of(lambda: POINT_ROWS.load_rows(text, source="FILE.yaml"))
    assert by_rows == table_of(lambda: load_plain_yaml(text, source="FILE.yaml", error=TableError))
    return by_rows is not None


@pytest.mark.parametrize("text", [*NUMBERS, *WORDS])
@pytest.mark.parametrize(
    ("row", "taken"),
    [
        ("  - [{}, 32, 48, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, measured]", {"9" * 12, "4"}),
        (
            "  - [16, 32, 48, {}, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, measured]",
            {"0.0", "9" * 15 + ".0", "0." + "1" * 17, "null"},
        ),
        ("  - [16, 32, 48, null, null, null, null, null, null, null, {}]", {"failed"}),
    ],
)
def test_a_cell_that_fp8gate_would_not_write_is_left_to_the_yaml_reader(text, row, taken):
    table = f"{HEADER}{row.format(text)}\n"
    try:
        assert (POINT_ROWS.load_rows(table, source="FILE.yaml") is not None) == (text in taken)
    except TableError:  # a size above 32 bits, a time of 0
        assert text in taken
    assert_same_meaning(table)


@settings(max_examples=200, deadline=None)
@given(edited(TABLE))
def test_rows_mean_what_yaml_says(text):
    assert_same_meaning(text)


@pytest.mark.slow
@pytest.mark.parametrize("trick", TRICKS)
def test_rows_mean_what_yaml_says_with_a_trick_at_every_boundary(trick):
    for at in boundaries(TABLE):
        assert_same_meaning(TABLE[:at] + trick + TABLE[at:])


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[1] / "thresholds").glob("*/*.yaml")), ids=str)
def test_committed_rows_mean_what_yaml_says(path):
    assert assert_same_meaning(path.read_text())


@few
@given(st.from_regex(r"(0|[1-9][0-9]{0,14})\.[0-9]{1,17}", fullmatch=True))
def test_numbers_of_rows_are_those_of_yaml(number):
    text = TABLE.replace("100.0, 200.0, 200.0", f"{number}, 200.0, 200.0")
    try:
        rows = POINT_ROWS.load_rows(text, source="FILE.yaml")
    except TableError as error:
        assert float(number) == 0, error  # noqa: PT017 - a time is above 0
        return
    assert rows
    assert rows["points"][0].bf16_fwd_us == float(number) == yaml.safe_load(number)
