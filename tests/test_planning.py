"""A plan from the block to the file, really measured on the CPU, in this process and in others."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from types import SimpleNamespace

import msgspec
import pytest
import torch
from builders import make_point, make_table, write_folder
from plans import PROTOCOL, TINY_CONFIG, Block, block_input, make_plan
from samples import quick_points
from typer.testing import CliRunner

from fp8gate import auto_filter, read_plan
from fp8gate.calibrate.planning import plan_block
from fp8gate.calibrate.planning.block_worker import BlockBench, Done, Failure, PlanJob, Visit
from fp8gate.calibrate.planning.block_worker_pool import BlockWorkerDiedError, BlockWorkerPool
from fp8gate.calibrate.planning.plan_block import make_protocol, model_subject, plan, plan_path
from fp8gate.calibrate.planning.search import BF16_SET, CONTROL_SET
from fp8gate.calibrate.planning.visit_rounds import StoppedError
from fp8gate.calibrate.report.plan_text import plan_json, plan_text
from fp8gate.cli import app
from fp8gate.filter.contract.devices import cpu_name
from fp8gate.filter.contract.plan import exceeds_control, format_plan, parse_plan
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.contract.table import Device

CPU = torch.device("cpu")
INNER, OUTER = frozenset({"inner"}), frozenset({"outer"})


@pytest.fixture(autouse=True)
def _quick(tmp_path_factory, monkeypatch):
    """Visits take milliseconds, and the device is not locked for other tests."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("locks")))
    with quick_points():
        yield


def planned(**options):
    return plan(Block(), [block_input()], **{"recipe": "rowwise", "protocol": PROTOCOL, **options})


@pytest.fixture
def tables(tmp_path):
    """This CPU's: inner wins by 100 us, outer loses."""
    device = Device(name=cpu_name(), kind="cpu", memory_gib=1.0)
    points = make_point(16, 32, 64, 2.0, bf16_us=(100.0, 100.0)), make_point(16, 64, 32, 0.5, bf16_us=(100.0, 100.0))
    return write_folder(tmp_path / "tables", make_table(*points, device=device))


def test_every_set_of_two_roles_is_measured_and_the_file_reads_back(tables):
    found = planned(tables=tables)
    assert {one.convert for one in found.candidates} >= {(), ("inner",), ("outer",)}
    assert found.candidates[0].convert == ()
    assert {one.status for one in found.candidates} == {"measured"}
    assert parse_plan(format_plan(found), source="plan").convert == found.convert
    assert found.shapes == {"inner": (16, 32, 64), "outer": (16, 64, 32)}
    assert all(one.fwd_us > 0 and one.bwd_us > 0 for one in found.candidates)


def test_bf16_is_what_is_left_unless_something_wins():
    """On a CPU float8 casts cost far more than a product of 16 rows."""
    assert planned().convert == ()


def test_bf16_is_measured_against_itself_and_that_is_no_candidate(tmp_path):
    found = planned(out=tmp_path)
    assert 0.2 < found.control < 5
    assert not any("bf16 again" in one.convert for one in found.candidates)
    (journal,) = tmp_path.glob("journal-*.jsonl")
    visits = [line for line in journal.read_text().splitlines() if '"convert":["bf16 again"]' in line]
    assert len(visits) == PROTOCOL.screening + PROTOCOL.final


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


def test_what_the_table_says_is_kept_beside_what_was_measured(tables):
    found = planned(tables=tables)
    assert found.table.convert == ("inner",)
    bf16_us = found.candidates[0].fwd_us + found.candidates[0].bwd_us
    assert found.candidate(("inner",)).predicted == pytest.approx(bf16_us / max(bf16_us - 100, 1))
    assert found.candidate(("outer",)).predicted == pytest.approx(bf16_us / (bf16_us + 200))


def test_without_a_table_the_search_starts_anyway_and_says_so(tmp_path):
    said = []
    found = planned(tables=tmp_path, say=said.append)
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


def test_the_same_call_goes_on_where_it_was(tmp_path):
    with pytest.raises(StoppedError):
        planned(out=tmp_path, stop_after_s=0.0)
    first = planned(out=tmp_path)
    (journal,) = tmp_path.glob("journal-*.jsonl")
    lines = journal.read_bytes().splitlines()
    again = planned(out=tmp_path)
    assert journal.read_bytes().splitlines() == lines
    assert again.candidates == first.candidates
    assert planned(out=tmp_path, fresh=True).candidates != first.candidates


def test_what_float8_cannot_compute_is_left_out():
    block = torch.nn.Sequential(Block(), torch.nn.Linear(32, 10, dtype=torch.bfloat16))
    found = plan(block, [block_input()], recipe="rowwise", protocol=PROTOCOL)
    assert found.indivisible == ("1",)
    assert not any("1" in one.convert for one in found.candidates)


def test_a_block_that_float8_cannot_compute_is_an_error():
    ten_rows = torch.randn(10, 32, dtype=torch.bfloat16, requires_grad=True)
    with pytest.raises(
        ValueError, match="block: expected a linear with dimensions that are multiples of 16; found none"
    ):
        plan(Block(), [ten_rows], recipe="rowwise", protocol=PROTOCOL)


def test_where_every_set_fails_bf16_is_measured_alone(monkeypatch):
    real = plan_block.Blueprint.ready

    def ready(blueprint, roles, *args):
        if roles:
            raise torch.OutOfMemoryError("much")
        return real(blueprint, roles, *args)

    monkeypatch.setattr(plan_block.Blueprint, "ready", ready)
    found = planned()
    assert found.convert == ()
    assert {one.status for one in found.candidates[1:]} == {"out_of_memory"}
    assert found.candidates[0].fwd_us > 0


# --- one process's part ----------------------------------------------------------------------------------------


@pytest.fixture
def job():
    blueprint = plan_block.Blueprint.of(Block(), [block_input()], recomputed=False)
    return PlanJob(blueprint=blueprint, recipe="rowwise", protocol=PROTOCOL, device=CPU)


def test_a_visitor_compiles_loads_and_visits(job):
    visitor = BlockBench(job)
    assert visitor.answer(("compile", INNER)) == Done()
    assert 0.01 < visitor.answer(("load", INNER)).error < 0.3
    visit = visitor.answer(("visit", INNER))
    assert isinstance(visit, Visit)
    assert visit.fwd_us > 0


def test_the_control_is_bf16_again(job):
    visitor = BlockBench(job)
    assert visitor.answer(("compile", CONTROL_SET)) == Done()
    assert visitor.answer(("load", CONTROL_SET)) == Done(error=0.0)


def test_a_wrong_result_is_trouble(job, monkeypatch):
    visitor = BlockBench(job)
    visitor.answer(("compile", INNER))
    monkeypatch.setattr("fp8gate.calibrate.arms.block.Block.error", lambda *_: (float("nan"), "output"))
    assert visitor.answer(("load", INNER)) == Failure("failed", "wrong result: output is nan from bf16's")


@pytest.mark.parametrize(
    ("error", "status"), [(RuntimeError("odd"), "failed"), (torch.OutOfMemoryError("much"), "out_of_memory")]
)
def test_what_goes_wrong_is_an_answer(job, monkeypatch, error, status):
    def fail(*_):
        raise error

    monkeypatch.setattr(plan_block.Blueprint, "ready", fail)
    assert BlockBench(job).answer(("compile", INNER)).status == status


def test_processes_answer_as_this_one_does_and_a_dead_one_is_named(job):
    with BlockWorkerPool(job, 2) as crew:
        assert dict(crew.compile([BF16_SET, INNER, OUTER])) == {BF16_SET: Done(), INNER: Done(), OUTER: Done()}
        here = BlockBench(job)
        here.answer(("compile", INNER))
        assert crew.load(INNER).error == pytest.approx(here.answer(("load", INNER)).error, rel=0.05)
        assert crew.visit(INNER).bwd_us > 0
        assert crew.others() == []
        processes = [member.process for member in crew._members]
        crew._homes[INNER].process.kill()
        with pytest.raises(BlockWorkerDiedError, match="its process ended with exit code -9") as caught:
            crew.visit(INNER)
        assert caught.value.args[1] == INNER
    assert not any(process.is_alive() for process in processes)


def test_bf16_again_comes_from_another_process(job):
    with BlockWorkerPool(job, 2) as crew:
        list(crew.compile([BF16_SET]))
        list(crew.compile([INNER, OUTER]))
        list(crew.compile([CONTROL_SET]))
        assert crew._homes[CONTROL_SET] is not crew._homes[BF16_SET]


def test_processes_end_with_the_plan_even_within_a_visit(job):
    """As if it was killed: the pipe closes, and nobody ends them."""
    long = replace(job, protocol=msgspec.structs.replace(PROTOCOL, pause_s=60.0))
    with BlockWorkerPool(long, 1) as members:
        (member,) = members._members
        list(members.compile([INNER]))
        members.load(INNER)
        member.send(("visit", INNER))
        member.connection.close()
        member.process.join(10.0)
        assert member.process.exitcode == 1


def test_a_block_that_cannot_be_made_ends_the_processes():
    blueprint = plan_block.Blueprint.of(Block(), [block_input()], recomputed=False)
    blueprint.inputs["x"] = torch.zeros(16, 33, dtype=torch.bfloat16)  # not what the block takes
    with (
        pytest.raises(BlockWorkerDiedError, match="the block cannot be made on the device: RuntimeError"),
        BlockWorkerPool(PlanJob(blueprint=blueprint, recipe="rowwise", protocol=PROTOCOL, device=CPU), 1),
    ):
        pass


def test_processes_are_as_many_as_the_device_has_memory_for(monkeypatch):
    monkeypatch.setattr(plan_block, "default_workers", lambda _: 14)
    with torch.device("meta"):
        template = torch.nn.ModuleDict({"w": torch.nn.Linear(8192, 28672, bias=False)})
    blueprint = SimpleNamespace(shapes={"w": LinearShape(8192, 8192, 28672)}, template=template)
    assert [plan_block._useful_workers(blueprint, gib) for gib in (1.0, 40.0, 1000.0)] == [1, 6, 14]
    template.experts = torch.nn.Parameter(torch.empty(8, 8192, 28672, device="meta"))  # no linears, but there
    assert [plan_block._useful_workers(blueprint, gib) for gib in (40.0, 80.0, 1000.0)] == [1, 2, 14]


# --- models and files ------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path):
    pytest.importorskip("transformers")
    path = tmp_path / "tiny" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(TINY_CONFIG))
    return path


@pytest.fixture
def run(monkeypatch, config, tmp_path):
    """The command on a tiny model and this CPU."""
    monkeypatch.setattr(plan_block, "CPU_RUN_S", 0.001)

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
    assert found.shapes["mlp.down_proj"] == (32, 128, 64)
    table = make_table(make_point(32, 64, 64), recipe="tensorwise", device=found.device)
    tables = write_folder(tmp_path / "measured", table)
    wants_float8 = auto_filter("tensorwise", tokens=32, device=found.device.name, tables=tables, plan=path)
    layer = torch.nn.Linear(64, 128)
    assert wants_float8(layer, "model.layers.1.mlp.up_proj") == ("mlp.up_proj" in found.convert)
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
        (["--recipe", "rowwise", "--no-emulate-precision-casts"], "emulate_precision_casts: a setting of Inductor"),
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
    subject = model_subject(str(config), tokens=32, **asked)
    assert plan_path(tmp_path, subject, "rowwise", CPU).name == name


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
    subject = model_subject(str(config), tokens=32, sequence=None, tp=1, recomputed=False)
    assert make_protocol(torch.device("cuda"), recipe, asked).inductor == inductor
    assert plan_path(tmp_path, subject, recipe, CPU, asked).name == name


def test_torchaos_rule_sees_the_undivided_layer(config):
    subject = model_subject(str(config), tokens=32, sequence=None, tp=2, recomputed=False)
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
    subject = model_subject(str(config), tokens=256, sequence=256, tp=1, recomputed=False)
    device = torch.device("cuda")
    protocol = msgspec.structs.replace(make_protocol(device, recipe), run_s=0.05, settle_s=0.05)
    visitor = BlockBench(PlanJob(blueprint=subject.blueprint, recipe=recipe, protocol=protocol, device=device))
    sets = [BF16_SET, frozenset({"self_attn.q_proj", "mlp.down_proj"}), frozenset(subject.blueprint.shapes)]
    timer, _, _ = visitor._on_device()
    outputs, forget_results = [], timer.forget_results

    def note_and_forget(prepared):
        timer.results(prepared)
        outputs.append(_Memory(prepared.outputs.output))
        forget_results(prepared)

    monkeypatch.setattr(timer, "forget_results", note_and_forget)
    for one in sets:
        assert visitor.answer(("compile", one)) == Done()
        assert isinstance(visitor.answer(("load", one)), Done)
    for one in [*sets, *sets]:
        assert visitor.answer(("visit", one)).slowdown is None
    for one, output in zip(sets, outputs, strict=True):
        prepared = visitor._prepared[one]
        prepared.forward.replay()
        prepared.backward.replay()
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
