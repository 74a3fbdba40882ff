"""`fp8gate merge`: files in, a file out, and what is wrong in one line."""

from __future__ import annotations

import json

import pytest
from builders import make_point, make_table, write_file
from typer.testing import CliRunner

from fp8gate.cli import app
from fp8gate.filter.contract.table import read_table


@pytest.fixture
def merge(tmp_path):
    def run(*args):
        return CliRunner().invoke(app, ["merge", *map(str, args)])

    return run


def test_points_of_both_files_are_written(merge, tmp_path):
    one = write_file(make_table(make_point(16, 32, 48)), tmp_path / "a.yaml")
    other = write_file(make_table(make_point(16, 32, 64)), tmp_path / "b.yaml")
    both = tmp_path / "c.yaml"
    result = merge(one, other, "--out", both)
    assert (result.exit_code, result.stdout) == (0, f"wrote {both}: 2 points of 2 tables\n")
    assert [point.n for point in read_table(both).points] == [48, 64]


def test_a_program_is_told_where_the_table_is(merge, tmp_path):
    one = write_file(make_table(make_point(16, 32, 48)), tmp_path / "a.yaml")
    other = write_file(make_table(make_point(16, 32, 64)), tmp_path / "b.yaml")
    result = merge(one, other, "--out", tmp_path / "c.yaml", "--json")
    counts = {"points": 2, "noisy": 0, "tables": 2, "incomplete": None}
    assert json.loads(result.stdout) == {"table": str(tmp_path / "c.yaml"), **counts}


def test_a_table_is_not_merged_into_itself(merge, tmp_path):
    one = write_file(make_table(make_point(16, 32, 48)), tmp_path / "a.yaml")
    other = write_file(make_table(make_point(16, 32, 64)), tmp_path / "b.yaml")
    result = merge(one, other, "--out", one)
    assert result.exit_code == 2
    assert "count again" in result.stderr
    assert len(read_table(one).points) == 1


def test_a_table_is_not_counted_twice(merge, tmp_path):
    one = write_file(make_table(make_point(16, 32, 48)), tmp_path / "a.yaml")
    result = merge(one, tmp_path / "." / "a.yaml", "--out", tmp_path / "c.yaml")
    assert result.exit_code == 2
    assert f"expected each table once; got {one}, {one}" in result.stderr
    assert not (tmp_path / "c.yaml").exists()


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"recipe": "tensorwise"}, "recipe is tensorwise, but rowwise"),
        (None, "cannot be read"),
    ],
)
def test_what_cannot_be_merged_is_an_error_and_nothing_is_written(merge, tmp_path, fields, complaint):
    one = write_file(make_table(make_point(16, 32, 48)), tmp_path / "a.yaml")
    other = tmp_path / "b.yaml"
    if fields is not None:
        write_file(make_table(make_point(16, 32, 48), **fields), other)
    result = merge(one, other, "--out", tmp_path / "c.yaml")
    assert result.exit_code == 2
    assert complaint in result.stderr
    assert str(other) in result.stderr
    assert not (tmp_path / "c.yaml").exists()
