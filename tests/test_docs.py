"""What is written about the program by the program: docs/cli.md, the schemas, the website, the citation."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec

import msgspec
import pytest
import typer.main
import yaml
from documents import ROOT, script

import fp8gate
from fp8gate.cli import app
from fp8gate.filter.contract.errors import EXIT_FOUND, EXIT_INTERRUPTED, EXIT_USAGE
from fp8gate.filter.contract.plain_yaml import load_plain_yaml

CLI = script("cli")
SCHEMA = script("schema")
TABLES = sorted((ROOT / "thresholds").glob("*/*.yaml"))
PLANS = sorted((ROOT / "thresholds").glob("*/plans/*.yaml"))


def test_the_commands_page_is_up_to_date():
    assert CLI.PATH.read_text() == CLI.markdown(), "run: make docs"


def test_it_does_not_depend_on_the_terminal(monkeypatch):
    wide = CLI.markdown()
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERMINAL_WIDTH", "40")
    assert CLI.markdown() == wide


def test_every_command_and_option_is_on_it():
    page = CLI.markdown()
    for name, command in typer.main.get_command(app).commands.items():
        assert f"## fp8gate {name}\n" in page
        assert all(flag in page for param in command.params for flag in param.opts if flag.startswith("--"))


def test_the_exit_codes_are_those_of_the_program():
    codes = {line.split("|")[1].strip() for line in CLI.markdown().splitlines() if line.startswith("| ")}
    assert codes - {"exit code"} == {"0", *map(str, (EXIT_FOUND, EXIT_USAGE, EXIT_INTERRUPTED))}


@pytest.mark.parametrize(("path", "text"), SCHEMA.schemas().items(), ids=lambda value: getattr(value, "name", ""))
def test_a_schema_is_that_of_the_types(path, text):
    assert path.read_text() == text, "run: make docs"


def validator(kind):
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((SCHEMA.FOLDER / f"{kind}.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def as_json(path):
    """A file's only document."""
    (document,) = documents_of(path)
    return document


def documents_of(path):
    texts = path.read_text().split("---\n")
    return [msgspec.to_builtins(load_plain_yaml(text, source=str(path), error=ValueError)) for text in texts]


@pytest.mark.parametrize(
    ("kind", "path"),
    [*(("table", path) for path in TABLES), *(("plan", path) for path in PLANS)],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_committed_file_follows_its_schema(kind, path):
    for document in documents_of(path):
        assert list(validator(kind).iter_errors(document)) == []


@pytest.mark.parametrize(
    "change",
    [
        {"recipe": "blockwise"},
        {"schema": 2},
        {"columns": ["m", "k", "n"]},
        {"notes": "a key that no table has"},
        {"points": [[8192, 4096, 1024, 94.0]]},
        {"points": [[0, 4096, 1024, *[1.0] * 7, "measured"]]},
        {"points": [[8192, 4096, 1024, *[1.0] * 7, "fine"]]},
    ],
)
def test_an_editor_finds_what_is_no_table(change):
    table = as_json(TABLES[0])
    assert not validator("table").is_valid({**table, **change})
    missing = next(iter(change)) if next(iter(change)) in table else "schema"
    assert not validator("table").is_valid({key: value for key, value in table.items() if key != missing})


def test_a_table_may_name_its_schema_in_its_first_line(tmp_path):
    (line,) = re.findall(r"^# yaml-language-server: .*$", (ROOT / "docs" / "table-format.md").read_text(), flags=re.M)
    assert (ROOT / line.partition("$schema=")[2]).is_file()
    named = tmp_path / "rowwise.yaml"
    named.write_text(f"{line}\n{TABLES[0].read_text()}")
    assert fp8gate.read_table(named) == fp8gate.read_table(TABLES[0])


def build(folder, site):
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


needs_mkdocs = pytest.mark.skipif(find_spec("mkdocs") is None, reason="not installed: mkdocs")


@needs_mkdocs
def test_the_pages_build_without_a_warning_and_load_nothing_from_elsewhere(tmp_path):
    result = build(ROOT, tmp_path)
    assert result.returncode == 0, result.stderr
    assert [line for line in result.stderr.splitlines() if not line.startswith("INFO ")] == []
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"}
    assert {f"{page}/index.html" for page in pages} | {"index.html", "schema/table.schema.json"} <= written
    assert not [name for name in written if name.endswith((".py", ".pyc"))]
    for page in tmp_path.rglob("*.html"):
        loaded = re.findall(
            r"<(?:script|link|img|source)\b[^>]*(?:src|srcset|href)=\"?(?:https?:)?//", page.read_text()
        )
        assert loaded == [], page


@needs_mkdocs
def test_a_link_that_leads_nowhere_fails_the_build(tmp_path):
    for name in ("mkdocs.yml", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    with (tmp_path / "docs" / "limits.md").open("a") as page:
        page.write("\n[gone](gone.md)\n")
    result = build(tmp_path, tmp_path / "site")
    assert result.returncode == 1
    assert "gone.md" in result.stdout + result.stderr


def test_every_page_says_first_what_it_is_for():
    for path in sorted((ROOT / "docs").glob("*.md")):
        if path.name in ("changelog.md", "cli.md"):
            continue
        title, _, first, *_ = path.read_text().splitlines()
        assert title.startswith("# "), path
        assert re.match(r"`?\w", first), path


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == fp8gate.__version__
    assert (citation["cff-version"], citation["license"]) == ("1.2.0", "BSD-3-Clause")
    assert citation["authors"] == [{"name": "The fp8gate authors"}]
    assert {"message", "title", "type"} <= citation.keys()


def test_the_workflow_runs_what_continuous_integration_runs():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    commands = {name: [step["run"] for step in job["steps"] if "run" in step] for name, job in workflow["jobs"].items()}
    assert commands == {"check": [".ci/run"], "torch": ["make test-torch TORCH=${{ matrix.torch }}"]}
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
