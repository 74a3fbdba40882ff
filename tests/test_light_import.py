"""`import fp8gate` loads nothing heavy, nor does deciding from a file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from builders import make_point, make_table, write_file

import fp8gate

HEAVY = {"torch", "torchao", "triton", "pandas", "numpy", "typer", "rich", "tabulate"}


def loaded_after(code: str) -> set[str]:
    """The top-level packages that a fresh Python has loaded after running `code`."""
    report = "import sys; print(' '.join({name.split('.')[0] for name in sys.modules}))"
    return set(run_fresh(f"{code}\n{report}").split())


def run_fresh(code: str) -> str:
    """The last line that a fresh Python prints when it runs `code`."""
    source = str(Path(fp8gate.__file__).parents[1])
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": source}
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return done.stdout.splitlines()[-1]


@pytest.fixture
def table_path(tmp_path):
    return write_file(make_table(make_point(32, 64, 128)), tmp_path / "rowwise.yaml")


DECIDE = """
from types import SimpleNamespace
from fp8gate import auto_filter
wants_float8 = auto_filter("rowwise", tokens=32, tables={path!r})
assert wants_float8(SimpleNamespace(in_features=64, out_features=128), "w1")
"""


def test_import_loads_nothing_heavy():
    loaded = loaded_after("import fp8gate")
    assert {"fp8gate", "msgspec", "yaml"} <= loaded
    assert loaded & HEAVY == set()


def test_deciding_from_a_file_loads_nothing_heavy(table_path):
    assert loaded_after(DECIDE.format(path=str(table_path))) & HEAVY == set()


def test_only_the_report_loads_rich(table_path):
    code = DECIDE.format(path=str(table_path)) + "wants_float8.report()"
    assert loaded_after(code) & HEAVY == {"rich"}


def test_asking_for_the_local_device_loads_torch():
    assert "torch" in loaded_after("from fp8gate.filter.contract.devices import local_device_name; local_device_name()")


COUNT_BUNDLED_FILES = """
import sys
opened = []
sys.addaudithook(lambda event, args: event == "open" and "bundled" in str(args[0]) and opened.append(args[0]))
import fp8gate
from fp8gate.filter.model.model_config import BUNDLED
assert "qwen3-8b" in list(BUNDLED)
{code}
print(len(opened))
"""


@pytest.mark.parametrize(("code", "files"), [("", 0), ("BUNDLED['qwen3-8b']", 1)])
def test_a_bundled_config_is_read_when_it_is_asked_for(code, files):
    assert run_fresh(COUNT_BUNDLED_FILES.format(code=code)) == str(files)
