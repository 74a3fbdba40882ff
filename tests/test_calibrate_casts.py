"""Sweeps, plans and comparisons of fp8gate's casts: their files, and that they never mix with those of Inductor's."""

from __future__ import annotations

import dataclasses
import json
import re
import tempfile
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import torch
from builders import PROTOCOL as TABLE_PROTOCOL
from builders import make_point, make_table, write_file, write_folder
from msgspec.structs import replace
from plans import PROTOCOL as PLAN_PROTOCOL
from plans import Block, block_input, make_plan
from samples import PROTOCOL, SETUP, quick_points
from test_light_import import loaded_after
from typer.testing import CliRunner

from fp8gate.calibrate.arms.blueprint import Blueprint
from fp8gate.calibrate.comparison import verify as verify_module
from fp8gate.calibrate.comparison.compare_tables import compare_tables
from fp8gate.calibrate.comparison.merge import merge_tables
from fp8gate.calibrate.device.cpu import Cpu
from fp8gate.calibrate.device.registry import describe_device
from fp8gate.calibrate.planning.block_worker import BlockBench, PlanJob
from fp8gate.calibrate.planning.plan_block import plan_subject
from fp8gate.calibrate.planning.plan_protocol import make_protocol
from fp8gate.calibrate.planning.search import BF16_SET, CONTROL_SET
from fp8gate.calibrate.planning.subject import Subject, plan_path
from fp8gate.calibrate.points import setup as set_ups
from fp8gate.calibrate.points.ready_point import make_ready
from fp8gate.calibrate.points.setup import make_setup
from fp8gate.calibrate.points.task_queue import Task
from fp8gate.calibrate.report.plan_text import plan_json, plan_text
from fp8gate.calibrate.sweep.run_sweep import SweepResult, sweep
from fp8gate.casts import is_enabled
from fp8gate.cli import app
from fp8gate.filter.contract import software_check
from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.contract.plans.plan_file import read_plans, write_plans
from fp8gate.filter.contract.recipes import RECIPES, SEE_BOTH_CASTS, Variant
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.contract.table import Grid, TableError, read_table

CPU = torch.device("cpu")
THRESHOLDS = Path(__file__).parents[1] / "thresholds"
OURS = Variant("rowwise", "fp8gate")
HERE = describe_device(CPU)
SHAPES = [LinearShape(16, k, n) for k in (16, 32) for n in (16, 32)]
SETUP_OF_CASTS = replace(SETUP, protocols={"rowwise": replace(PROTOCOL, casts="fp8gate")})


@pytest.fixture(autouse=True)
def _quick(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("locks")))
    with quick_points():
        yield


def table(speedup=1.5, *, ours=False, **fields):
    protocol = replace(TABLE_PROTOCOL, casts="fp8gate") if ours else TABLE_PROTOCOL
    points = [make_point(*shape, speedup) for shape in ((16, 16, 16), (16, 32, 32), (32, 64, 64))]
    return make_table(*points, **{"protocol": protocol, **fields})


# --- sweeps ----------------------------------------------------------------------------------------------------


def test_the_set_up_is_of_the_recipes_that_have_the_casts(monkeypatch):
    assert list(make_setup(CPU).protocols) == list(RECIPES)
    with monkeypatch.context() as compiling:
        compiling.setattr(Cpu, "defaults", dataclasses.replace(Cpu.defaults, compiles=True))
        found = make_setup(CPU, "fp8gate")
    assert {recipe: found.variant(recipe) for recipe in found.protocols} == {"rowwise": OURS}
    assert make_setup(CPU).fingerprint != found.fingerprint


def test_where_nothing_is_compiled_casts_are_refused_in_the_same_words():
    said = r"^casts: says how Inductor compiles; on a CPU nothing is compiled$"
    with pytest.raises(InputError, match=said):
        make_setup(CPU, "fp8gate")
    with pytest.raises(InputError, match=said):
        make_protocol(CPU, "rowwise", casts="fp8gate")
    with pytest.raises(InputError, match=said.replace("casts", "emulate_precision_casts")):
        make_protocol(CPU, "rowwise", True)


def test_the_default_has_the_journal_that_it_had():
    """What was begun by an earlier release goes on: nothing new is in what its name is made of."""
    assert b'"casts"' not in msgspec.json.encode(SETUP)
    assert b'"casts"' in msgspec.json.encode(SETUP_OF_CASTS)


def test_tables_and_journals_of_both_casts_lie_side_by_side(tmp_path):
    grid = Grid(m=(16,), k=(16, 32), n=(16, 32))
    for setup in (SETUP, SETUP_OF_CASTS):
        options = {"recipes": ["rowwise"], "device": CPU, "setup": setup, "out": tmp_path, "workers": 0}
        result = sweep(grid, SHAPES, **options)
        assert [one.variant for one in result.tables.values()] == [setup.variant("rowwise")]
    (folder,) = tmp_path.iterdir()
    assert sorted(path.name for path in folder.glob("*.yaml")) == ["rowwise-fp8gate_casts.yaml", "rowwise.yaml"]
    assert len(list(folder.glob("journal-*.jsonl"))) == 2
    assert read_table(folder / OURS.file).protocol.casts == "fp8gate"
    for journal in folder.glob("journal-*.jsonl"):
        journal.unlink()
    with pytest.raises(InputError, match=r"rowwise-fp8gate_casts\.yaml: 3 of its points are not in this sweep"):
        sweep(Grid(), SHAPES[:1], **options)


def test_points_are_compiled_with_the_protocols_casts(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "fp8gate.calibrate.points.ready_point.compiled_linear", lambda *args: asked.append(args[-1]) or args
    )
    for casts in ("inductor", "fp8gate"):
        make_ready(Task(SHAPES[0]), {"rowwise": replace(PROTOCOL, compile=True, casts=casts)}, CPU)
    assert asked == ["inductor", "fp8gate"]


# --- plans -----------------------------------------------------------------------------------------------------


def test_only_float8_sets_are_compiled_with_the_casts(monkeypatch):
    asked = []
    monkeypatch.setattr(Blueprint, "ready", lambda self, roles, *args: asked.append((sorted(roles), args[-1])))
    protocol = replace(PLAN_PROTOCOL, compile=True, casts="fp8gate")
    blueprint = Blueprint.of(Block(), [block_input()], recomputed=False)
    bench = BlockBench(PlanJob(blueprint=blueprint, recipe="rowwise", protocol=protocol, device=CPU))
    for roles in (BF16_SET, CONTROL_SET, frozenset({"inner"})):
        bench.compile(roles)
    assert asked == [([], "inductor"), ([], "inductor"), (["inner"], "fp8gate")]


def test_a_plans_protocol_and_file_say_the_casts(tmp_path):
    protocol = make_protocol(torch.device("cuda"), "rowwise", casts="fp8gate")
    assert (protocol.casts, make_protocol(torch.device("cuda"), "rowwise").casts) == ("fp8gate", "inductor")
    subject = Subject(
        name="tiny",
        blueprint=Blueprint.of(Block(), [block_input()], recomputed=False),
        whole={"inner": (32, 64), "outer": (64, 32)},
        tokens=32,
    )
    assert plan_path(tmp_path, [subject], OURS, CPU).name == "tiny-rowwise-m32-fp8gate_casts.yaml"
    found = make_plan(protocol=replace(PLAN_PROTOCOL, casts="fp8gate"))
    assert "rowwise, fp8gate's casts" in plan_text(found)
    assert plan_json(found)["protocol"]["casts"] == "fp8gate"
    assert "casts" not in plan_json(make_plan())["protocol"]


@pytest.mark.parametrize("ours", [False, True])
def test_a_plan_starts_from_the_table_of_its_casts(tmp_path, ours):
    """With the others' casts every linear wins, with its own none does."""
    write_folder(tmp_path, *(table(0.5 if one == ours else 2.0, ours=one, device=HERE) for one in (False, True)))
    blueprint = Blueprint.of(Block(), [block_input()], recomputed=False)
    subject = Subject(name="tiny", blueprint=blueprint, whole={"inner": (32, 64), "outer": (64, 32)}, tokens=32)
    protocol = replace(PLAN_PROTOCOL, casts="fp8gate" if ours else "inductor")
    found = plan_subject(subject, recipe="rowwise", device=CPU, protocol=protocol, tables=tmp_path, workers=0)
    assert found.protocol.casts == protocol.casts
    assert found.table.convert == ()
    said = []
    other = write_file(table(ours=not ours, device=HERE), tmp_path / "other.yaml")
    plan_subject(subject, recipe="rowwise", device=CPU, protocol=protocol, tables=other, workers=0, say=said.append)
    advice = "leave out --casts" if ours else "add --casts fp8gate; so the search"
    assert advice in "".join(said)


# --- comparisons -----------------------------------------------------------------------------------------------


def test_tables_of_different_casts_are_not_merged():
    kind = r"^b: protocol\.casts is fp8gate, but inductor in a; only tables of one kind can be merged"
    with pytest.raises(TableError, match=rf"{kind}: {re.escape(SEE_BOTH_CASTS)}$"):
        merge_tables({"a": table(), "b": table(ours=True)})
    with pytest.raises(TableError, match=r"only tables of one kind can be merged$"):
        merge_tables({"a": table(), "b": table(recipe="tensorwise")})
    assert merge_tables({"a": table(ours=True), "b": table(1.6, ours=True)}).variant == OURS


def test_tables_of_different_casts_are_not_compared(tmp_path):
    with pytest.raises(
        TableError, match=r"^protocol\.casts: inductor and fp8gate; only tables of the same casts .*report FOLDER"
    ):
        compare_tables(table(), table(ours=True), min_speedup=1.05)
    files = [write_file(table(ours=ours), tmp_path / f"{ours}.yaml") for ours in (False, True)]
    result = CliRunner().invoke(app, ["diff", *map(str, files)])
    assert result.exit_code == 2
    assert "expected tables of the same recipe and casts; found rowwise and rowwise, fp8gate's casts" in result.stderr
    assert result.stderr.endswith(f"{SEE_BOTH_CASTS}\n")
    other = write_file(table(recipe="tensorwise"), tmp_path / "tensorwise.yaml")
    assert "FOLDER" not in CliRunner().invoke(app, ["diff", str(files[0]), str(other)]).stderr


def test_folders_are_compared_casts_by_casts(tmp_path):
    before, after = (write_folder(tmp_path / name, table(), table(ours=True)) / "nvidia-h200" for name in "ab")
    result = CliRunner().invoke(app, ["diff", str(before), str(after), "--json"])
    comparisons = json.loads(result.stdout)["comparisons"]
    assert [(one["recipe"], one.get("casts")) for one in comparisons] == [("rowwise", None), ("rowwise", "fp8gate")]


def test_tables_are_verified_with_their_own_casts(tmp_path, monkeypatch):
    folder = write_folder(tmp_path, table(device=HERE), table(ours=True, device=HERE))
    asked = []

    def again(grid, shapes, *, recipes, setup, **_):
        asked.append((recipes, setup))
        found = table(2.0, ours=setup == "fp8gate", device=HERE)
        return SweepResult({Path("t"): found}, SimpleNamespace(noise={}), 0, {}, {})

    monkeypatch.setattr(verify_module, "sweep", again)
    real = verify_module.make_setup
    monkeypatch.setattr(verify_module, "make_setup", lambda device, casts=None: casts or real(device))
    result = CliRunner().invoke(app, ["verify", "--tables", str(folder), "--device", "cpu", "--json"])
    found = json.loads(result.stdout)
    assert asked == [(["rowwise"], "inductor"), (["rowwise"], "fp8gate")]
    assert [one.get("casts") for one in found["comparisons"]] == [None, "fp8gate"]


# --- the command line ------------------------------------------------------------------------------------------


@pytest.fixture
def swept(monkeypatch):
    """What `fp8gate calibrate` asks of a sweep; its set-up stands in for the one of a GPU."""
    asked = {}
    monkeypatch.setattr(set_ups, "make_setup", lambda device, casts: asked.update(casts=casts) or SETUP_OF_CASTS)

    def sweep_nothing(grid, shapes, **options):
        asked.update(options)
        found = table(ours=True)
        return SweepResult({Path("t/rowwise-fp8gate_casts.yaml"): found}, _Report(), 0, {}, {})

    monkeypatch.setattr("fp8gate.calibrate.sweep.run_sweep.sweep", sweep_nothing)
    return asked


class _Report:
    too_noisy = None

    def text(self):
        return "report"


def calibrate(*args):
    return CliRunner().invoke(app, ["calibrate", "--grid", "quick", "--device", "cpu", "--workers", "0", *args])


@pytest.mark.parametrize("recipes", [[], ["--recipes", "rowwise"]])
def test_calibrate_measures_the_recipes_that_have_the_casts(swept, tmp_path, recipes):
    result = calibrate("--casts", "fp8gate", "--out", str(tmp_path), *recipes)
    assert result.exit_code == 0, result.output
    assert (swept["casts"], swept["recipes"]) == ("fp8gate", ("rowwise",))
    assert "rowwise, fp8gate's casts speedup, 16 tokens" in result.stdout
    assert "    from fp8gate import auto_filter, casts\n\n    casts.enable()  # before anything is" in result.stdout


def test_calibrate_refuses_recipes_without_the_casts_and_a_cpu():
    result = calibrate("--casts", "fp8gate", "--recipes", "rowwise,tensorwise")
    assert result.exit_code == 2
    assert "casts: expected inductor for tensorwise; got 'fp8gate'" in result.stderr
    result = calibrate("--casts", "fp8gate")
    assert result.exit_code == 2
    assert "casts: says how Inductor compiles; on a CPU nothing is compiled" in result.stderr


def explain(folder, *args, tokens=16):
    layers = ["--linear", "wq,32,32,1", "--tokens", str(tokens), "--device", "H200", "--tables", str(folder)]
    return CliRunner().invoke(app, ["explain", *layers, *args])


def test_explain_asks_for_the_casts_and_says_them(tmp_path):
    """Whatever is on in its own process."""
    folder = write_folder(tmp_path, table(0.5), table(2.0, ours=True), table(2.0, recipe="tensorwise"))
    plain, ours = explain(folder, "--recipe", "rowwise"), explain(folder, "--recipe", "rowwise", "--casts", "fp8gate")
    assert plain.stdout.count("casts") == 2
    assert "\n\nThis was measured with fp8gate's casts too: --casts fp8gate\n" in plain.stdout
    assert "casts" not in explain(folder, "--recipe", "rowwise", "--casts", "inductor").stdout
    assert "casts" not in explain(folder, "--recipe", "tensorwise").stdout
    assert "rowwise, fp8gate's casts, NVIDIA H200" in ours.stdout
    assert ours.stdout.count("fp8gate's casts") == 1  # the title says it, and no row again
    assert (
        json.loads(explain(folder, "--recipe", "rowwise", "--casts", "fp8gate", "--json").stdout)["casts"] == "fp8gate"
    )
    assert explain(folder, "--recipe", "rowwise", "--casts", "fp8gate", "--strict").exit_code == 0
    assert "casts" not in json.loads(explain(folder, "--recipe", "rowwise", "--json").stdout)
    refused = explain(folder, "--recipe", "tensorwise", "--casts", "fp8gate")
    assert refused.exit_code == 2


def test_explain_tells_what_the_block_gains_with_the_casts():
    """Where a plan of them fits."""
    asked = ["explain", "llama3-8b", "--tokens", "8192", "--tables", str(THRESHOLDS)]

    def said(*args):
        return CliRunner().invoke(app, [*asked, *args]).stdout

    device = THRESHOLDS / "nvidia-h100-80gb-hbm3"
    plan = read_plans(device / "plans" / "llama3-8b-rowwise-m8192-fp8gate_casts.yaml")[0]
    gain = f"the block {plan.chosen.speedup:.3f}x"
    remark = f"This was measured with fp8gate's casts too, {gain}: --casts fp8gate\n"
    assert f"\n\n{remark}" in said("--device", "H100", "--recipe", "rowwise")
    assert f"\n\nrowwise: {remark}" in said("--device", "H100", "--recipe", "all")
    assert "casts too: --casts" in said("--device", "H100", "--recipe", "rowwise", "--plan", "none")
    assert "casts too" not in said("--device", "H100", "--recipe", "rowwise", "--casts", "fp8gate")
    assert "casts too" not in said("--device", "H200", "--recipe", "rowwise")
    of_a_file = CliRunner().invoke(app, [*asked[:-1], str(device / "rowwise.yaml"), "--recipe", "rowwise"])
    assert of_a_file.exit_code == 0
    assert "casts too" not in of_a_file.stdout


def test_explain_takes_the_casts_of_the_environment(tmp_path, monkeypatch):
    """As training would. An option that is given wins, and nothing is turned on in its own process."""
    folder = write_folder(tmp_path, table(0.5), table(2.0, ours=True), table(2.0, recipe="tensorwise"))

    def found(*args):
        return json.loads(explain(folder, *args, "--json").stdout).get("casts", "inductor")

    monkeypatch.setenv("FP8GATE_CASTS", "1")
    assert found("--recipe", "rowwise") == "fp8gate"
    assert found("--recipe", "rowwise", "--casts", "inductor") == "inductor"
    assert found("--recipe", "tensorwise") == "inductor"
    assert not is_enabled()
    monkeypatch.setenv("FP8GATE_CASTS", "0")
    assert found("--recipe", "rowwise") == "inductor"
    assert found("--recipe", "rowwise", "--casts", "fp8gate") == "fp8gate"
    monkeypatch.setenv("FP8GATE_CASTS", "yes")
    refused = explain(folder, "--recipe", "rowwise")
    assert refused.exit_code == 2
    assert "FP8GATE_CASTS: expected 1 to replace casts, or 0; got 'yes'" in refused.stderr


def test_explain_loads_nothing_heavy_whatever_the_environment_asks_for(tmp_path, monkeypatch):
    folder = write_folder(tmp_path, table(2.0, ours=True))
    monkeypatch.setenv("FP8GATE_CASTS", "1")
    layers = ["--linear", "wq,32,32,1", "--tokens", "16", "--device", "H200", "--tables", str(folder)]
    loaded = loaded_after(
        f"from fp8gate.cli import app\napp({['explain', *layers, '--recipe', 'rowwise']}, standalone_mode=False)"
    )
    assert loaded & {"torch", "triton", "torchao"} == set()


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("kind", ["table", "plan"])
def test_explain_answers_a_file_of_other_casts_with_its_option(tmp_path, kind, ours):
    """And not with what a caller in Python would do."""
    folder = write_folder(tmp_path, table(2.0), table(2.0, ours=True))
    if kind == "table":
        given = ["--tables", str(write_file(table(ours=ours), tmp_path / "file.yaml"))]
    else:
        plan = make_plan(protocol=replace(PLAN_PROTOCOL, casts="fp8gate" if ours else "inductor"))
        write_plans([plan], tmp_path / "file.yaml")
        given = ["--plan", str(tmp_path / "file.yaml")]
    wrong = "inductor" if ours else "fp8gate"
    refused = explain(folder, "--recipe", "rowwise", "--casts", wrong, *given, tokens=32)
    assert refused.exit_code == 2
    found = "fp8gate" if ours else "inductor"
    assert f"file.yaml: $.protocol.casts: expected {wrong}, found {found}: it was measured with " in refused.stderr
    advice = "add --casts fp8gate" if ours else "leave out --casts (where FP8GATE_CASTS is 1: --casts inductor)"
    assert refused.stderr.endswith(f"; {advice}\n")


def test_explain_compares_recipes_with_the_casts_that_each_can_have(tmp_path):
    others = (table(2.0, recipe=recipe) for recipe in ("tensorwise", "rowwise_with_gw_hp"))
    folder = write_folder(tmp_path, table(0.5), table(2.0, ours=True), *others)
    found = json.loads(explain(folder, "--recipe", "all", "--casts", "fp8gate", "--json").stdout)["recipes"]
    assert {recipe: one.get("casts") for recipe, one in found.items()} == {
        **dict.fromkeys(RECIPES),
        "rowwise": "fp8gate",
    }
    assert "rowwise, fp8gate's casts" in explain(folder, "--recipe", "all", "--casts", "fp8gate").stdout


@pytest.mark.parametrize("size", [256, 2048], ids=["outside", "too far outside"])
def test_shapes_without_a_config_are_measured_with_the_casts(tmp_path, size):
    folder = write_folder(tmp_path, table(2.0, ours=True))
    options = ["--recipe", "rowwise", "--casts", "fp8gate", "--tables", str(folder), "--device", "H200"]
    result = CliRunner().invoke(app, ["explain", "--tokens", "16", "--linear", f"wq,{size},{size},1", *options])
    listed = ", listed in FILE.yaml as shapes: [[M, K, N], ...]"
    assert re.search(rf"{re.escape(listed)}(, run on it)?: fp8gate calibrate --grid FILE\.yaml --casts", result.output)


def test_explain_says_once_what_is_true_with_all_casts(tmp_path, monkeypatch):
    """Only the option at the end of a command differs."""
    monkeypatch.setattr(software_check, "installed_version", {"torch": "9.9.0"}.get)
    tables = [table(recipe=recipe) for recipe in RECIPES if recipe != "rowwise"]
    folder = write_folder(tmp_path, *tables, table(ours=True))
    asked = ("--recipe", "all", "--casts", "fp8gate")
    said = explain(folder, *asked).stdout
    assert said.count("Measured with torch ") == 1
    assert said.endswith(": fp8gate calibrate, and again with --casts fp8gate\n")
    other = msgspec.structs.replace(table(ours=True), software=replace(tables[0].software, torch="1.0.0"))
    said = explain(write_folder(tmp_path, other), *asked).stdout
    torch = tables[0].software.torch.split("+")[0]
    assert f"\n\nrowwise_with_gw_hp, tensorwise: Measured with torch {torch}, here 9.9.0. To" in said
    assert "\n\nrowwise: Measured with torch 1.0.0, here 9.9.0. To" in said
    assert said.endswith(": fp8gate calibrate --casts fp8gate\n")


def test_explain_leaves_out_a_recipe_without_a_table_of_the_casts(tmp_path):
    tables = [table(2.0, recipe=recipe) for recipe in RECIPES]
    folder = write_folder(tmp_path / "without", *tables)
    asked = ("--recipe", "all", "--casts", "fp8gate")
    found = explain(folder, *asked)
    assert found.exit_code == 0
    why = (
        "rowwise, fp8gate's casts: left out, as NVIDIA H200 has no such table. To see rowwise with Inductor's casts: "
        "--casts inductor. To measure, run on it: fp8gate calibrate --recipes rowwise --casts fp8gate"
    )
    assert found.stdout.count(why) == found.stdout.count("rowwise, ") == 1
    assert "\ntensorwise " in found.stdout
    data = json.loads(explain(folder, *asked, "--json").stdout)
    assert list(data["recipes"]) == ["tensorwise", "rowwise_with_gw_hp"]
    assert data["left_out"] == {"rowwise": why}
    assert explain(folder, *asked, "--strict").exit_code == 1
    assert explain(folder, "--recipe", "rowwise", "--casts", "fp8gate").exit_code == 2
    whole = write_folder(tmp_path / "with", *tables, table(ours=True))
    assert "left_out" not in json.loads(explain(whole, *asked, "--json").stdout)
    assert explain(write_folder(tmp_path / "broken", *tables[1:]), *asked).exit_code == 2
