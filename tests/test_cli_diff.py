"""`fp8gate diff`: files and folders, exit codes for CI, and output for people and programs."""

from __future__ import annotations

import json
from datetime import timedelta

import msgspec
import pytest
from builders import DEVICE, MEASURED_AT, PROTOCOL, make_point, make_table, write_file, write_folder
from typer.testing import CliRunner

from fp8gate.calibrate.comparison.merge import merge_tables
from fp8gate.cli import app
from fp8gate.filter.contract.bounds import Spread

SHAPES = [(1024, k, n) for k in (1024, 2048, 4096) for n in (1024, 2048, 4096)]


@pytest.fixture
def diff():
    return lambda *args: CliRunner().invoke(app, ["diff", *map(str, args)])


def table(factor=1.0, **fields):
    return make_table(
        *(make_point(*shape, 1.5 * (factor if i == 0 else 1.0)) for i, shape in enumerate(SHAPES)), **fields
    )


def test_the_same_table_twice_has_no_findings(diff, tmp_path):
    path = write_file(table(), tmp_path / "a.yaml")
    result = diff(path, path)
    assert result.exit_code == 0, result.output
    assert "0 points changed beyond chance" in result.stdout


def test_a_planted_change_is_exit_code_1(diff, tmp_path):
    result = diff(write_file(table(), tmp_path / "a.yaml"), write_file(table(1.3), tmp_path / "b.yaml"))
    assert result.exit_code == 1
    assert "(1024, 1024, 1024)" in result.stdout


@pytest.mark.parametrize(("p95", "exit_code"), [(0.06, 0), (1.75, 1)])
def test_tables_that_cannot_tell_are_exit_code_1(diff, tmp_path, p95, exit_code):
    """One repeat that was 175 % off: no change of any point would show."""
    spread = Spread(points=1, median=p95, p95=p95, worst=p95)
    path = write_file(table(protocol=msgspec.structs.replace(PROTOCOL, spread=spread)), tmp_path / "a.yaml")
    result = diff(path, path)
    assert result.exit_code == exit_code, result.output
    assert "0 points changed beyond chance" in result.stdout
    assert ("cannot tell whether points changed" in result.stdout) is bool(exit_code)
    (comparison,) = json.loads(diff(path, path, "--json").stdout)["comparisons"]
    assert (comparison["findings"], comparison["can_tell"]) == (False, not exit_code)


def test_folders_are_compared_recipe_by_recipe(diff, tmp_path):
    before = write_folder(tmp_path / "a", table(), table(recipe="tensorwise"))
    after = write_folder(tmp_path / "b", table(1.3, recipe="tensorwise"), table(recipe="rowwise_with_gw_hp"))
    result = diff(before / "nvidia-h200", after / "nvidia-h200", "--json")
    (comparison,) = json.loads(result.stdout)["comparisons"]
    assert (comparison["recipe"], comparison["findings"], result.exit_code) == ("tensorwise", True, 1)


def test_no_name_is_markup_in_markdown(diff, tmp_path):
    device = msgspec.structs.replace(DEVICE, name="H200 <img src=x> *really* `now` | a_b")
    path = write_file(make_table(make_point(16, 32, 48), device=device), tmp_path / "t.yaml")
    heading = diff(path, path, "--markdown").stdout.splitlines()[0]
    assert "H200 \\<img src=x\\> \\*really\\* \\`now\\` \\| a\\_b, torch" in heading
    assert device.name in diff(path, path).stdout


def test_markdown_is_for_pull_requests(diff, tmp_path):
    path = write_file(table(), tmp_path / "a.yaml")
    assert diff(path, path, "--markdown").stdout.startswith("### rowwise: NVIDIA H200")


def test_a_merged_table_is_told_by_its_sweeps(diff, tmp_path):
    one = table()
    both = merge_tables({"one": one, "later": table(1.01, measured_at=MEASURED_AT + timedelta(1))})
    files = [write_file(each, tmp_path / f"{i}.yaml") for i, each in enumerate((one, both))]
    title = diff(*files).stdout.splitlines()[0]
    assert title.count("2026-11-25, 2 sweeps merged") == title.count("sweeps merged") == 1
    (compared,) = json.loads(diff(*files, "--json").stdout)["comparisons"]
    assert compared["before"]["merged_from"] is None
    assert [sweep["measured_at"][:10] for sweep in compared["after"]["merged_from"]] == ["2026-11-24", "2026-11-25"]


def test_committed_sweeps_of_one_gpu_do_not_differ_in_decisions(diff, request):
    """Real ones, of one NVIDIA H200 each, kernels tuned by Inductor's own timing: a few of the shortest differ."""
    root = request.config.rootpath
    result = diff(root / "benchmarks/data/nvidia-h200-second-sweep", root / "thresholds/nvidia-h200", "--json")
    assert result.exit_code == 0
    for comparison in json.loads(result.stdout)["comparisons"]:
        assert comparison["can_tell"]
        assert abs(comparison["shift"]["estimate"] - 1) < 0.005
        assert all(not flip["beyond_chance"] for flip in comparison["flips"])
        assert len(comparison["changed"]) < 0.03 * comparison["points"]


@pytest.mark.parametrize("missing", ["before", "after"])
def test_what_is_not_there_is_exit_code_2(diff, tmp_path, missing):
    path, nothing = write_file(table(), tmp_path / "a.yaml"), tmp_path / "nothing"
    result = diff(*((nothing, path) if missing == "before" else (path, nothing)))
    assert result.exit_code == 2
    assert f"{nothing}: expected a table, or a folder of tables" in result.stderr


def test_tables_of_different_recipes_only_are_exit_code_2(diff, tmp_path):
    one, other = write_file(table(), tmp_path / "a.yaml"), write_file(table(recipe="tensorwise"), tmp_path / "b.yaml")
    result = diff(one, other)
    assert result.exit_code == 2
    assert "found rowwise and tensorwise" in result.stderr
