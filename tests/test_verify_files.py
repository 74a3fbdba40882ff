"""`fp8gate verify --files`: tables and plans are read and checked, on a machine that has neither torch nor a GPU."""

from __future__ import annotations

import json

import pytest
from builders import make_point, make_table, write_folder
from plans import make_plan
from typer.testing import CliRunner

from fp8gate.cli import app, options
from fp8gate.filter.contract.plans.plan_file import write_plans


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(options, "find_spec", lambda name: None)
    write_folder(tmp_path, make_table(make_point(32, 64, 128)))
    write_plans([make_plan()], tmp_path / "nvidia-h200" / "plans" / "tiny.yaml")
    return tmp_path


def verify(folder, *args):
    return CliRunner().invoke(app, ["verify", "--tables", str(folder), *args])


def test_valid_files_are_counted(folder):
    result = verify(folder, "--files")
    assert (result.exit_code, result.stdout) == (0, "1 tables and 1 plans read and checked\n")


def test_as_json_they_are_named(folder):
    found = json.loads(verify(folder, "--files", "--json").stdout)
    assert found == {
        "measured": False,
        "files": [str(folder / "nvidia-h200" / "rowwise.yaml")],
        "plans": [str(folder / "nvidia-h200" / "plans" / "tiny.yaml")],
        "incomplete": {},
    }


def test_incomplete_plans_are_named(folder):
    path = folder / "nvidia-h200" / "plans" / "tiny.yaml"
    write_plans([make_plan(layers="model.layers.0", incomplete=True, missing=("model.layers.1",))], path)
    how_far = "15 visits of model.layers.0, nothing of model.layers.1"
    said = f"1 tables and 1 plans read and checked, of which incomplete: {path} ({how_far})\n"
    assert verify(folder, "--files").stdout == said
    found = json.loads(verify(folder, "--files", "--json").stdout)
    assert found["incomplete"] == {str(path): {"visits": 15, "missing": ["model.layers.1"]}}


@pytest.mark.parametrize("name", ["rowwise.yaml", "plans/tiny.yaml"])
def test_a_file_that_is_wrong_is_named(folder, name):
    (folder / "nvidia-h200" / name).write_text("schema: 2\n")
    result = verify(folder, "--files")
    assert result.exit_code == 2
    assert f"nvidia-h200/{name}: " in result.stderr


def test_measuring_needs_torch(folder):
    result = verify(folder)
    assert result.exit_code == 2
    assert "verify needs torch, torchao" in result.stderr
    assert "pip install '.[calibrate]'" in result.stderr
