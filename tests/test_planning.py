"""A plan from the block to the file, really measured on the CPU."""

from __future__ import annotations

import gc
import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
import torch
from builders import make_point, make_table, write_folder
from plans import PROTOCOL, TINY_CONFIG, Block, block_input, make_plan
from samples import quick_visits
from typer.testing import CliRunner

from fp8gate import auto_filter, read_plan
from fp8gate.calibrate.arms.blueprint import Blueprint
from fp8gate.calibrate.device.cpu import Cpu
from fp8gate.calibrate.planning import plan_block
from fp8gate.calibrate.planning.block_worker import BlockBench, Done, PlanJob
from fp8gate.calibrate.planning.block_worker_pool import StoppedError
from fp8gate.calibrate.planning.plan_block import plan, plan_subject
from fp8gate.calibrate.planning.plan_protocol import make_protocol
from fp8gate.calibrate.planning.search import BF16_SET
from fp8gate.calibrate.planning.subject import Subject, model_subjects, plan_path
from fp8gate.calibrate.report.plan_text import plan_json, plan_text
from fp8gate.cli import app
from fp8gate.filter.contract.devices import cpu_name
from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.contract.plans.plan import exceeds_control
from fp8gate.filter.contract.plans.plan_file import format_plans, parse_plans, write_plans
from fp8gate.filter.contract.recipes import Variant
from fp8gate.filter.contract.table import Device

CPU = torch.device("cpu")
ROWWISE = Variant("rowwise")
INNER = frozenset({"inner"})


@pytest.fixture(autouse=True, scope="module")
def _quick(tmp_path_factory):
    with quick_visits(tmp_path_factory.mktemp("locks")):
        yield


def planned(**options):
    return plan(Block(), [block_input()], **{"recipe": "rowwise", "protocol": PROTOCOL, **options})


@pytest.fixture(scope="module")
def with_table(tmp_path_factory):
    """A plan where there is a table of this CPU: inner wins by 100 us, outer loses."""
    device = Device(name=cpu_name(), kind="cpu", memory_gib=1.0)
    points = make_point(16, 32, 64, 2.0, bf16_us=(100.0, 100.0)), make_point(16, 64, 32, 0.5, bf16_us=(100.0, 100.0))
    tables = write_folder(tmp_path_factory.mktemp("tables"), make_table(*points, device=device))
    return planned(tables=tables)


@pytest.fixture(scope="module")
def without_table(tmp_path_factory):
    """A plan where there is none, its journal and what was said."""
    folder, said = tmp_path_factory.mktemp("plan"), []
    found = planned(tables=tmp_path_factory.mktemp("nothing"), out=folder, say=said.append)
    (journal,) = folder.glob("journal-*.jsonl")
    return found, journal, said


def test_every_set_of_two_roles_is_measured_and_the_file_reads_back(with_table):
    found = with_table
    assert {one.convert for one in found.candidates} >= {(), ("inner",), ("outer",)}
    assert found.candidates[0].convert == ()
    assert {one.status for one in found.candidates} == {"measured"}
    assert parse_plans(format_plans([found]), source="plan")[0].convert == found.convert
    assert found.shapes == {"inner": (16, 32, 64), "outer": (16, 64, 32)}
    assert all(one.fwd_us > 0 and one.bwd_us > 0 for one in found.candidates)


def test_bf16_is_what_is_left_unless_something_wins(without_table):
    """On a CPU float8 casts cost far more than a product of 16 rows."""
    found, _, _ = without_table
    assert found.convert == ()


def test_bf16_is_measured_against_itself_and_that_is_no_candidate(without_table):
    found, journal, _ = without_table
    assert 0.2 < found.control < 5
    assert not any("bf16 again" in one.convert for one in found.candidates)
    visits = [line for line in journal.read_text().splitlines() if '"convert":["bf16 again"]' in line]
    assert len(visits) == PROTOCOL.screening + PROTOCOL.final


def test_bf16_is_measured_against_itself_in_the_rounds_of_the_finalists(without_table):
    """It takes no rounds of its own but those that the finalists' first visits had."""
    _, journal, _ = without_table
    rounds = defaultdict(set)
    for line in journal.read_text().splitlines()[1:]:
        visit = json.loads(line)[1]
        rounds[tuple(visit["convert"])].add(visit["round"])
    control = rounds.pop(("bf16 again",))
    finalist = max((found for roles, found in rounds.items() if roles), key=len)
    assert len(control & finalist) == PROTOCOL.final


@pytest.mark.parametrize("wins", [True, False])
def test_a_set_that_gains_no_more_than_bf16_over_itself_is_not_chosen(monkeypatch, wins):
    said = []
    monkeypatch.setattr(plan_block, "search", lambda roles, guesses, rounds, rules: rounds([INNER], 7) and INNER)
    monkeypatch.setattr(plan_block, "exceeds_control", lambda low, control: wins)
    found = planned(say=said.append)
    assert found.convert == (("inner",) if wins else ())
    assert any("bf16 stays: no set gains more than bf16 loaded again" in line for line in said) is not wins


def test_without_a_control_nothing_wins():
    assert not exceeds_control(1.2, None)
    assert [exceeds_control(1.02, control) for control in (1.0, 1.01, 1.03, 0.99, 0.97)] == [
        True,
        True,
        False,
        True,
        False,
    ]


def test_what_the_table_says_is_kept_beside_what_was_measured(with_table):
    found = with_table
    assert found.table.convert == ("inner",)
    bf16_us = found.candidates[0].fwd_us + found.candidates[0].bwd_us
    assert found.candidate(("inner",)).predicted == pytest.approx(bf16_us / max(bf16_us - 100, 1))
    assert found.candidate(("outer",)).predicted == pytest.approx(bf16_us / (bf16_us + 200))


def test_without_a_table_the_search_starts_anyway_and_says_so(without_table):
    found, _, said = without_table
    assert (found.table, found.candidates[0].predicted) == (None, None)
    assert "so the search starts without a table" in said[0]


def test_exhaustive_measures_every_set():
    found = planned(exhaustive=True)
    assert found.exhaustive
    assert {one.convert for one in found.candidates} == {(), ("inner",), ("outer",), ("inner", "outer")}


def test_too_many_roles_for_every_set(monkeypatch):
    monkeypatch.setattr(plan_block, "FEW_ROLES", 1)
    with pytest.raises(ValueError, match="exhaustive: expected at most 1 roles, 2 sets; got 2"):
        planned(exhaustive=True)


def test_a_complete_plan_that_is_run_again_measures_nothing(tmp_path):
    """Although the visits that decided are in the journal too: the search asks the questions that it asked before."""
    first = planned(out=tmp_path)
    (journal,) = tmp_path.glob("*.jsonl")
    before = journal.read_text()
    assert planned(out=tmp_path).convert == first.convert
    assert journal.read_text() == before


def test_the_same_call_goes_on_where_it_was(tmp_path):
    with pytest.raises(StoppedError):
        planned(out=tmp_path, stop_after_s=0.0)
    first = planned(out=tmp_path)
    (journal,) = tmp_path.glob("journal-*.jsonl")
    lines = journal.read_bytes().splitlines()
    again = planned(out=tmp_path)
    assert journal.read_bytes().splitlines() == lines
    assert again.candidates == first.candidates
    said = []
    assert planned(out=tmp_path, fresh=True, say=said.append).candidates != first.candidates
    (kept,) = tmp_path.glob("journal-*.jsonl.*")
    assert f"the earlier journal is kept as {kept}" in said


def test_what_float8_cannot_compute_is_left_out():
    block = torch.nn.Sequential(Block(), torch.nn.Linear(32, 10, dtype=torch.bfloat16))
    found = plan(block, [block_input()], recipe="rowwise", protocol=PROTOCOL)
    assert found.indivisible == ("1",)
    assert not any("1" in one.convert for one in found.candidates)


def test_roles_that_are_to_stay_in_bf16_are_in_no_set_and_in_the_file():
    subject = Subject(
        name="tiny",
        blueprint=Blueprint.of(Block(), [block_input()], recomputed=False),
        whole=dict.fromkeys(("inner", "outer"), (32, 64)),
        tokens=16,
        left_out=("inner",),
    )
    found = plan_subject(subject, recipe="rowwise", protocol=PROTOCOL)
    assert (found.left_out, found.possible) == (("inner",), ("outer",))
    assert not any("inner" in one.convert for one in found.candidates)
    assert parse_plans(format_plans([found]), source="it")[0].left_out == ("inner",)
    assert "without_inner" in plan_path(Path("thresholds"), [subject], ROWWISE, CPU).name
    assert "left in bf16 as asked: inner" in plan_text(found)
    assert "left_out" not in format_plans([msgspec.structs.replace(found, left_out=())])


def test_a_block_that_float8_cannot_compute_is_an_error():
    ten_rows = torch.randn(10, 32, dtype=torch.bfloat16, requires_grad=True)
    with pytest.raises(
        ValueError, match="block: expected a linear that may be converted, with multiples of 16; found none"
    ):
        plan(Block(), [ten_rows], recipe="rowwise", protocol=PROTOCOL)


def test_where_every_set_fails_bf16_is_measured_alone(monkeypatch):
    real = Blueprint.ready

    def ready(blueprint, roles, *args):
        if roles:
            raise torch.OutOfMemoryError("much")
        return real(blueprint, roles, *args)

    monkeypatch.setattr(Blueprint, "ready", ready)
    found = planned()
    assert found.convert == ()
    assert {one.status for one in found.candidates[1:]} == {"out_of_memory"}
    assert found.candidates[0].fwd_us > 0


# --- models and files ------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path):
    """Of a model whose layer has four roles that float8 can compute: 120 is no multiple of 16."""
    pytest.importorskip("transformers")
    gc.freeze()  # what that has imported too
    path = tmp_path / "tiny" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps({**TINY_CONFIG, "intermediate_size": 120}))
    return path


@pytest.fixture
def run(monkeypatch, config, tmp_path):
    """The command on a tiny model and this CPU."""
    monkeypatch.setattr(Cpu, "defaults", replace(Cpu.defaults, visit_run_s=0.001))

    def run(*args):
        place = ["--device", "cpu", "--out", str(tmp_path / "out"), "--tables", str(tmp_path / "tables")]
        (tmp_path / "tables").mkdir(exist_ok=True)
        return CliRunner().invoke(app, ["plan", str(config), "--tokens", "32", *place, *args])

    return run


def test_the_command_writes_a_plan_that_the_filter_takes(run, tmp_path):
    result = run("--recipe", "tensorwise")
    assert result.exit_code == 0, result.output
    (path,) = (tmp_path / "out").rglob("*.yaml")
    assert path.name == "tiny-tensorwise-m32.yaml"
    assert path.parent.name == "plans"
    found = read_plan(path)
    assert found.shapes["mlp.down_proj"] == (32, 120, 64)
    assert found.indivisible == ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    table = make_table(make_point(32, 64, 64), recipe="tensorwise", device=found.device)
    tables = write_folder(tmp_path / "measured", table)
    wants_float8 = auto_filter("tensorwise", tokens=32, device=found.device.name, tables=tables, plan=path)
    layer = torch.nn.Linear(64, 64)
    assert wants_float8(layer, "model.layers.1.self_attn.o_proj") == ("self_attn.o_proj" in found.convert)
    assert "choice" in result.stdout
    assert "ready 1 of" in result.stderr


def test_stopped_is_exit_code_1_and_the_next_run_goes_on(run):
    stopped = run("--recipe", "rowwise", "--stop-after", "0")
    assert stopped.exit_code == 1
    assert "fp8gate: the time is up; run the same command to go on" in stopped.stderr
    assert run("--recipe", "rowwise", "--json").exit_code == 0


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["--recipe", "rowwise", "--tp", "4"], "tp: expected a divisor of num_key_value_heads = 2; got 4"),
        (["--recipe", "rowwise", "--sequence", "24"], "sequence: expected a divisor of tokens = 32; got 24"),
        (["--recipe", "rowwise", "--no-emulate-precision-casts"], "emulate_precision_casts: says how Inductor"),
        (["--recipe", "all", "--casts", "fp8gate"], "casts: says how Inductor compiles; on a CPU"),
        (["--recipe", "tensorwise", "--casts", "fp8gate"], "casts: expected inductor for tensorwise; got 'fp8gate'"),
    ],
)
def test_bad_input_is_a_usage_error(run, args, complaint):
    result = run(*args)
    assert result.exit_code == 2
    assert complaint in result.stderr


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "tiny-rowwise-m32.yaml"),
        ({"tp": 2}, "tiny-rowwise-m32-tp2.yaml"),
        ({"sequence": 16, "recomputed": True}, "tiny-rowwise-m32-s16-recomputed.yaml"),
    ],
)
def test_a_file_is_named_by_what_is_not_the_default(config, tmp_path, options, name):
    asked = {"sequence": None, "tp": 1, "recomputed": False, **options}
    subjects, _ = model_subjects(str(config), tokens=32, **asked)
    assert plan_path(tmp_path, subjects, ROWWISE, CPU).name == name


def test_a_plan_of_a_device_whose_name_only_looks_alike_is_not_replaced(config, tmp_path):
    (subject,), _ = model_subjects(str(config), tokens=32, sequence=None, tp=1, recomputed=False)
    path = plan_path(tmp_path, [subject], ROWWISE, CPU)
    other = Device(name=f"{cpu_name()} ", kind="cpu", memory_gib=1.0)
    write_plans([make_plan(device=other)], path)
    with pytest.raises(InputError, match=r"\$\.device\.name: expected .*; give another --out"):
        plan_path(tmp_path, [subject], ROWWISE, CPU)
    write_plans([make_plan(device=msgspec.structs.replace(other, name=cpu_name()))], path)
    assert plan_path(tmp_path, [subject], ROWWISE, CPU) == path


@pytest.mark.parametrize(
    ("recipe", "asked", "inductor", "name"),
    [
        ("rowwise", None, {"emulate_precision_casts": True}, "tiny-rowwise-m32.yaml"),
        ("rowwise", True, {"emulate_precision_casts": True}, "tiny-rowwise-m32.yaml"),
        ("rowwise", False, {}, "tiny-rowwise-m32-no_emulate_precision_casts.yaml"),
        ("tensorwise", None, {}, "tiny-tensorwise-m32.yaml"),
        ("tensorwise", True, {"emulate_precision_casts": True}, "tiny-tensorwise-m32-emulate_precision_casts.yaml"),
    ],
)
def test_a_setting_that_production_changes_can_be_asked_for(config, tmp_path, recipe, asked, inductor, name):
    (subject,), _ = model_subjects(str(config), tokens=32, sequence=None, tp=1, recomputed=False)
    assert make_protocol(torch.device("cuda"), recipe, asked).inductor == inductor
    assert plan_path(tmp_path, [subject], Variant(recipe), CPU, asked).name == name


def test_torchaos_rule_sees_the_undivided_layer(config):
    (subject,), _ = model_subjects(str(config), tokens=32, sequence=None, tp=2, recomputed=False)
    assert subject.whole["self_attn.q_proj"] == (64, 64)
    assert subject.blueprint.shapes["self_attn.q_proj"].n == 32


def test_a_gpu_is_measured_at_its_own_clock_and_a_cpu_quickly():
    gpu, cpu = make_protocol(torch.device("cuda"), "rowwise"), make_protocol(CPU, "rowwise")
    assert (gpu.settle_s, gpu.run_s, gpu.pause_s, gpu.compile) == (0.2, 1.0, 0.15, True)
    assert gpu.inductor == {"emulate_precision_casts": True}
    assert (cpu.settle_s, cpu.pause_s, cpu.compile, cpu.inductor) == (0.0, 0.0, False, {})


# --- what people see -------------------------------------------------------------------------------------------


def test_the_text_compares_the_choices():
    text = plan_text(make_plan())
    rows = {line.split("  ")[0]: line.split() for line in text.splitlines() if "x" in line}
    assert rows["plan"][1:] == ["q_proj", "0.270", "1.111x", "1.100x", "1.120x", "1.050x", "7"]
    assert rows["table"][1:4] == ["gate_proj", "0.301", "0.997x"]
    assert "out_of_memory" in text
    assert "4 sets measured; float8: self_attn.q_proj" in text
    assert "no multiples of 16, left in bf16: self_attn.k_proj" in text
    assert "no linears, left in bf16: mlp.experts" in text


def test_the_json_has_every_candidate_and_choice():
    data = json.loads(msgspec.json.encode(plan_json(make_plan())))
    assert data["speedup"] == {"bf16": 1.0, "all float8": None, "torchao's rule": None, "table": 0.9967, "plan": 1.111}
    assert data["candidates"][1]["convert"] == ["self_attn.q_proj"]


def test_without_a_table_or_a_rule_there_is_no_answer():
    rows = [line for line in plan_text(make_plan(table=None, torchao=None)).splitlines() if "no answer" in line]
    assert [row.split("  ")[0] for row in rows] == ["torchao's rule", "table"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_sets_of_a_real_layer_share_memory_on_a_gpu_and_compute_what_they_should(config, recipe, monkeypatch):
    """Each is checked against bf16 when it is loaded, beside those that are loaded already, then all are visited; what
    was captured first still computes the same then, in the memory where its output was."""
    config.write_text(json.dumps(TINY_CONFIG))  # every role of it is divisible
    (subject,), _ = model_subjects(str(config), tokens=256, sequence=256, tp=1, recomputed=False)
    device = torch.device("cuda")
    protocol = msgspec.structs.replace(make_protocol(device, recipe), run_s=0.05, settle_s=0.05)
    bench = BlockBench(PlanJob(blueprint=subject.blueprint, recipe=recipe, protocol=protocol, device=device))
    sets = [BF16_SET, frozenset({"self_attn.q_proj", "mlp.down_proj"}), frozenset(subject.blueprint.shapes)]
    timer, _, _ = bench._on_device()
    outputs, forget_results = [], timer.forget_results

    def note_and_forget(prepared):
        timer.results(prepared)
        outputs.append(_Memory(prepared.outputs.output))
        forget_results(prepared)

    monkeypatch.setattr(timer, "forget_results", note_and_forget)
    for one in sets:
        assert bench.answer(("compile", one)) == Done()
        assert isinstance(bench.answer(("load", one)), Done)
    for one in [*sets, *sets]:
        assert bench.answer(("visit", one)).slowdown is None
    for one, output in zip(sets, outputs, strict=True):
        prepared = bench._prepared[one]
        prepared.graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(output.now(), output.then)


class _Memory:
    """Where a contiguous bf16 tensor lies on the GPU, without keeping it there, and what was in it."""

    def __init__(self, tensor):
        assert tensor.is_contiguous()
        self.__cuda_array_interface__ = {
            "shape": tuple(tensor.shape),
            "typestr": "<i2",
            "data": (tensor.data_ptr(), False),
            "version": 3,
        }
        self.then = self.now()

    def now(self):
        return torch.as_tensor(self, device="cuda").clone()
