"""Tables, plans, grids and configs from anyone: each ends in an error of its class, soon and in little memory."""

from __future__ import annotations

import copy
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from builders import make_point, make_table
from edited_files import JUNK, edited, places
from hostile import JSON_GROUPS, MAX_CPU_S, MIB, YAML_GROUPS, LimitedReader
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plans import TINY_CONFIG, make_plan

from fp8gate.calibrate.grid.grid import GridError, load_grid
from fp8gate.filter.contract.plans.plan import PlanError
from fp8gate.filter.contract.plans.plan_file import format_plans, read_plan
from fp8gate.filter.contract.reading.messages import MAX_MESSAGE, FileError
from fp8gate.filter.contract.table import TableError, format_table, parse_table, read_table
from fp8gate.filter.model.model_config import ModelError, load_model

few = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
WITHOUT = "--without-libyaml"


class Kind(NamedTuple):
    """A kind of file: what reads it, the error that it may raise, and a valid file's text."""

    read: Callable[[str], Any]
    error: type[FileError]
    valid: str


TABLE = format_table(
    make_table(make_point(16, 32, 48, 0.5), make_point(16, 32, 64, 2.0), make_point(32, 32, 48, status="failed"))
)
KINDS = {
    "table": Kind(read_table, TableError, TABLE),
    "plan": Kind(read_plan, PlanError, format_plans([make_plan()])),
    "grid": Kind(
        lambda path: load_grid(path, "cpu"),
        GridError,
        "m: [16, 32]\nk: [16]\nn: [16]\nshapes:\n  - [16, 32, 48]\n",
    ),
    "config": Kind(load_model, ModelError, json.dumps(TINY_CONFIG)),
}
LONG = ("long", "too long")
COSTLY = (*LONG, "nested", "multiplied")
"""Groups that take a second or more. Each kind of YAML file is read by the same code, so `make test` reads one kind."""


def groups() -> list[Any]:
    """(kind, group): the test parameters of the corpus."""
    found = []
    for kind in KINDS:
        for group in JSON_GROUPS if kind == "config" else YAML_GROUPS:
            is_slow = group in LONG or (group in COSTLY and kind != "grid")
            found.append(pytest.param(kind, group, marks=[pytest.mark.slow] if is_slow else []))
    return found


# --- the corpus, read under limits of time and memory ----------------------------------------------------------


@pytest.fixture(scope="module")
def start_reader(tmp_path_factory) -> Iterator[Callable[..., LimitedReader]]:
    """Starts a reader under limits, once for each choice of options."""
    readers: dict[tuple[str, ...], LimitedReader] = {}

    def start(*options: str) -> LimitedReader:
        if options not in readers:
            readers[options] = LimitedReader(tmp_path_factory.mktemp("hostile"), *options)
        return readers[options]

    yield start
    assert [reader.end() for reader in readers.values()] == [0] * len(readers)


def problems(answer: dict[str, Any], kind: str) -> list[str]:
    """What is wrong with the way in which reading a hostile file ended."""
    found = []
    if answer["ended"] != KINDS[kind].error.__name__:
        return [f"ended in {answer['ended']}: {answer.get('message')}"]
    if answer["cpu_s"] >= MAX_CPU_S:
        found.append(f"took {answer['cpu_s']} s")
    if not ("hostile.file: " in answer["message"] or "hostile.file' (" in answer["message"]):
        found.append(f"does not name the file: {answer['message']}")
    return found + problems_of_text(answer["message"])


def problems_of_text(message: str) -> list[str]:
    """What is wrong with an error's message."""
    is_line = len(message) <= MAX_MESSAGE and message.isprintable()
    return [] if is_line else [f"is no short line: {message!r}"]


@pytest.mark.parametrize(("kind", "group"), groups())
def test_a_hostile_file_ends_in_an_error_of_its_kind(start_reader, kind, group):
    reader, files = start_reader(), (JSON_GROUPS if kind == "config" else YAML_GROUPS)[group]
    wrong = {name: problems(reader.read(kind, content), kind) for name, content in files(KINDS[kind].valid)}
    assert len(wrong) > 4
    assert {name: found for name, found in wrong.items() if found} == {}


@pytest.mark.slow
@pytest.mark.parametrize("group", YAML_GROUPS)
def test_what_a_file_says_does_not_depend_on_libyaml(start_reader, group):
    fast, slow = start_reader(), start_reader(WITHOUT)
    for name, content in YAML_GROUPS[group](TABLE):
        first, second = (reader.read("table", content) for reader in (fast, slow))
        for answer in (first, second):
            answer["message"] = answer["message"].split("hostile.file: ")[-1]
            answer.pop("cpu_s")
        assert first == second, name


@pytest.mark.parametrize("kind", KINDS)
def test_a_huge_file_is_not_read_to_its_end(start_reader, tmp_path, kind):
    path = tmp_path / "hostile.file"
    path.touch()
    os.truncate(path, 2**33)  # sparse: it takes no space on the disk
    assert problems(start_reader().ask(kind, str(path)), kind) == []


@pytest.mark.parametrize("options", [(), (WITHOUT,)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_valid_file_is_read_under_the_same_limits(start_reader, kind, options):
    assert start_reader(*options).read(kind, KINDS[kind].valid.encode())["ended"] == "value"


@pytest.mark.parametrize(("kind", "ended"), [("slow", "SIGXCPU"), ("large", "MemoryError")])
def test_the_limits_hold(start_reader, kind, ended):
    assert start_reader().ask(kind, "")["ended"] == ended


@pytest.mark.slow
def test_a_reader_that_waits_is_ended(start_reader):
    assert start_reader().ask("waiting", "")["ended"] == "SIGALRM"


# --- what is no regular file -----------------------------------------------------------------------------------


@pytest.fixture(params=["folder", "pipe", "zeros", "terminal", "socket", "loop", "memory", "long", "null", "surrogate"])
def no_file(request, tmp_path, monkeypatch) -> Iterator[str]:
    """The path of something that is no readable file."""
    path = tmp_path / "x"
    listener = socket.socket(socket.AF_UNIX)
    if request.param == "pipe":
        os.mkfifo(path)
    if request.param == "socket":
        monkeypatch.chdir(tmp_path)
        listener.bind("x")  # the path of a socket is short
    if request.param == "loop":
        path.symlink_to(path)
    special = {"folder": str(tmp_path), "zeros": "/dev/zero", "terminal": "/dev/ptmx", "memory": "/proc/self/mem"}
    special |= {"long": "x" * 5000, "null": "a\0b", "surrogate": "\ud800"}
    yield special.get(request.param, str(path))
    listener.close()


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_ends_in_the_usual_error_at_once(kind, no_file):
    start_s = time.monotonic()
    with pytest.raises(
        KINDS[kind].error, match=r"cannot be read: |; got |expected a config\.json in the folder"
    ) as error:
        KINDS[kind].read(no_file)
    assert time.monotonic() - start_s < 0.5
    assert problems_of_text(str(error.value)) == []


def test_a_pipe_that_takes_the_files_place_does_not_make_the_reader_wait(tmp_path, monkeypatch):
    """As if it had been a file when it was checked."""
    os.mkfifo(tmp_path / "x")
    monkeypatch.setattr("stat.S_ISREG", lambda mode: True)
    with pytest.raises(TableError, match="Expected `object`, got `null`"):
        read_table(tmp_path / "x")


def test_a_message_about_a_long_path_says_why():
    with pytest.raises(TableError, match=r"^xxx.* \.\.\. xxx.*: cannot be read: File name too long$"):
        read_table("x" * 5000)


# --- a large table ---------------------------------------------------------------------------------------------

LARGE_POINTS = 100_000
EXTRA_BYTES = 150 * MIB


def large_table(points: int = LARGE_POINTS) -> list[str]:
    """The lines of a table of so many points, as `format_table` writes them."""
    header = TABLE.partition("  - [")[0].splitlines()
    numbers = "1234.0, 2346.0, 617.0, 1173.0, 2.0, 1.987, 2.013, measured"
    sizes = ((16 * (1 + i // 2500), 16 * (1 + i // 50 % 50), 16 * (1 + i % 50)) for i in range(points))
    return [*header, *(f"  - [{m}, {k}, {n}, {numbers}]" for m, k, n in sizes)]


def test_the_lines_of_a_large_table_are_those_that_are_written():
    text = "\n".join(large_table(3000)) + "\n"
    table = parse_table(text, source="FILE.yaml")
    assert format_table(table) == text
    assert [len(table.points), str(table.points[2999].shape)] == [3000, "(32, 160, 800)"]


@pytest.mark.parametrize("options", [(), (WITHOUT,)])
def test_a_table_of_100_000_points_is_read_in_a_second_and_150_mib(start_reader, options):
    content = "\n".join(large_table()).encode()
    answer = start_reader(*options).read("table", content, extra_bytes=EXTRA_BYTES)
    assert answer["ended"] == "value"
    assert answer["cpu_s"] < 1


@pytest.mark.parametrize(
    ("line", "wrong", "complaint"),
    [
        (-1, "  - [65536, 16, 16, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, slow]", r"\$\.points\[99999\]: expected one line"),
        (-1, "  # a comment", r"\$\.points\[99999\]: expected one line"),
        (-1, "  - [16, 16, 16, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, measured]", r"\$\.points\[99999\]: .* comes after"),
        (
            -1,
            "  - [9999999999, 16, 16, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, failed]",
            r"<= .* `\$\.points\[99999\]\[0\]`",
        ),
        (-1, "  - [65536, 16, 16, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, failed]", r"> 0.* `\$\.points\[99999\]\[3\]`"),
        (0, "schema: 2", r"expected the line 'schema: 1' first"),
        (1, "recipe: !!str rowwise", r"\$\.recipe, line 2: .* a tag"),
        (1, "recipe: rowwise\npoints: []", r"key 'points' is there twice"),
        (1, "...", r"expected the line 'schema: 1' first, and a line 'points:' before all points"),
    ],
)
def test_what_is_wrong_with_a_large_table_is_named(line, wrong, complaint):
    lines = large_table()
    lines[line] = wrong
    with pytest.raises(TableError, match=f"^FILE.yaml: .*{complaint}"):
        parse_table("\n".join(lines), source="FILE.yaml")


TWELVE_MIB = 12 * MIB
ROW = "  - [16, 32, 48, 100.0, 200.0, 200.0, 400.0, 0.5, 0.5, 0.5, measured]\n"


@pytest.mark.parametrize(
    "unit", ["\n", "\r", "x\n", "  - [\n", ROW, "  - [16, 16, ", "\U0001f600\n", "schema: 1\npoints:\n", "points:\n"]
)
def test_twelve_mib_of_anything_end_in_an_error(start_reader, unit):
    head = f"schema: 1\nx: \U0001f600\npoints:\n{ROW}".encode()
    content = (head + unit.encode() * (TWELVE_MIB // len(unit.encode())))[:TWELVE_MIB]
    assert problems(start_reader().read("table", content), "table") == []


# --- properties: any change of a valid file --------------------------------------------------------------------


def assert_read_or_refused(kind: str, content: bytes, folder: Path) -> None:
    path = folder / "file"
    path.write_bytes(content)
    try:
        KINDS[kind].read(str(path))
    except KINDS[kind].error as error:
        assert (str(path) in str(error), problems_of_text(str(error))) == (True, [])  # noqa: PT017 - both are right


@few
@given(st.data())
@pytest.mark.parametrize("kind", KINDS)
def test_an_edited_file_is_read_or_refused(tmp_path, kind, data):
    text = data.draw(edited(KINDS[kind].valid))
    assert_read_or_refused(kind, text.encode(), tmp_path)


@few
@given(at=st.integers(0, 500), garbage=st.binary(max_size=6), cut=st.integers(0, 6))
@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_read_or_refused(tmp_path, kind, at, garbage, cut):
    content = KINDS[kind].valid.encode()
    assert_read_or_refused(kind, content[:at] + garbage + content[at + cut :], tmp_path)


@few
@given(st.data())
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_with_any_other_value_is_read_or_refused(tmp_path, kind, data):
    valid = yaml.safe_load(KINDS[kind].valid)
    *parents, last = data.draw(st.sampled_from([path for path in places(valid) if path]))
    changed = parent = copy.deepcopy(valid)
    for step in parents:
        parent = parent[step]
    if data.draw(st.booleans()):
        parent[last] = copy.deepcopy(data.draw(st.sampled_from(JUNK)))
    else:
        del parent[last]
    text = json.dumps(changed) if kind == "config" else yaml.safe_dump(changed)
    assert_read_or_refused(kind, text.encode(), tmp_path)
