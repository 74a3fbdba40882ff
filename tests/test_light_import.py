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
    """The top-level packages a fresh Python has loaded after running `code`."""
    source = str(Path(fp8gate.__file__).parents[1])
    report = "import sys; print(' '.join({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"],
        env={**os.environ, "PYTHONPATH": source},
        check=True,
        capture_output=True,
        text=True,
    )
    return set(done.stdout.splitlines()[-1].split())


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


def test_only_the_report_loads_tabulate(table_path):
    code = DECIDE.format(path=str(table_path)) + "wants_float8.report()"
    assert loaded_after(code) & HEAVY == {"tabulate"}


def test_asking_for_the_local_device_loads_torch():
    assert "torch" in loaded_after("from fp8gate.filter.contract.devices import local_device_name; local_device_name()")
