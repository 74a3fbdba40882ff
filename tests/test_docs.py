"""docs/cli.md says what --help says."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import typer.main

from fp8gate.cli import app
from fp8gate.filter.contract.errors import EXIT_FOUND, EXIT_INTERRUPTED, EXIT_USAGE

SCRIPT = Path(__file__).parents[1] / "docs" / "cli.py"


def written_by_the_script():
    spec = importlib.util.spec_from_file_location("docs_cli", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.markdown()


def test_the_commands_page_is_up_to_date():
    assert SCRIPT.with_name("cli.md").read_text() == written_by_the_script(), "run: make docs"


def test_it_does_not_depend_on_the_terminal(monkeypatch):
    wide = written_by_the_script()
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERMINAL_WIDTH", "40")
    assert written_by_the_script() == wide


def test_every_command_and_option_is_on_it():
    page = written_by_the_script()
    for name, command in typer.main.get_command(app).commands.items():
        assert f"## fp8gate {name}\n" in page
        assert all(flag in page for param in command.params for flag in param.opts if flag.startswith("--"))


def test_the_exit_codes_are_those_of_the_program():
    codes = {line.split("|")[1].strip() for line in written_by_the_script().splitlines() if line.startswith("| ")}
    assert codes - {"exit code"} == {"0", *map(str, (EXIT_FOUND, EXIT_USAGE, EXIT_INTERRUPTED))}
