"""`fp8gate doctor`: what is here, what the filter would find, and what to run next."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from datetime import timedelta

import msgspec
import pytest
from builders import PROTOCOL, SOFTWARE_HERE, make_point, make_table, write_file
from commands import parse
from plans import make_plan
from typer.testing import CliRunner

import fp8gate
from fp8gate.calibrate.comparison.merge import merge_tables
from fp8gate.cli import app
from fp8gate.cli.doctor import checkup as module
from fp8gate.cli.doctor import found_files
from fp8gate.cli.doctor.checkup import Checkup, DeviceFacts, check_up
from fp8gate.cli.doctor.found_files import FoundFile
from fp8gate.cli.doctor.next_steps import next_steps, problems
from fp8gate.cli.doctor.text import checkup_text
from fp8gate.filter.contract.devices import device_slug, local_device_name
from fp8gate.filter.contract.plans.plan_file import write_plans
from fp8gate.filter.contract.recipes import RECIPES
from fp8gate.filter.contract.table import Device, Incomplete, read_table
from fp8gate.filter.locate import places

GPU = DeviceFacts(
    name="NVIDIA H200", kind="cuda", memory_gib=139.8, capability="9.0", driver="580.1.2", runs_float8=True
)
VERSIONS = dict.fromkeys(("python", "fp8gate", "torch", "torchao", "triton", "transformers"), "1.0")
WELL = Checkup(
    device=GPU,
    versions=VERSIONS,
    places={"/data/thresholds": "your own"},
    casts=None,
    casts_problem=None,
    tables=tuple(
        FoundFile(what=recipe, path=f"{recipe}.yaml", measured="407 points, 2026-11-25") for recipe in RECIPES
    ),
    missing=(),
    measured=("nvidia-h200",),
    measured_gpu="nvidia-h200",
    plans=(FoundFile(what="llama3-8b, rowwise, 8192 tokens", path="llama3-8b-rowwise-m8192.yaml"),),
    out="/data/thresholds",
    out_problem=None,
    waiting=(),
    load=0.5,
    processors=8,
)
AGAIN = "fp8gate plan llama3-8b --recipe rowwise --tokens 8192 --sequence 4096"
STALE_PLAN = replace(WELL.plans[0], stale="torch 2.11.0, here 2.13.0", measured_again_by=AGAIN)
STALE_TABLE = replace(WELL.tables[0], stale="torch 2.11.0, here 2.13.0", verified_by="fp8gate verify")
STALE = replace(WELL, tables=(STALE_TABLE, *WELL.tables[1:]))
INCOMPLETE = {"incomplete": "75 of 140 measurements", "completed_by": "fp8gate calibrate --out /elsewhere"}


def commands(checkup: Checkup) -> list[str]:
    return [step.command for step in next_steps(checkup)]


def test_all_is_well():
    assert problems(WELL) == []
    assert commands(WELL) == ["fp8gate explain llama3-8b --recipe all --tokens 8192"]
    text = checkup_text(WELL)
    assert "all is well" in text
    assert text.startswith(
        "NVIDIA H200: cuda, 139.8 GiB, driver 580.1.2, compute capability 9.0, float8 runs\n\npython 1.0, fp8gate 1.0"
    )


@pytest.mark.parametrize(
    ("checkup", "problem", "first"),
    [
        (
            replace(WELL, tables=WELL.tables[:2], missing=("rowwise_with_gw_hp",)),
            "no table for this device: rowwise_with_gw_hp",
            "fp8gate calibrate --recipes rowwise_with_gw_hp",
        ),
        (replace(WELL, tables=(), missing=tuple(RECIPES)), "no table for this device", "fp8gate calibrate"),
        (replace(WELL, plans=(STALE_PLAN,)), "8192 tokens was measured with torch 2.11.0", AGAIN),
        (STALE, "tensorwise was measured with torch 2.11.0, here 2.13.0", "fp8gate verify"),
        (
            replace(WELL, tables=(replace(WELL.tables[0], **INCOMPLETE), *WELL.tables[1:])),
            "tensorwise is incomplete, with 75 of 140 measurements",
            "fp8gate calibrate --out /elsewhere",
        ),
        (replace(WELL, waiting=("/out/h/journal-1.jsonl",)), "/out/h/journal-1.jsonl waits", "fp8gate calibrate"),
        (replace(WELL, waiting=("/out/h/plans/journal-1.jsonl",)), "waits to be gone on with", "fp8gate plan"),
        (
            replace(WELL, device=None, versions={**VERSIONS, "torch": None}),
            "torch is not installed",
            "pip install '.[calibrate]'",
        ),
        (
            replace(WELL, device=replace(GPU, runs_float8=False)),
            "float8 does not run on NVIDIA H200",
            "fp8gate explain",
        ),
        (replace(WELL, out_problem="/data cannot be written to"), "/data cannot be written to", "fp8gate explain"),
        (
            replace(WELL, plans=(replace(WELL.plans[0], problem="p.yaml: $.schema: expected 1"),)),
            "p.yaml: $.schema: expected 1",
            "fp8gate explain",
        ),
    ],
)
def test_a_problem_is_named_and_its_command_comes_first(checkup, problem, first):
    assert problem in "\n".join(problems(checkup))
    assert commands(checkup)[0].startswith(first)
    for command in commands(checkup):
        if command.startswith("fp8gate") and not checkup.waiting:  # then the options are those of the earlier run
            parse(command)
    assert 1 <= len(commands(checkup)) <= 3
    assert problem in checkup_text(checkup)


def test_a_gpu_without_plans_is_told_of_them():
    assert commands(replace(WELL, plans=()))[0].startswith("fp8gate plan llama3-8b")


def test_without_torch_a_measured_device_can_still_be_asked_about():
    without = replace(WELL, device=None, tables=(), plans=(), versions={**VERSIONS, "torch": None})
    assert commands(without)[1].endswith("--device nvidia-h200")
    assert len(commands(replace(without, measured_gpu=None))) == 1


@pytest.mark.parametrize(("load", "is_busy"), [(20.0, True), (7.0, False), (None, False)])
def test_a_busy_host_is_named(load, is_busy):
    assert ("too busy to measure now" in checkup_text(replace(WELL, load=load))) == is_busy


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_tables_fit_the_terminal(monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    lines = checkup_text(STALE).splitlines()
    start = next(index for index, line in enumerate(lines) if line.split()[:1] == ["table"])
    assert max(map(len, lines[start : lines.index("", start)])) <= width


# --- on this machine -------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The thresholds folder that is searched."""
    monkeypatch.setenv("FP8GATE_THRESHOLDS", str(tmp_path))
    return tmp_path


def this_cpu() -> Device:
    return Device(name=local_device_name(), kind="cpu", memory_gib=1.0)


OLD = msgspec.structs.replace(SOFTWARE_HERE, torch="1.0.0")


def write_table_of_this_device(here, recipe, *, incomplete=None, casts="inductor", **software):
    software = msgspec.structs.replace(SOFTWARE_HERE, **software)
    fields = {"device": this_cpu(), "software": software, "incomplete": incomplete}
    protocol = msgspec.structs.replace(PROTOCOL, casts=casts)
    table = make_table(make_point(32, 64, 64), recipe=recipe, protocol=protocol, **fields)
    return write_file(table, here / device_slug(local_device_name()) / table.variant.file)


def doctor(*args):
    return CliRunner().invoke(app, ["doctor", *args])


def test_without_tables_it_ends_with_exit_code_1(here):
    result = doctor()
    assert result.exit_code == 1, result.output
    assert local_device_name() in result.stdout
    assert f"fp8gate {fp8gate.__version__}" in result.stdout
    assert "tables for this device: none; measured devices: none" in result.stdout
    assert f"calibrate and plan write to {here}" in result.stdout


def test_with_tables_and_a_plan_it_ends_with_exit_code_0(here):
    for recipe in RECIPES:
        write_table_of_this_device(here, recipe)
    folder = here / device_slug(local_device_name())
    (folder / "plans").mkdir()
    write_plans([make_plan(device=this_cpu(), software=SOFTWARE_HERE)], folder / "plans" / "tiny-rowwise-m32.yaml")
    result = doctor("--json")
    found = json.loads(result.stdout)
    assert [table["what"] for table in found["tables"]] == list(RECIPES)
    assert [plan["what"] for plan in found["plans"]] == ["tiny, rowwise, 32 tokens"]
    assert found["problems"] == []
    assert result.exit_code == 0


def test_a_stale_table_and_a_broken_one_are_named(here):
    write_table_of_this_device(here, "rowwise", torch="1.0.0")
    folder = here / device_slug(local_device_name())
    (folder / "tensorwise.yaml").write_text("nothing")
    found = check_up()
    stale, broken = sorted(found.tables, key=lambda table: table.what)
    assert stale.stale.startswith("torch 1.0.0, here ")
    assert str(folder / "tensorwise.yaml") in broken.problem
    assert found.missing == ("rowwise_with_gw_hp",)


OTHER = Device(name="NVIDIA H200", kind="cuda", memory_gib=139.8)
H100 = Device(name="NVIDIA H100", kind="cuda", memory_gib=79.2)


def misfiled(here, name, *, device=None, casts="inductor"):
    folder = here / device_slug(local_device_name())
    protocol = msgspec.structs.replace(PROTOCOL, casts=casts)
    fields = {"device": device or this_cpu(), "software": SOFTWARE_HERE, "protocol": protocol}
    write_file(make_table(make_point(32, 64, 64), **fields), folder / name)


@pytest.mark.parametrize(
    ("name", "table", "belongs"),
    [
        ("tensorwise.yaml", {}, "{here}/rowwise.yaml: move it there"),
        ("rowwise.yaml", {"casts": "fp8gate"}, "{here}/rowwise-fp8gate_casts.yaml: move it there"),
        ("rowwise-fp8gate_casts.yaml", {}, "{here}/rowwise.yaml: move it there"),
        ("rowwise.yaml", {"device": OTHER}, "nvidia-h200/rowwise.yaml: move it there"),
    ],
)
def test_a_misfiled_table_is_to_be_moved(here, name, table, belongs):
    misfiled(here, name, **table)
    text = doctor().stdout
    todo = text[text.index("to be done:") :]
    assert belongs.format(here=device_slug(local_device_name())) in todo
    assert not any(word in text for word in ("()", "tables=", "casts=", "in Python"))


def test_nothing_is_measured_for_a_table_that_only_has_to_be_moved(here):
    for recipe in RECIPES:
        write_table_of_this_device(here, recipe)
    misfiled(here, "rowwise-fp8gate_casts.yaml")
    assert "where there is one already: keep one of them" in problems(check_up())[0]
    assert "fp8gate calibrate" not in "".join(commands(check_up()))


def test_swapped_tables_are_to_be_exchanged(here):
    write_table_of_this_device(here, "rowwise_with_gw_hp")
    folder = here / device_slug(local_device_name())
    write_table_of_this_device(here, "tensorwise").rename(folder / "swapped")
    write_table_of_this_device(here, "rowwise").rename(folder / "tensorwise.yaml")
    (folder / "swapped").rename(folder / "rowwise.yaml")
    found = problems(check_up())
    assert [one.rpartition(". ")[2] for one in found] == [
        f"It belongs in {folder / name}.yaml, where another file is: exchange the two"
        for name in ("rowwise", "tensorwise")
    ]


@pytest.mark.parametrize("text", ["nothing", None], ids=["no table", "of another device"])
def test_a_table_is_not_to_be_lost_for_another_file(here, text):
    """Where it belongs is a file that is no table, or one of another device."""
    misfiled(here, "rowwise.yaml", device=OTHER)
    path = write_file(make_table(make_point(32, 64, 64), device=H100), here / "nvidia-h200" / "rowwise.yaml")
    path.write_text(text or path.read_text())
    (problem,) = [one for one in problems(check_up()) if "belongs" in one]
    assert problem.endswith("/nvidia-h200/rowwise.yaml, where another file is: exchange the two")


def test_advice_is_for_a_shell_where_another_device_has_the_folder(here):
    name = local_device_name()
    misfiled(here, "rowwise.yaml", device=Device(name=name.replace(" ", "_"), kind="cpu", memory_gib=1.0))
    (problem,) = [one for one in problems(check_up()) if "another device" in one]
    assert problem.endswith("a thresholds folder of its own, and name that by FP8GATE_THRESHOLDS")


@pytest.mark.parametrize("place", ["", "rowwise.yaml"], ids=["a device's folder", "a file"])
def test_where_one_place_is_named_the_other_tables_are_missing(here, monkeypatch, place):
    path = write_table_of_this_device(here, "rowwise")
    monkeypatch.setenv("FP8GATE_THRESHOLDS", str(path.parent / place))
    found = check_up()
    assert [table.what for table in found.tables] == ["rowwise"]
    assert found.missing == ("tensorwise", "rowwise_with_gw_hp")
    assert [one for one in problems(found) if "no table" not in one] == [found.out_problem]
    assert commands(found)[0].endswith(" --out FOLDER")


def test_a_place_that_is_not_there_is_said_once(here, monkeypatch):
    monkeypatch.setenv("FP8GATE_THRESHOLDS", str(here / "none"))
    found = check_up()
    assert (found.tables, found.measured, found.missing) == ((), (), tuple(RECIPES))
    assert f"{here / 'none'} (FP8GATE_THRESHOLDS, not there yet)" in checkup_text(found)


@pytest.mark.parametrize(
    ("name", "fields", "belongs"),
    [
        ("tiny-tensorwise-m32.yaml", {}, "tiny-rowwise-m32.yaml"),
        ("tiny-rowwise-m64-tp2.yaml", {"tp": 2}, "tiny-rowwise-m32-tp2.yaml"),
        ("mine.yaml", {}, "mine-rowwise-m32.yaml"),
        ("tiny-rowwise-m32.yaml", {"device": OTHER}, "tiny-rowwise-m32.yaml"),
    ],
)
def test_a_plan_that_the_filter_does_not_find_is_misfiled(here, name, fields, belongs):
    plan = make_plan(**{"device": this_cpu(), "software": SOFTWARE_HERE, **fields})
    path = write_plan(plan, here / device_slug(local_device_name()), name)
    (found,) = check_up().plans
    place = here / device_slug(plan.device.name) / "plans" / belongs
    assert found.problem == f"{path}: the filter does not find it there. It belongs in {place}: move it there"


def write_plan(plan, folder, name="tiny-rowwise-m32.yaml"):
    (folder / "plans").mkdir(parents=True, exist_ok=True)
    write_plans([plan], folder / "plans" / name)
    return folder / "plans" / name


@pytest.mark.parametrize("place", ["nvidia-h200", "any", "any/rowwise.yaml"])
def test_a_plan_of_another_device_is_where_it_belongs_in_that_devices_folder(here, monkeypatch, place):
    """Also where the folder is named by FP8GATE_THRESHOLDS: then its own name can be any."""
    folder = here / place.partition("/")[0]
    write_file(make_table(make_point(32, 64, 64), device=OTHER), folder / "rowwise.yaml")
    write_plan(make_plan(device=OTHER), folder)
    monkeypatch.setenv("FP8GATE_THRESHOLDS", str(here / place))
    assert [plan.problem for plan in check_up().plans] == [None]


def test_a_plan_in_a_named_folder_of_another_device_is_misfiled(here, monkeypatch):
    folder = here / "nvidia-h200"
    write_file(make_table(make_point(32, 64, 64), device=OTHER), folder / "rowwise.yaml")
    write_plan(make_plan(device=H100), folder)
    monkeypatch.setenv("FP8GATE_THRESHOLDS", str(folder))
    (plan,) = check_up().plans
    assert plan.problem.endswith(f"belongs in {here}/nvidia-h100/plans/tiny-rowwise-m32.yaml: move it there")


UNDER_ANOTHER_NAME = ", where another file is: move it there under another name with -rowwise-m32 in it"


@pytest.mark.parametrize(
    ("there", "todo"),
    [
        ({"exhaustive": True}, ", where there is one already: keep one of them"),
        ({"device": H100}, UNDER_ANOTHER_NAME),
        ({"recompute": "full"}, UNDER_ANOTHER_NAME),
        (None, UNDER_ANOTHER_NAME),
    ],
    ids=["the same training", "another device", "other training", "no plan"],
)
def test_a_misfiled_plan_does_not_take_the_place_of_another(here, there, todo):
    write_plan(make_plan(device=OTHER), here / device_slug(local_device_name()))
    path = write_plan(make_plan(**{"device": OTHER, **(there or {})}), here / "nvidia-h200")
    path.write_text("nothing" if there is None else path.read_text())
    (plan,) = check_up().plans
    assert plan.problem.endswith(f". It belongs in {path}{todo}")


COMPILED = msgspec.structs.replace(make_plan().protocol, compile=True, inductor={"emulate_precision_casts": True})


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"recompute": "full"}, "tiny, rowwise, 32 tokens, recomputed"),
        ({"sequence": 16, "tp": 2}, "tiny, rowwise, 32 tokens, sequence 16, tp 2"),
        ({"left_out": ("self_attn.k_proj",), "indivisible": ()}, "tiny, rowwise, 32 tokens, without k_proj"),
        ({"exhaustive": True}, "tiny, rowwise, 32 tokens, exhaustive"),
        ({"protocol": COMPILED}, "tiny, rowwise, 32 tokens"),
        (
            {"protocol": msgspec.structs.replace(COMPILED, inductor={})},
            "tiny, rowwise, 32 tokens, no emulate_precision_casts",
        ),
        ({"recipe": "tensorwise", "protocol": COMPILED}, "tiny, tensorwise, 32 tokens, emulate_precision_casts"),
    ],
)
def test_a_plan_is_named_with_what_tells_it_from_others(here, fields, what):
    plan = make_plan(device=this_cpu(), **fields)
    write_plan(plan, here / device_slug(local_device_name()), f"tiny-{plan.recipe}-m32.yaml")
    assert [one.what for one in check_up().plans] == [what]


def test_a_stale_plan_is_named_with_what_measures_it_again(here):
    folder = here / device_slug(local_device_name()) / "plans"
    folder.mkdir(parents=True)
    old = msgspec.structs.replace(SOFTWARE_HERE, torch="1.0.0")
    plan = make_plan(device=this_cpu(), software=old, tokens=32, sequence=16, exhaustive=True)
    write_plans([plan], folder / "tiny-rowwise-m32-s16.yaml")
    command = "fp8gate plan CONFIG.json --recipe rowwise --tokens 32 --sequence 16 --exhaustive --device cpu"
    assert command in commands(check_up())
    write_plans([msgspec.structs.replace(plan, software=SOFTWARE_HERE)], folder / "tiny-rowwise-m32-s16.yaml")
    assert not any("plan CONFIG.json" in one for one in commands(check_up()))


@pytest.mark.parametrize("is_here", [True, False], ids=["this device", "another"])
def test_only_tables_of_this_device_are_to_be_measured_again(here, monkeypatch, is_here):
    device = this_cpu() if is_here else OTHER
    folder, stopped = here / device_slug(device.name), Incomplete(measured=4, of=9)
    for recipe in RECIPES:
        incomplete = stopped if recipe == "rowwise" else None
        fields = {"recipe": recipe, "device": device, "software": OLD, "incomplete": incomplete}
        write_file(make_table(make_point(32, 64, 64), **fields), folder / f"{recipe}.yaml")
    monkeypatch.setenv("FP8GATE_THRESHOLDS", str(folder))
    found = check_up()
    assert all(table.stale for table in found.tables)
    measuring = [f"fp8gate calibrate --out {here}", "fp8gate verify"]
    assert [one for one in commands(found) if "explain" not in one] == (measuring if is_here else [])


def test_stale_tables_outside_of_the_first_place_are_named_to_verify(here, monkeypatch):
    """By itself it would look only there."""
    own = here / "own"
    own.mkdir()
    path = write_table_of_this_device(here, "rowwise", torch="1.0.0")
    monkeypatch.delenv("FP8GATE_THRESHOLDS")
    monkeypatch.setattr(places, "checkout_thresholds", lambda: None)
    monkeypatch.setattr(places, "user_thresholds", lambda: own)
    monkeypatch.setattr(places, "packaged_thresholds", lambda: here)
    assert f"fp8gate verify --tables {path.parent}" in commands(check_up())


@pytest.mark.parametrize("missing", [(), ("model.layers.1",)], ids=["complete", "incomplete"])
@pytest.mark.parametrize(
    ("name", "device"), [("tiny-rowwise-m64.yaml", None), ("tiny-rowwise-m32.yaml", OTHER)], ids=["misfiled", "other"]
)
def test_no_plan_is_measured_that_is_misfiled_or_of_another_device(here, monkeypatch, name, device, missing):
    """The new one would lie elsewhere, and the old one stay."""
    folder = here / device_slug(device.name if device else local_device_name())
    plan = make_plan(device=device or this_cpu(), software=OLD, layers="model.layers.0", missing=missing)
    write_plan(plan, folder, name)
    write_file(make_table(make_point(32, 64, 64), device=plan.device), folder / "rowwise.yaml")
    monkeypatch.setenv("FP8GATE_THRESHOLDS", str(folder))
    found = check_up()
    assert found.plans[0].stale
    assert not any(command.startswith("fp8gate plan") for command in commands(found))


@pytest.mark.parametrize("name", ["own", "any"])
@pytest.mark.parametrize("missing", [(), ("model.layers.1",)], ids=["complete", "incomplete"])
def test_a_plan_is_measured_into_its_folder_where_nothing_is_written_by_default(here, monkeypatch, name, missing):
    folder = here / (device_slug(local_device_name()) if name == "own" else name)
    write_plan(make_plan(device=this_cpu(), software=OLD, layers="model.layers.0", missing=missing), folder)
    for recipe in RECIPES:
        table = make_table(make_point(32, 64, 64), recipe=recipe, device=this_cpu(), software=SOFTWARE_HERE)
        write_file(table, folder / f"{recipe}.yaml")
    monkeypatch.setenv("FP8GATE_THRESHOLDS", str(folder))
    out = here if name == "own" else "FOLDER"
    assert commands(check_up())[0].startswith("fp8gate plan CONFIG.json --recipe rowwise --tokens 32")
    assert commands(check_up())[0].endswith(f" --device cpu --out {out}")


def test_a_packaged_plan_is_measured_again_into_ones_own_folder(here, monkeypatch):
    """That comes before the package, which an upgrade replaces."""
    write_plan(make_plan(device=this_cpu(), software=OLD), here / device_slug(local_device_name()))
    monkeypatch.delenv("FP8GATE_THRESHOLDS")
    monkeypatch.setattr(places, "checkout_thresholds", lambda: None)
    monkeypatch.setattr(places, "user_thresholds", lambda: here / "own")
    for one in (places, found_files):
        monkeypatch.setattr(one, "packaged_thresholds", lambda: here)
    (again,) = [command for command in commands(check_up()) if command.startswith("fp8gate plan")]
    assert "--out" not in again


def test_the_first_plan_needs_a_folder_where_nothing_is_written_by_default():
    assert commands(replace(WELL, plans=(), out=None))[0].endswith(" --tokens 8192 --out FOLDER")


def test_an_incomplete_table_is_named_with_what_completes_it(here):
    for recipe in RECIPES:
        write_table_of_this_device(here, recipe, incomplete=Incomplete(measured=4, of=9) if "gw" in recipe else None)
    found = check_up()
    assert [table.incomplete for table in found.tables] == [None, None, "4 of 9 measurements"]
    assert found.tables[2].measured.endswith(", incomplete")
    result = doctor()
    assert result.exit_code == 1
    assert "- rowwise_with_gw_hp is incomplete, with 4 of 9 measurements\n" in result.stdout
    completes = "  fp8gate calibrate\n    with the same options: it goes on, and completes the tables"
    assert f"next:\n{completes}" in result.stdout


@pytest.mark.parametrize("casts", ["inductor", "fp8gate"])
def test_an_incomplete_plan_is_named_with_what_completes_it(here, casts):
    for recipe in RECIPES:
        write_table_of_this_device(here, recipe)
    folder = here / device_slug(local_device_name()) / "plans"
    plan = make_plan(device=this_cpu(), layers="model.layers.0", missing=("model.layers.1-2",))
    protocol = msgspec.structs.replace(plan.protocol, casts=casts)
    name = "tiny-rowwise-m32" + ("" if casts == "inductor" else "-fp8gate_casts")
    write_plans([msgspec.structs.replace(plan, protocol=protocol)], folder / f"{name}.yaml")
    (found,) = check_up().plans
    assert (found.incomplete, found.measured) == ("nothing of model.layers.1-2", "2026-11-24, incomplete")
    result, option = doctor(), "" if casts == "inductor" else " --casts fp8gate"
    assert result.exit_code == 1
    assert " is incomplete, with nothing of model.layers.1-2\n" in result.stdout
    command = f"fp8gate plan CONFIG.json --recipe rowwise --tokens 32 --sequence 32{option} --device cpu"
    assert f"next:\n  {command}\n    with the same options: it goes on, and completes the plan" in result.stdout
    told = json.loads(doctor("--json").stdout)
    assert [one["completed_by"] for one in told["plans"]] == [command]
    assert told["next"][0]["command"] == command


def test_a_merged_table_says_of_how_many_sweeps(here):
    own = read_table(write_table_of_this_device(here, "rowwise"))
    later = msgspec.structs.replace(own, measured_at=own.measured_at + timedelta(1))
    write_file(merge_tables({"own": own, "later": later}), here / device_slug(local_device_name()) / "rowwise.yaml")
    (found,) = check_up().tables
    assert found.measured == "1 of 1 points, 2026-11-25, 2 sweeps merged"


@pytest.mark.parametrize(("value", "is_wrong"), [(None, False), ("1", False), ("0", False), ("on", True)])
def test_the_variable_of_the_casts_is_told_where_it_is_set(here, monkeypatch, value, is_wrong):
    if value is not None:
        monkeypatch.setenv("FP8GATE_CASTS", value)
    found = check_up()
    assert found.casts == value
    assert (f"the environment has FP8GATE_CASTS={value}\n" in checkup_text(found)) == (value is not None)
    assert (f"FP8GATE_CASTS: expected 1 to replace casts, or 0; got {value!r}" in problems(found)) == is_wrong


def test_tables_of_both_casts_are_listed_and_only_inductors_can_be_missing(here):
    write_table_of_this_device(here, "rowwise", casts="fp8gate", incomplete=Incomplete(measured=4, of=9))
    found = check_up()
    assert [table.what for table in found.tables] == ["rowwise, fp8gate's casts"]
    assert found.tables[0].completed_by.startswith("fp8gate calibrate --casts fp8gate")
    assert found.missing == tuple(RECIPES)
    for recipe in RECIPES:
        write_table_of_this_device(here, recipe)
    found = check_up()
    assert [table.what for table in found.tables][1:3] == ["rowwise", "rowwise, fp8gate's casts"]
    assert found.missing == ()


def write_tables(folder, device, recipes=RECIPES):
    for recipe in recipes:
        write_file(make_table(make_point(8192, 4096, 4096), recipe=recipe, device=device), folder / f"{recipe}.yaml")


def test_the_device_to_ask_about_is_a_measured_gpu(here):
    for recipe in RECIPES:
        write_table_of_this_device(here, recipe)
    assert commands(check_up()) == ["fp8gate explain llama3-8b --recipe all --tokens 8192"]
    partial = msgspec.structs.replace(H100, name="NVIDIA A100")  # it has not the tables of all recipes
    write_tables(here / "nvidia-a100", partial, ["rowwise"])
    write_tables(here / "nvidia-h100", H100)
    assert check_up().measured == (device_slug(local_device_name()), "nvidia-a100", "nvidia-h100")
    (command,) = commands(check_up())
    assert command.endswith(" --device nvidia-h100")
    result = CliRunner().invoke(app, command.split()[1:])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("place", ["any", "nvidia-h100"])
def test_a_device_is_measured_whose_folder_is_named(here, monkeypatch, place):
    write_tables(here / place, H100)
    monkeypatch.setenv("FP8GATE_THRESHOLDS", str(here / place))
    found = check_up()
    assert (found.measured, found.measured_gpu) == (("nvidia-h100",), "nvidia-h100")
    assert commands(found)[-1].endswith(" --device nvidia-h100")


def test_a_journal_waits_until_its_tables_are_newer(here):
    folder = here / device_slug(local_device_name())
    folder.mkdir()
    (folder / "journal-0.jsonl").write_text("header\n")
    journal = folder / "journal-1.jsonl"
    journal.write_text("header\nrecord\n")
    (folder / "journal-2.jsonl.20261125T000000").write_text("header\nrecord\n")
    assert check_up().waiting == (str(journal),)
    write_table_of_this_device(here, "rowwise")
    os.utime(journal, (0, 0))
    assert check_up().waiting == ()


def test_it_works_without_torch(here, monkeypatch):
    monkeypatch.setattr(module.util, "find_spec", lambda name: None)
    monkeypatch.setattr(module, "local_device_name", lambda: pytest.fail("it asked torch"))
    result = doctor()
    assert result.exit_code == 1
    assert "device unknown: torch is not installed" in result.stdout
