"""The page's contents, and `fp8gate report`: its files, its errors, its exit codes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
from builders import DEVICE, MEASURED_AT, PROTOCOL, make_point, make_table, write_file, write_folder
from msgspec.structs import replace
from PIL import Image
from typer.testing import CliRunner

import fp8gate
from fp8gate.calibrate.comparison.merge import merge_tables
from fp8gate.calibrate.report.map_figures import SOURCE
from fp8gate.calibrate.report.page.pictures import tables_hash
from fp8gate.calibrate.report.page.table_facts import STATUSES_WITHOUT_NUMBERS, provenance, quality, status_legend
from fp8gate.calibrate.report.page.write_page import by_device, write_report
from fp8gate.cli import app, options
from fp8gate.filter.contract.bounds import Bounds, RunBounds, Spread, Unaligned
from fp8gate.filter.contract.recipes import RECIPES
from fp8gate.filter.contract.table import Grid, TableError, read_table
from fp8gate.filter.decision.torchao_rule import torchao_converts

SHAPES = [(m, k, n) for m in (1024, 8192) for k in (1024, 4096) for n in (1024, 4096)]
POINT = make_table(make_point(1024, 4096, 4096))  # quick to draw
PICTURES = ("overview", "overview-narrow", "tokens", "rowwise")


def table(recipe="rowwise", speedup=1.5, **fields):
    return make_table(*(make_point(*at, speedup) for at in SHAPES), recipe=recipe, **fields)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The page of a device with a hostile name."""
    folder = tmp_path_factory.mktemp("report")
    named = table(device=replace(DEVICE, name="GPU <b>1</b>"))
    write_report([write_file(named, folder / "rowwise.yaml")], folder / "out")
    return folder / "out"


@pytest.fixture
def run():
    return lambda *args: CliRunner().invoke(app, ["report", *map(str, args)])


def test_the_page_and_each_picture_in_both_themes_are_written(report):
    names = {f"gpu-b-1-b-{name}-{theme}.png" for name in PICTURES for theme in ("light", "dark")}
    assert {path.name for path in report.iterdir()} == {"index.html", *names}


def test_the_page_needs_nothing_beside_it(report):
    html = (report / "index.html").read_text()
    assert not re.search(r"https?://|\.png|@import|<script", html)
    assert len(re.findall(r'(?:src|srcset)="data:image/png;base64,', html)) == 2 * len(PICTURES)
    assert html.count("<img") == len(PICTURES) - 1  # a narrow picture takes the place of the wide one
    assert html.count("<img") == len(re.findall(r'<img [^>]*alt="[^"]+"', html))


def test_the_verdict_is_the_first_section(report):
    html = (report / "index.html").read_text()
    assert re.search(r"<section id=\"([\w-]+)\"", html)[1] == "verdict"
    assert html.index("predicted from the table") < html.index("How to read the maps")


def test_the_numbers_of_the_maps_are_text_too(report):
    html = (report / "index.html").read_text()
    assert len(re.findall(r"<summary>rowwise, \d+ tokens: the numbers as text</summary>", html)) == 2
    assert html.count('<td class="number"><b>1.50</b></td>') == len(SHAPES)
    assert '<th scope="row">4096</th>' in html


def test_where_float8_never_wins_the_page_says_so_once_and_shows_how_much(tmp_path):
    slow = make_table(*(make_point(m, k, n, k / 10**5) for m, k, n in SHAPES))
    write_report([write_file(slow, tmp_path / "rowwise.yaml")], tmp_path / "out")
    html = (tmp_path / "out" / "index.html").read_text()
    assert html.count("float8 never wins here") == 1
    assert "the darkest red is\n0.01x, white is 1.0." in html
    assert len(set(re.findall(r'coloured" style="background: (rgb[^"]+)"', html))) > 1


def test_every_status_without_numbers_is_explained(report):
    html = (report / "index.html").read_text()
    assert len(status_legend()) == len(STATUSES_WITHOUT_NUMBERS) >= 3
    assert all(f"<b>{short}</b>: {words}" in html for short, words in status_legend().items())


def test_what_tables_say_is_text_and_no_markup(report):
    html = (report / "index.html").read_text()
    assert "<b>1</b>" not in html
    assert "GPU &lt;b&gt;1&lt;/b&gt;" in html


def test_the_recipes_that_torchao_has_no_rule_for_are_named(report):
    named = re.search(r"torchao has no rule for\s+(.*?)\.</li>", (report / "index.html").read_text())
    answers = {recipe: torchao_converts(recipe, in_features=4096, out_features=4096) for recipe in RECIPES}
    assert named[1] == ", ".join(recipe for recipe, answer in answers.items() if answer is None)


def test_models_and_provenance_are_on_the_page(report):
    html = (report / "index.html").read_text()
    assert "llama3-405b, TP 8" in html
    assert "1.50 ✓" in html
    assert f"<td>{DEVICE.capability}</td>" in html.replace(' colspan="1"', "")


def test_a_picture_names_its_tables(report):
    written = read_table(report.parent / "rowwise.yaml")
    assert Image.open(report / "gpu-b-1-b-rowwise-dark.png").text[SOURCE] == tables_hash([written])
    assert tables_hash([written]) != tables_hash([table(speedup=1.4)])
    assert tables_hash([table(), table("tensorwise")]) == tables_hash([table("tensorwise"), table()])


def test_quality_counts_what_is_not_as_it_should_be():
    odd = (make_point(1024, 512, 512, status="failed"), make_point(1024, 512, 1024, 1.0, status="ambiguous"))
    off_grid = make_point(1536, 1024, 1024)
    grid = Grid(m=(1024,), k=(512, 1024), n=(512, 1024))
    spread = Spread(points=20, median=0.006, p95=0.039, worst=0.071)
    found = quality(make_table(*odd, off_grid, grid=grid, protocol=replace(PROTOCOL, spread=spread, controls=spread)))
    assert list(found.values()) == [
        "3",
        "1",
        "1",
        "1 failed",
        "0, 2",
        "1",
        "20 points, 0.6% apart (median), 3.9% (95th percentile), 7.1% (worst)",
        "what varies within one run",
        "not measured",
        "one device",
        "20 points, 0.6% apart (median), 3.9% (95th percentile), 7.1% (worst); measured again beyond 0.5% and chance",
    ]


def test_quality_tells_what_the_bounds_cover():
    part = RunBounds(coverage=0.95, within=0.004, between=0.069, repeats=40)
    found = quality(table(protocol=replace(PROTOCOL, bounds=Bounds(below_120_us=part))))
    expected = "below 120 us: 95.0% of the points in another sweep, by 6.9% beside 0.4% within one run (40 repeats)"
    assert found["bounds cover"] == expected
    found = quality(table(protocol=replace(PROTOCOL, bounds=Bounds(below_120_us=part, board_us=1.5))))
    boards = "; and boards that differ by 1.5 us in each direction of bf16 and float8"
    assert found["bounds cover"] == expected + boards


def test_quality_tells_the_factor_for_unaligned_tokens():
    found = quality(table(protocol=replace(PROTOCOL, unaligned=Unaligned(points=8, factor=0.931))))
    assert found["tokens that are no multiple of 128"] == "0.93 of the speedup between multiples of 128 (8 points)"


def test_provenance_names_the_sweeps_of_a_merged_table():
    one, later = table(), table(measured_at=MEASURED_AT + timedelta(1))
    merged = merge_tables({"one": one, "later": later})
    found = provenance({"rowwise": (Path("r.yaml"), merged), "tensorwise": (Path("t.yaml"), table("tensorwise"))})
    sweeps, nothing = found["merged from"]
    assert re.fullmatch(r"2026-11-24 10:00 UTC \(sha256 \w{12}\), 2026-11-25 10:00 UTC \(sha256 \w{12}\)", sweeps)
    assert nothing == ""
    assert "merged from" not in provenance({"rowwise": (Path("r.yaml"), one)})


def test_quality_tells_of_several_devices():
    between = Spread(points=8, median=0.01, p95=0.02, worst=0.03)
    found = quality(table(protocol=replace(PROTOCOL, devices=2, between=between)))
    assert found["on several devices"].startswith("8 points, 1.0% apart")
    assert found["again by another process"] == "not measured"


def test_recipes_of_a_device_are_put_together_in_their_usual_order(tmp_path):
    one, other = write_file(table(), tmp_path / "b.yaml"), write_file(table("tensorwise"), tmp_path / "a.yaml")
    elsewhere = write_file(table(device=replace(DEVICE, name="NVIDIA B200")), tmp_path / "c.yaml")
    found = by_device([one, elsewhere, other])
    assert {device: [*map(str, tables)] for device, tables in found.items()} == {
        "NVIDIA H200": ["tensorwise", "rowwise"],
        "NVIDIA B200": ["rowwise"],
    }


def test_a_table_of_fp8gates_casts_stands_beside_that_of_inductors(tmp_path):
    ours = replace(table(speedup=1.75), protocol=replace(PROTOCOL, casts="fp8gate"))
    folder = write_folder(tmp_path / "tables", table(speedup=1.25), ours) / "nvidia-h200"
    files = write_report([folder], tmp_path / "out")
    html = files[0].read_text()
    assert "nvidia-h200-rowwise-fp8gate_casts-light.png" in {path.name for path in files}
    assert "Speedup of rowwise, fp8gate&#39;s casts at 8192 tokens" in html
    assert "Speedup of rowwise at 8192 tokens" in html
    assert "1.75" in html
    assert "1.25" in html


def test_two_tables_of_one_recipe_and_device_are_refused(tmp_path):
    one, again = (write_file(table(), tmp_path / name) for name in ("a.yaml", "b.yaml"))
    with pytest.raises(TableError, match=re.escape(f"{again}: $.recipe: expected one table of rowwise")):
        by_device([one, again])


def test_the_command_says_what_it_wrote(run, tmp_path):
    folder = write_folder(tmp_path / "tables", POINT) / "nvidia-h200"
    result = run(folder, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0] == f"wrote {tmp_path / 'out' / 'index.html'}"
    assert len(result.stdout.splitlines()) == 1 + 2 * len(PICTURES)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (None, "a.yaml: "),
        ("schema: 2\n", "$.schema: expected 1"),
    ],
)
def test_what_cannot_be_read_is_exit_code_2(run, tmp_path, text, complaint):
    path = tmp_path / "a.yaml"
    if text:
        path.write_text(text)
    result = run(path, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stderr.startswith(f"fp8gate: {path}: ")
    assert complaint in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_written_is_exit_code_2(run, tmp_path):
    path = write_file(table(), tmp_path / "a.yaml")
    result = run(path, "--out", path)
    assert result.exit_code == 2
    assert str(path) in result.stderr


def test_a_thresholds_folder_with_one_device_is_that_device(run, tmp_path):
    result = run(write_folder(tmp_path / "tables", POINT), "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "nvidia-h200-rowwise-dark.png").exists()


def test_a_thresholds_folder_with_several_devices_is_refused_with_the_command_for_each(run, tmp_path):
    elsewhere = table(device=replace(DEVICE, name="NVIDIA B200"))
    folder = write_folder(tmp_path / "my tables", table(), elsewhere)
    result = run(folder, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert f"{folder}: expected the tables of one device, found nvidia-b200, nvidia-h200;" in result.stderr
    for device in ("nvidia-b200", "nvidia-h200"):
        assert f"fp8gate report '{folder / device}' --out {tmp_path / 'out'}" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_folder_without_tables_is_exit_code_2(run, tmp_path):
    result = run(tmp_path, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "found no table" in result.stderr


DRAW_WITHOUT = """
import sys
for name in ("torch", "torchao", "triton", "pandas", "pynvml"):
    sys.modules[name] = None  # as if it were not installed
from fp8gate.cli import app
app(["report", {path!r}, "--out", {out!r}], standalone_mode=False)
"""


def test_it_draws_where_only_the_report_extra_is_installed(tmp_path):
    path, out = write_file(POINT, tmp_path / "rowwise.yaml"), tmp_path / "out"
    done = run_fresh(DRAW_WITHOUT.format(path=str(path), out=str(out)))
    assert done.returncode == 0, done.stderr
    assert (out / "index.html").exists()


IMPORT_ALL = """
import importlib, pkgutil, sys
import fp8gate.cli.report
import fp8gate.calibrate.report as report
names = [found.name for found in pkgutil.walk_packages(report.__path__, report.__name__ + ".")]
for name in names:
    importlib.import_module(name)
print(len(names), sorted({"torch", "torchao", "triton"} & sys.modules.keys()))
"""


def test_nothing_that_reports_imports_torch():
    count, loaded = run_fresh(IMPORT_ALL).stdout.split(maxsplit=1)
    assert int(count) > 10
    assert loaded.strip() == "[]"


def run_fresh(code):
    """A fresh Python that runs `code`."""
    environment = {**os.environ, "PYTHONPATH": str(Path(fp8gate.__file__).parents[1])}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("missing", ["jinja2", "matplotlib"])
def test_without_the_extra_it_says_what_to_install(run, monkeypatch, tmp_path, missing):
    monkeypatch.setattr(options, "find_spec", lambda name: None if name == missing else object())
    result = run(tmp_path)
    assert result.exit_code == 2
    assert result.stderr == f"fp8gate: report needs {missing}; in a checkout: pip install '.[report]'\n"
