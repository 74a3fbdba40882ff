"""The table file: what is written, and that nothing but that can be read."""

from __future__ import annotations

import copy
import os
import stat
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from builders import MEASURED_AT, PROTOCOL, make_point, make_table, write_file
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8gate.filter.contract.bounds import Unaligned
from fp8gate.filter.contract.merged_sweep import MergedSweep
from fp8gate.filter.contract.plain_yaml import round_to_measured
from fp8gate.filter.contract.recipes import RECIPES
from fp8gate.filter.contract.table import (
    COLUMNS,
    WITH_NUMBERS,
    Device,
    Grid,
    Point,
    Software,
    Table,
    TableError,
    format_table,
    parse_table,
    read_table,
    write_table,
    write_tables,
)

replace = msgspec.structs.replace

SLOW, FAST = make_point(16, 32, 48, 0.5), make_point(16, 32, 64, 2.0, status="ambiguous")
BROKEN = make_point(32, 32, 48, status="failed")
QUOTIENTS = replace(PROTOCOL, estimate="quotient_of_times")
COMMITTED = sorted((Path(__file__).parents[1] / "thresholds").glob("*/*.yaml"))
COMMITTED += sorted((Path(__file__).parents[1] / "benchmarks" / "data").glob("*/*.yaml"))
few = settings(max_examples=40, deadline=None)
TABLE = make_table(SLOW, FAST, BROKEN)
TEXT = format_table(TABLE)


FastDumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


def data_of(table: Table) -> dict[str, Any]:
    """What a YAML reader sees in the table's file."""
    data: dict[str, Any] = yaml.safe_load(format_table(table))
    return data


def parse_data(data: Any) -> Table:
    return parse_table(yaml.dump(data, Dumper=FastDumper), source="FILE.yaml")


# --- writing ---------------------------------------------------------------------------------------------------


def test_file_is_made_for_diffs():
    table = make_table(
        BROKEN,
        SLOW,
        software=Software(torch="2.13.0", torchao="0.18.0", cuda="13.0", fp8gate="0.1.0"),
    )
    assert format_table(table) == (
        "schema: 1\n"
        "recipe: rowwise\n"
        "device: {name: NVIDIA H200, kind: cuda, capability: '9.0', multiprocessors: 132, memory_gib: 139.8}\n"
        "software: {torch: 2.13.0, torchao: 0.18.0, cuda: '13.0', fp8gate: 0.1.0}\n"
        "protocol: {timer: cuda_graphs, compile: true, inductor: {emulate_precision_casts: true}, bf16: eager, "
        "l2: cold, data: normal, settle_s: 0.5, run_s: 0.0, pause_s: 0.0, rounds: [8, 12], confidence: 0.99, "
        "threshold: 1.0, tolerance: 0.01, near: 0.15, control: 0.005}\n"
        "measured_at: 2026-11-24T10:00:00Z\n"
        "grid: {m: [16, 32], k: [32], n: [48]}\n"
        "columns: [m, k, n, bf16_fwd_us, bf16_bwd_us, fp8_fwd_us, fp8_bwd_us, "
        "speedup, speedup_low, speedup_high, status]\n"
        "points:\n"
        "  - [16, 32, 48, 100.0, 200.0, 200.0, 400.0, 0.5, 0.5, 0.5, measured]\n"
        "  - [32, 32, 48, null, null, null, null, null, null, null, failed]\n"
    )


def test_a_file_names_its_estimate_only_where_it_is_not_that_of_the_first_tables():
    assert "estimate" not in TEXT
    assert ", control: 0.005, estimate: quotient_of_times}\n" in format_table(make_table(SLOW, protocol=QUOTIENTS))


def test_a_file_has_a_factor_for_unaligned_tokens_only_where_it_was_measured():
    assert "unaligned" not in TEXT
    protocol = replace(PROTOCOL, unaligned=Unaligned(points=8, factor=0.9312))
    assert ", unaligned: {points: 8, factor: 0.9312}}" in format_table(replace(TABLE, protocol=protocol))


def test_a_file_names_sweeps_only_where_they_were_merged():
    assert "merged_from" not in TEXT
    times = (MEASURED_AT, MEASURED_AT + timedelta(1))
    merged = replace(TABLE, merged_from=tuple(MergedSweep(measured_at=at, digest=SWEEP["digest"]) for at in times))
    line = (
        "\nmerged_from: [{measured_at: '2026-11-24T10:00:00Z', digest: sha256 0123456789ab}, "
        "{measured_at: '2026-11-25T10:00:00Z', digest: sha256 0123456789ab}]\ngrid: "
    )
    assert line in format_table(merged)


def test_written_table_is_read_back(tmp_path):
    assert read_table(write_file(TABLE, tmp_path / "device" / "rowwise.yaml")) == TABLE


def test_points_given_unsorted_are_written_sorted(tmp_path):
    path = write_file(make_table(BROKEN, FAST, SLOW), tmp_path / "t.yaml")
    assert read_table(path).points == (SLOW, FAST, BROKEN)


@pytest.mark.parametrize(
    ("value", "rounded"),
    [(123.456, 123.5), (0.98764, 0.9876), (12345.6, 12350.0), (47.1, 47.1), (0.00123456, 0.001235)],
)
def test_numbers_are_rounded_to_four_digits(value, rounded):
    assert round_to_measured(value) == rounded
    text = format_table(make_table(make_point(16, 16, 16, 1.0, bf16_us=(value, 1.0))))
    assert f"[16, 16, 16, {rounded}, 1.0, {rounded}, 1.0, 1.0, 1.0, 1.0, measured]\n" in text


def test_writing_the_same_again_gives_the_same_bytes(tmp_path):
    path = write_file(TABLE, tmp_path / "t.yaml")
    first = path.read_bytes()
    write_table(read_table(path), path)
    assert path.read_bytes() == first
    write_table(make_table(SLOW, FAST), path)
    assert path.read_bytes() != first


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_file_has_the_permissions_that_the_umask_leaves(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        path = write_file(TABLE, tmp_path / "t.yaml")
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == mode


@pytest.mark.parametrize("step", ["fsync", "link", "replace"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_interrupted_write_leaves_the_old_file_alone(tmp_path, monkeypatch, step, error):
    path = write_file(TABLE, tmp_path / "t.yaml")
    before = path.read_bytes()

    def fail(*_args):
        raise error

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(type(error)):
        write_table(make_table(SLOW), path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["t.yaml"]


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_several_tables_are_replaced_all_or_none(tmp_path, monkeypatch, failing):
    first, second, third = (tmp_path / f"{name}.yaml" for name in ("first", "second", "third"))
    write_tables({first: TABLE, second: TABLE})
    before = first.read_bytes()
    replace_, calls = os.replace, []

    def fail(*names):
        calls.append(names)
        if len(calls) == failing:
            raise OSError(28, "No space left on device", str(names[1]))
        replace_(*names)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space left"):
        write_tables(dict.fromkeys((first, second, third), make_table(SLOW)))
    assert (first.read_bytes(), second.read_bytes()) == (before, before)
    assert sorted(os.listdir(tmp_path)) == ["first.yaml", "second.yaml"]


def test_one_table_that_cannot_be_read_again_keeps_all_from_being_written(tmp_path):
    with pytest.raises(TableError, match=r"second\.yaml: "):
        write_tables({tmp_path / "first.yaml": TABLE, tmp_path / "second.yaml": make_table(SLOW, points=())})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["NVIDIA\nH200", "NVIDIA \x1b[31mH200", "NVIDIA\u2028H200", "NVIDIA \x9bH200"])
def test_a_name_that_would_move_a_terminals_cursor_is_refused(tmp_path, name):
    table = make_table(SLOW, device=msgspec.structs.replace(TABLE.device, name=name))
    with pytest.raises(TableError, match=r"t\.yaml: (\$\.device\.name: expected printable text|not plain YAML data)"):
        write_table(table, tmp_path / "t.yaml")


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*t\.yaml"):
        write_table(TABLE, tmp_path / "t.yaml")


def test_finished_write_leaves_only_the_new_file(tmp_path):
    path = write_file(TABLE, tmp_path / "t.yaml")
    write_table(make_table(SLOW), path)
    assert read_table(path).points == (SLOW,)
    assert os.listdir(tmp_path) == ["t.yaml"]


@pytest.mark.parametrize(
    ("table", "complaint"),
    [
        (make_table(SLOW, SLOW), r"\$\.points\[1\]: \(16, 32, 48\) is there twice"),
        (make_table(SLOW, grid=Grid(m=(32, 16))), r"\$\.grid\.m"),
        (make_table(SLOW, points=()), r"\$\.points"),
        (make_table(replace(SLOW, bf16_fwd_us=None)), r"\$\.points\[0\]\.bf16_fwd_us"),
    ],
)
def test_table_that_could_not_be_read_is_not_written(tmp_path, table, complaint):
    path = write_file(TABLE, tmp_path / "t.yaml")
    before = path.read_bytes()
    with pytest.raises(TableError, match=complaint):
        write_table(table, path)
    assert path.read_bytes() == before


# --- reading ---------------------------------------------------------------------------------------------------

SWEEP = {"measured_at": "2026-11-24T10:00:00Z", "digest": "sha256 0123456789ab"}
TYPE_ERRORS = {
    "schema": (("schema",), 2, "$.schema: expected 1"),
    "schema as text": (("schema",), "1", "$.schema: expected 1"),
    "recipe": (("recipe",), "mxfp8", "$.recipe"),
    "recipe type": (("recipe",), 8, "$.recipe"),
    "device type": (("device",), "NVIDIA H200", "$.device"),
    "device kind": (("device", "kind"), "tpu", "$.device.kind"),
    "whole number": (("device", "multiprocessors"), 131.5, "$.device.multiprocessors"),
    "null": (("device", "name"), None, "$.device.name"),
    "version as number": (("software", "torch"), 2.13, "$.software.torch"),
    "boolean": (("protocol", "compile"), 1, "$.protocol.compile"),
    "confidence": (("protocol", "confidence"), 1.0, "$.protocol.confidence"),
    "estimate": (("protocol", "estimate"), "median", "$.protocol.estimate"),
    "no factor": (("protocol", "unaligned"), {"points": 8, "factor": 0.01}, "$.protocol.unaligned.factor"),
    "factor of no point": (("protocol", "unaligned"), {"points": 0, "factor": 0.9}, "$.protocol.unaligned.points"),
    "list": (("protocol", "rounds"), 8, "$.protocol.rounds"),
    "list item": (("protocol", "rounds"), [8, 0], "$.protocol.rounds[1]"),
    "no time zone": (("measured_at",), datetime(2026, 11, 24, 10), "$.measured_at"),
    "not a time": (("measured_at",), "yesterday", "$.measured_at"),
    "grid unsorted": (("grid", "m"), [32, 16], "$.grid.m: expected ascending"),
    "grid twice": (("grid", "k"), [32, 32], "$.grid.k: expected ascending"),
    "grid size": (("grid", "n"), [48, 0], "$.grid.n[1]"),
    "merged from one sweep": (("merged_from",), [SWEEP], "$.merged_from"),
    "merged from a sweep twice": (("merged_from",), [SWEEP, {**SWEEP}], "$.merged_from: expected each sweep once"),
    "no digest": (("merged_from",), [SWEEP, {**SWEEP, "digest": "0123456789ab"}], "$.merged_from[1].digest"),
    "no points": (("points",), [], "$.points: expected at least one point"),
    "size zero": (("points", 0, 0), 0, "$.points[0][0]"),
    "size boolean": (("points", 0, 2), True, "$.points[0][2]"),
    "time as text": (("points", 1, 3), "100.0", "$.points[1][3]"),
    "time negative": (("points", 1, 4), -1.0, "$.points[1][4]"),
    "time zero": (("points", 1, 5), 0.0, "$.points[1][5]"),
    "nan": (("points", 1, 6), float("nan"), "$.points[1]"),
    "infinite": (("points", 1, 6), float("inf"), "$.points[1][6]: expected a finite number"),
    "infinite in a field of a field": (
        ("protocol", "settle_s"),
        float("inf"),
        "$.protocol.settle_s: expected a finite",
    ),
    "size above 32 bits": (("points", 0, 1), 2**31, "Expected `int` <= 2147483647 - at `$.points[0][1]`"),
    "size of 320 digits": (("points", 0, 1), 10**320, "$.points[0][1]: expected a finite number"),
    "time above 63 bits": (("points", 1, 6), 1e19, "$.points[1][6]: expected a finite number, at most 9.22e+18"),
    "name of a device": (("device", "name"), "!?", "expected a name such as 'NVIDIA H200', got '!?' - at `$.device`"),
    "long name of a device": (("device", "name"), "H" * 201, "`$.device.name`"),
    "status": (("points", 1, 10), "slow", "$.points[1][10]"),
    "low above": (("points", 1, 8), 2.1, "$.points[1].speedup: expected speedup_low <= speedup <= speedup_high"),
    "high below": (("points", 1, 9), 1.9, "$.points[1].speedup: expected speedup_low <= speedup <= speedup_high"),
    "measured without": (("points", 0, 3), None, "$.points[0].bf16_fwd_us: expected a finite number"),
    "ambiguous without": (("points", 1, 7), None, "$.points[1].speedup: expected a finite number"),
    "failed with": (("points", 2, 7), 2.0, "$.points[2].speedup: expected null for status failed"),
}


@pytest.mark.parametrize(("path", "value", "complaint"), TYPE_ERRORS.values(), ids=TYPE_ERRORS)
def test_wrong_value_is_named(path, value, complaint):
    data = data_of(TABLE)
    assert parse_data(data) == TABLE
    parent = data
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    with pytest.raises(TableError) as error:
        parse_data(data)
    assert str(error.value).startswith("FILE.yaml: ")
    assert complaint in str(error.value)


@pytest.mark.parametrize("status", ["out_of_memory", "unstable", "failed", "noisy"])
def test_point_without_numbers_needs_a_status_that_says_why(status):
    data = data_of(TABLE)
    data["points"][2][10] = status
    assert parse_data(data).points[2] == make_point(32, 32, 48, status=status)
    data["points"][2][10] = "measured"
    with pytest.raises(TableError, match=r"\$\.points\[2\]\.bf16_fwd_us"):
        parse_data(data)


def off(share: float, estimate: str, spread: float = 1.001) -> Table:
    """A table whose row of 2.0x states a speedup that is larger by this share, with bounds `spread` away from it."""
    row = make_point(16, 32, 64, 2.0)
    stated = row.speedup * (1 + share)
    row = replace(row, speedup=stated, speedup_low=stated / spread, speedup_high=stated * spread)
    return make_table(SLOW, row, protocol=replace(PROTOCOL, estimate=estimate))


@pytest.mark.parametrize(
    ("estimate", "share", "stated"),
    [
        ("quotient_of_times", 0.0049, 2.01),
        ("quotient_of_times", -0.0049, 1.99),
        ("paired_rounds", 0.099, 2.198),
        ("paired_rounds", -0.099, 1.802),
    ],
)
def test_a_speedup_near_the_quotient_of_the_times_is_read(estimate, share, stated):
    table = parse_table(format_table(off(share, estimate)), source="FILE.yaml")
    assert (table.points[1].speedup, table.protocol.estimate) == (stated, estimate)


@pytest.mark.parametrize(
    ("estimate", "share", "expected", "stated"),
    [
        ("quotient_of_times", 0.006, "0.5%", "2.012"),
        ("quotient_of_times", -0.006, "0.5%", "1.988"),
        ("paired_rounds", 0.101, "10.0%", "2.202"),
        ("paired_rounds", -0.101, "10.0%", "1.798"),
    ],
)
def test_a_speedup_far_from_the_quotient_of_the_times_is_named(tmp_path, estimate, share, expected, stated):
    table = off(share, estimate)
    complaint = (
        f"$.points[1].speedup: expected the quotient of the row's times, 2, within {expected} "
        f"(protocol.estimate: {estimate}), found {stated}"
    )
    with pytest.raises(TableError) as error:
        parse_table(format_table(table), source="FILE.yaml")
    assert str(error.value) == f"FILE.yaml: {complaint}"
    with pytest.raises(TableError):
        write_table(table, tmp_path / "t.yaml")
    assert not (tmp_path / "t.yaml").exists()


def test_a_paired_row_whose_bounds_contain_the_quotient_is_read_and_a_quotient_is_not():
    """So noisy was one row of 2,772: its paired estimate is 12 % below the quotient of its times."""
    assert parse_table(format_table(off(-0.12, "paired_rounds", spread=1.15)), source="FILE.yaml").points
    for refused in (off(-0.12, "paired_rounds", spread=1.13), off(-0.006, "quotient_of_times", spread=1.15)):
        with pytest.raises(TableError, match="quotient of the row's times"):
            parse_table(format_table(refused), source="FILE.yaml")


@pytest.mark.parametrize(
    "columns", [{3: 1e-320, 4: 1e-320}, {5: 9e18, 6: 9e18}, {3: 9e18, 4: 9e18, 5: 1e-320, 6: 1e-320}]
)
def test_times_beyond_all_measure_are_refused_like_any_other(columns):
    data = data_of(TABLE)
    for column, time_us in columns.items():
        data["points"][1][column] = time_us
    with pytest.raises(TableError, match=r"\$\.points\[1\]\.speedup: expected the quotient of the row's times"):
        parse_data(data)


def test_every_committed_table_is_read():
    assert len(COMMITTED) == 25
    for path in COMMITTED:
        kind = "paired_rounds" if "h200" in str(path) else "quotient_of_times"
        assert read_table(path).protocol.estimate == kind


OPTIONAL = {("device", "capability"), ("device", "multiprocessors"), ("grid", "m"), ("grid", "k"), ("grid", "n")}
OPTIONAL |= {("schema",), ("columns",), ("protocol", "inductor", "emulate_precision_casts")}
FIELDS = {(name,) for name in data_of(TABLE)}
FIELDS |= {(s, name) for s in ("device", "software", "protocol", "grid") for name in data_of(TABLE)[s]}


def without(path: tuple[str, ...]) -> dict[str, Any]:
    """The data of a valid table without one field."""
    data = parent = data_of(TABLE)
    for key in path[:-1]:
        parent = parent[key]
    del parent[path[-1]]
    return data


@pytest.mark.parametrize("path", sorted(FIELDS - OPTIONAL), ids=".".join)
def test_missing_field_is_named(path):
    with pytest.raises(TableError, match=rf"^FILE\.yaml: Object missing required field `{path[-1]}`") as error:
        parse_data(without(path))
    assert "$." + ".".join(path[:-1]) in str(error.value) or len(path) == 1


def test_missing_schema_version_is_named():
    with pytest.raises(TableError, match=r"^FILE\.yaml: \$\.schema: expected 1, .*found nothing"):
        parse_data(without(("schema",)))


@pytest.mark.parametrize("path", sorted(OPTIONAL - {("schema",)}), ids=".".join)
def test_optional_field_may_be_missing(path):
    assert parse_data(without(path)).points == TABLE.points


@pytest.mark.parametrize("section", [None, "device", "software", "protocol", "grid"])
def test_unknown_field_is_named(section):
    data = data_of(TABLE)
    (data[section] if section else data)["surprise"] = 1
    with pytest.raises(TableError, match=r"^FILE\.yaml: Object contains unknown field `surprise`") as error:
        parse_data(data)
    assert section is None or f"$.{section}" in str(error.value)


@pytest.mark.parametrize(
    "columns",
    [
        [*COLUMNS[:3], "bf16_fwd_ms", *COLUMNS[4:]],  # the unit is in the name: microseconds are not milliseconds
        [*COLUMNS[:3], COLUMNS[4], COLUMNS[3], *COLUMNS[5:]],
        COLUMNS[:-1],
        [*COLUMNS, "note"],
    ],
)
def test_wrong_column_is_named(columns):
    data = data_of(TABLE) | {"columns": list(columns)}
    with pytest.raises(TableError, match=r"^FILE\.yaml: \$\.columns: expected \['m', 'k', 'n', 'bf16_fwd_us'"):
        parse_data(data)


@pytest.mark.parametrize("cut", [slice(0, 10), slice(0, 0)])
def test_short_row_is_named(cut):
    data = data_of(TABLE)
    data["points"][1] = data["points"][1][cut]
    with pytest.raises(TableError, match=r"^FILE\.yaml: Expected `array` .*length.* at `\$\.points\[1\]`"):
        parse_data(data)


def test_duplicate_point_is_named():
    data = data_of(TABLE)
    data["points"].insert(1, list(data["points"][0]))
    with pytest.raises(TableError, match=r"^FILE\.yaml: \$\.points\[1\]: \(16, 32, 48\) is there twice"):
        parse_data(data)


def test_unsorted_point_is_named():
    data = data_of(TABLE)
    data["points"].reverse()
    with pytest.raises(TableError, match=r"^FILE\.yaml: \$\.points\[1\]: \(16, 32, 64\) comes after \(32, 32, 48\)"):
        parse_data(data)


@pytest.mark.parametrize(
    "value",
    ["!!set {a, b}", "!!binary aGVsbG8=", "!!omap [a: 1]", "!!python/tuple [1]", "!!python/name:os.system", "!local 1"],
)
@pytest.mark.parametrize("field", ["recipe", "device", "points"])
def test_tag_beyond_plain_data_is_refused(field, value):
    lines = [f"{field}: {value}" if line.startswith(f"{field}:") else line for line in TEXT.splitlines()]
    if field == "points":
        lines = [line for line in lines if not line.startswith("  - ")]
    with pytest.raises(TableError, match=rf"^FILE\.yaml: not plain YAML data: \$\.{field}, line \d+: .*found a tag"):
        parse_table("\n".join(lines), source="FILE.yaml")


def test_python_tag_is_not_run(tmp_path):
    marker = tmp_path / "marker"
    text = TEXT.replace("recipe: rowwise", f'recipe: !!python/object/apply:os.system ["touch {marker}"]')
    with pytest.raises(TableError, match=r"^FILE\.yaml: not plain YAML data: (?s:.*)os\.system"):
        parse_table(text, source="FILE.yaml")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("!!str rowwise", "a tag, 'tag:yaml.org,2002:str'"),
        ("! rowwise", "a tag, '!'"),
        ("&name rowwise", "an anchor or an alias, 'name'"),
        ("*name", "an anchor or an alias, 'name'"),
        ("{<<: {a: 1}}", "a merge key, '<<'"),
        ("{=: 1}", "a value key, '='"),
        ("1:59:30", "a number in base 60, '1:59:30'; text such as this needs quotes"),
        ("1:59.5", "a number in base 60, '1:59.5'; text such as this needs quotes"),
        ("{1: 2}", "a key that is no text, '1'"),
        ("{[1]: 2}", "a key that is no text, '[1]'"),
        ("[[[[[[[[1]]]]]]]]", "collections inside each other, more than 8"),
    ],
)
def test_more_than_plain_data_is_refused(value, found):
    with pytest.raises(TableError) as error:
        parse_table(TEXT.replace("recipe: rowwise", f"recipe: {value}"), source="FILE.yaml")
    assert str(error.value).startswith("FILE.yaml: not plain YAML data: $.recipe")
    assert str(error.value).endswith(f", line 2: expected plain data, found {found}")


@pytest.mark.parametrize("value", ["'1:59'", "'<<'", "'='", "a*b", "[[[[[[[1]]]]]]]"])
def test_text_that_only_looks_like_more_is_plain(value):
    with pytest.raises(TableError, match=r"^FILE\.yaml: (Invalid enum value|Expected `str`)"):
        parse_table(TEXT.replace("recipe: rowwise", f"recipe: {value}"), source="FILE.yaml")


@pytest.mark.parametrize("text", ["%YAML 1.1\n---\n", "%TAG ! tag:x,1:\n---\n", "%OTHER\n---\n"])
def test_a_directive_is_refused(text):
    with pytest.raises(TableError, match="expected no directive"):
        parse_table(text + TEXT, source="FILE.yaml")


def test_a_byte_order_mark_is_refused():
    with pytest.raises(TableError, match="without a byte order mark"):
        parse_table("\ufeff" + TEXT, source="FILE.yaml")


@pytest.mark.parametrize("breaks", ["\r\n", "\r"])
def test_line_breaks_of_other_systems_are_read(tmp_path, breaks):
    (tmp_path / "t.yaml").write_bytes(TEXT.replace("\n", breaks).encode())
    assert read_table(tmp_path / "t.yaml") == TABLE


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("recipe: rowwise\n", "recipe: rowwise\nrecipe: tensorwise\n", "recipe"),
        ("kind: cuda", "kind: cuda, name: NVIDIA B200", "name"),
        ("l2: cold", "'l2': cold, l2: cold", "l2"),
    ],
)
def test_key_twice_is_refused(old, new, key):
    with pytest.raises(TableError, match=rf"^FILE\.yaml: not plain YAML data: (?s:.*)key '{key}' is there twice"):
        parse_table(TEXT.replace(old, new), source="FILE.yaml")


@pytest.mark.parametrize(
    "text", ["schema: [1", "a: b: c", "\tschema: 1", "schema: 1\x00", "%", f"{TEXT}---\n{TEXT}", f"{TEXT}...\n}}"]
)
def test_text_that_is_not_one_yaml_document_is_refused(text):
    with pytest.raises(TableError, match=r"^FILE\.yaml: not plain YAML data: "):
        parse_table(text, source="FILE.yaml")


@pytest.mark.parametrize("text", ["", "# only a comment\n", "null", "[]", "7", "rowwise"])
def test_document_that_is_no_mapping_is_refused(text):
    with pytest.raises(TableError, match=r"^FILE\.yaml: Expected `object`, got "):
        parse_table(text, source="FILE.yaml")


def test_missing_file_is_named(tmp_path):
    path = tmp_path / "none.yaml"
    with pytest.raises(TableError, match=r"none\.yaml: cannot be read: .*No such file"):
        read_table(path)


def test_unreadable_bytes_are_named(tmp_path):
    path = tmp_path / "t.yaml"
    path.write_bytes(TEXT.encode().replace(b"NVIDIA", b"\xff\xfe"))
    with pytest.raises(TableError, match=r"t\.yaml: cannot be read: .*utf-8"):
        read_table(path)


def test_read_error_names_the_file(tmp_path):
    path = tmp_path / "t.yaml"
    path.write_text(TEXT.replace("l2: cold", "l2: warm"))
    with pytest.raises(TableError) as error:
        read_table(path)
    assert str(error.value).startswith(f"{path}: ")
    assert "$.protocol.l2" in str(error.value)


# --- properties ------------------------------------------------------------------------------------------------

sizes = st.integers(1, 2**20)
times_us = st.floats(0.001, 1e9)
printable = st.characters(exclude_categories=["C", "Z"]) | st.just(" ")
names = st.text(printable, min_size=1, max_size=20)
device_names = names.map(lambda name: f"H{name}")  # a folder is named after the letters and digits


@st.composite
def points(draw) -> Point:
    """A valid point, with any times and the speedup that they say, or without numbers."""
    shape = [draw(sizes) for _ in range(3)]
    status = draw(st.sampled_from(["measured", "ambiguous", "out_of_memory", "unstable", "failed", "noisy"]))
    if status not in WITH_NUMBERS:
        return Point(*shape, *(None,) * 7, status)
    bf16_us, fp8_us = (draw(st.tuples(times_us, times_us)) for _ in range(2))
    speedup = sum(bf16_us) / sum(fp8_us)
    low, high = speedup * draw(st.floats(0.1, 1.0)), speedup * draw(st.floats(1.0, 10.0))
    return Point(*shape, *bf16_us, *fp8_us, speedup, low, high, status)


axes = st.sets(sizes, max_size=4).map(sorted).map(tuple)
sweeps = st.builds(
    MergedSweep,
    measured_at=st.datetimes(timezones=st.just(timezone.utc)),
    digest=st.from_regex(r"sha256 [0-9a-f]{12}", fullmatch=True),
)
tables = st.builds(
    Table,
    points=st.lists(points(), min_size=1, max_size=3, unique_by=lambda p: p.shape).map(tuple),
    recipe=st.sampled_from(list(RECIPES)),
    device=st.builds(Device, name=device_names, kind=st.sampled_from(["cuda", "cpu"]), memory_gib=times_us),
    software=st.builds(Software, torch=names, torchao=names, triton=st.none() | names, fp8gate=names),
    protocol=st.builds(
        replace,
        st.sampled_from([PROTOCOL, QUOTIENTS]),
        unaligned=st.none() | st.builds(Unaligned, points=sizes, factor=st.floats(0.1, 10)),
        inductor=st.dictionaries(names, st.booleans(), max_size=3),
        data=names,
    ),
    measured_at=st.datetimes(timezones=st.just(timezone.utc)),
    merged_from=st.none() | st.lists(sweeps, min_size=2, max_size=3, unique=True).map(tuple),
    grid=st.builds(Grid, m=axes, k=axes, n=axes),
)


@few
@given(tables)
def test_any_table_survives_the_file(table):
    text = format_table(table)
    read = parse_table(text, source="FILE.yaml")
    assert format_table(read) == text
    assert replace(read, points=()) == replace(table, points=())
    assert [p.shape for p in read.points] == sorted(p.shape for p in table.points)


def leaves(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """The paths of all scalars in plain data."""
    if not isinstance(value, dict | list):
        return [path]
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return [leaf for key, child in items for leaf in leaves(child, (*path, key))]


def junk_for(value: Any) -> st.SearchStrategy[Any]:
    """Values of another type than `value`, or of its type and out of range; never null, which may be allowed."""
    containers = st.lists(st.integers(), max_size=2) | st.dictionaries(st.text(max_size=3), st.integers(), max_size=2)
    if isinstance(value, bool):
        return containers | st.text() | st.integers() | st.floats()
    if isinstance(value, str):
        return containers | st.booleans() | st.integers() | st.floats()
    negative = st.integers(max_value=-1) | st.floats(max_value=-1.0)
    return containers | st.booleans() | st.text() | negative | st.just(float("nan"))


VALID_DATA = data_of(TABLE)
LEAVES = [leaf for leaf in leaves(VALID_DATA) if leaf[0] not in ("columns", "measured_at")]


@few
@given(st.data())
def test_any_value_of_a_wrong_type_is_named(data):
    *parents, key = leaf = data.draw(st.sampled_from(LEAVES))
    corrupt = copy.deepcopy(VALID_DATA)
    parent: Any = corrupt
    for step in parents:
        parent = parent[step]
    parent[key] = data.draw(junk_for(parent[key]))
    with pytest.raises(TableError) as error:
        parse_data(corrupt)
    assert str(error.value).startswith("FILE.yaml: ")
    # a point's row may be named by the index or the name of its column
    assert field_path(leaf[:2] if leaf[0] == "points" else leaf) in str(error.value)


def field_path(leaf: tuple[str | int, ...]) -> str:
    """As messages write it. msgspec does not tell the keys of `inductor` apart."""
    if leaf[:2] == ("protocol", "inductor"):
        return "$.protocol.inductor"
    return "$" + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in leaf)


@few
@given(
    st.integers(0, len(TEXT)),
    st.integers(0, 8),
    st.text(st.sampled_from("!&*[]{}:,#-|>?%@'\" \n0x.~<=") | st.characters(), max_size=6),
)
def test_damaged_text_is_read_or_refused_but_never_crashes(at, length, insert):
    damaged = TEXT[:at] + insert + TEXT[at + length :]
    try:
        table = parse_table(damaged, source="FILE.yaml")
    except TableError as error:
        assert str(error).startswith("FILE.yaml: ")  # noqa: PT017 - both outcomes are right
    else:
        assert parse_table(format_table(table), source="FILE.yaml").points
