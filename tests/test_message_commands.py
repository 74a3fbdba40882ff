"""Every command that a message, a docstring or a page names exists, and has the options that are named with it."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from builders import PROTOCOL, make_point, make_table, write_file, write_folder
from commands import COMMANDS, commands_in, parse
from documents import ROOT, script

from fp8gate import Parallel, auto_filter
from fp8gate.filter.contract import software_check
from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.contract.recipes import VARIANTS
from fp8gate.filter.contract.table import Incomplete
from fp8gate.filter.locate.find_table import find_table
from fp8gate.filter.policy.findings import FilterWarning

SOURCES = [
    path
    for folder in ("src/fp8gate/cli", "src/fp8gate/casts", "src/fp8gate/torchtitan", "filter", "calibrate", "examples")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".jinja")
]
PAGES = [*script("blocks").PAGES, *SOURCES]
COMMAND = re.compile(r"(?<![\w./-])fp8gate ([a-z]+)\b")
SAYS_COMMAND = re.compile(r"(?:`|<code>|[Rr]un |: |Try it: )fp8gate ([a-z]+)")
OPTION = re.compile(r"(?<![\w-])--[a-z][\w-]*")
TRY_IT = re.compile(r"Try it: (fp8gate [a-z].*)")


def texts(path: Path) -> Iterator[str]:
    """The strings of a Python file, each with X for what is filled in; inline code of other files."""
    if path.suffix != ".py":
        yield from re.findall(r"`[^`\n]+`|<code>.+?</code>", path.read_text())
        return
    tree = ast.parse(path.read_text())
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "X" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            yield node.value


def options_of(name: str) -> set[str]:
    return {option for param in COMMANDS[name].params for option in (*param.opts, *param.secondary_opts)} | {"--help"}


def wrong_in(text: str) -> Iterator[str]:
    """The commands that do not exist, and the options that a command has not, up to the next semicolon or command."""
    yield from (f"fp8gate {name}" for name in SAYS_COMMAND.findall(text) if name not in COMMANDS)
    for found in COMMAND.finditer(text):
        name, rest = found[1], re.split(r"[;`]|fp8gate |\. ", text[found.end() :])[0]
        if name in COMMANDS:
            yield from (f"fp8gate {name} {one}" for one in OPTION.findall(rest) if one not in options_of(name))


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_command_named_exists_with_its_options(path):
    assert [wrong for text in texts(path) for wrong in wrong_in(text)] == []


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("to go on: fp8gate calibrate --resume; --what", []),
        ("to go on: fp8gate resume", ["fp8gate resume"]),
        ("fp8gate plan X --grid quick", ["fp8gate plan --grid"]),
        ("fp8gate decides; `fp8gate verify --fresh`", ["fp8gate verify --fresh"]),
    ],
)
def test_a_wrong_one_is_found(text, wrong):
    assert list(wrong_in(text)) == wrong


TRIED = [command for path in SOURCES for command in TRY_IT.findall(path.read_text())]


@pytest.mark.parametrize("command", TRIED)
def test_what_a_module_says_to_try_can_be_parsed(command):
    parse(command)


def test_there_is_something_to_try():
    assert len(TRIED) > 10


# --- as a user sees them ---------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Tables of older software, of a sweep that was stopped, in a folder whose name has to be quoted."""
    monkeypatch.setattr(software_check, "installed_version", {"torch": "9.9.0"}.get)
    tables = [
        make_table(
            make_point(32, 64, 64, 1.5),
            recipe=variant.recipe,
            protocol=msgspec.structs.replace(PROTOCOL, casts=variant.casts),
            incomplete=Incomplete(measured=1, of=2),
        )
        for variant in VARIANTS
    ]
    return write_folder(tmp_path / "my tables", *tables)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_the_commands_of_a_filter_can_be_parsed(folder, variant):
    recipe, casts = variant
    parallel = Parallel(tp=2, plan="transformers")
    layers = [("model.layers.0.mlp.up_proj", SimpleNamespace(in_features=64, out_features=512))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FilterWarning)
        asked = {"tokens": 32, "tables": folder, "device": "H200", "casts": casts, "parallel": parallel}
        wants_float8 = auto_filter(recipe, **asked)
        said = [finding.message for finding in wants_float8.check(layers)]
    found = commands_in("; ".join([*said, wants_float8.summary()]))
    assert {"calibrate", "plan"} <= {command.split()[1] for command in found}
    for command in found:
        assert parse(command).get("casts", casts) == casts


def test_the_commands_of_errors_can_be_parsed(folder, tmp_path):
    table = write_file(make_table(make_point(32, 64, 64)), tmp_path / "other" / "nvidia-h200" / "rowwise.yaml")
    for ask in (
        lambda: find_table("rowwise", device="B200", tables=folder),
        lambda: find_table("tensorwise", tables=table.parent),
        lambda: auto_filter("rowwise", tokens=32, tables=folder, device="H200", casts="inductor", plan="llama3-8b"),
    ):
        with pytest.raises(InputError) as error:
            ask()
        (command,) = commands_in(str(error.value))
        parse(command)


def test_commands_are_read_from_a_message():
    message = "old; run fp8gate calibrate --recipes a,b --out '/my tables', and fp8gate plan 'my model'; or --tp 2"
    found = commands_in(message)
    assert found == ["fp8gate calibrate --recipes a,b --out '/my tables'", "fp8gate plan 'my model'"]
