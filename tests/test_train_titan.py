"""The benchmark in torchtitan: its log is read, its journal goes on, its table is made; and it trains, on the CPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import pytest
import torch
from builders import DEVICE, SOFTWARE_HERE, make_point, make_table, write_file
from documents import page_text
from plans import make_plan

from fp8gate.filter.contract.plans.plan import Candidate
from fp8gate.filter.contract.plans.plan_file import write_plans

ROOT = Path(__file__).parent.parent
BENCHMARK = ROOT / "benchmarks" / "train_titan.py"
QKV, WO, W1, W2 = "attention.qkv_linear.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2"
LOG = """\
W1126 08:00:00.000000 12 torch/distributed/run.py:851] *****************************************
[rank1]:[titan] 2026-11-26 08:00:01,001 - root - INFO - step:  5  loss:  1.00000  grad_norm:  1.0000  \
memory: 99.00GiB(99.00%)  tps: 1  tflops: 1.00  mfu: 1.00%
[rank0]:[titan] 2026-11-26 08:00:01,002 - root - INFO - step:  5  loss:  8.01250  grad_norm:  2.1170  \
memory: 61.25GiB(77.35%)  tps: 12,345  tflops: 1,402.50  mfu: 40.66%
[rank0]:[titan] 2026-11-26 08:00:02,002 - root - INFO - step: 10  loss:  7.50000  grad_norm:  2.1000  \
memory: 61.30GiB(77.40%)  tps: 9,000  tflops: 402.50  mfu: N/A
"""


@pytest.fixture
def output(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import train_titan_output

    return train_titan_output


@pytest.fixture
def titan(output: ModuleType) -> ModuleType:
    import train_titan

    return train_titan


def make_setup(output: ModuleType, **fields: Any) -> Any:
    made = {
        "widths": "llama3-8b",
        "layers": 2,
        "tp": 2,
        "fsdp": 1,
        "recipe": "rowwise",
        "recompute": "selective",
        "tokens": 8192,
        "steps": 20,
        "warm_up": 10,
        "fused": True,
        "tables": None,
        "plan": None,
    }
    return output.Setup(**{**made, **fields})


def make_header(output: ModuleType, **fields: Any) -> Any:
    runs = (
        output.Run(choices=("bf16",), float8=()),
        output.Run(choices=("all", "rule"), float8=(QKV, WO, W1, W2)),
        output.Run(choices=("table",), float8=(W1,)),
    )
    made = {"setup": make_setup(output), "visits": 2, "linears": 8, "device": DEVICE, "software": SOFTWARE_HERE}
    return output.Header(**{**made, "runs": runs, **fields})


def make_visit(output: ModuleType, run: str, number: int, *speeds: int, **fields: Any) -> Any:
    """speeds: tokens per second at the steps 5, 10, 15, ..."""
    steps = [
        output.Step(step=5 * i, loss=9.0 - i, memory_gib=60.0 + i, tokens_per_s=speed, tflops=1.0, mfu=None)
        for i, speed in enumerate(speeds, start=1)
    ]
    return output.Visit(
        **{"run": run, "round": number, "gpus": ("a", "b"), "wall_s": 50.0, "steps": tuple(steps), **fields}
    )


# --- torchtitan's log ------------------------------------------------------------------------------------------


def test_steps_are_read_from_the_lines_of_rank_0(output: ModuleType) -> None:
    first, second = output.read_steps(LOG)
    assert first == output.Step(step=5, loss=8.0125, memory_gib=61.25, tokens_per_s=12345, tflops=1402.5, mfu=40.66)
    assert (second.step, second.tokens_per_s, second.mfu) == (10, 9000, None)


def test_without_torchruns_prefix_steps_are_read_too(output: ModuleType) -> None:
    alone = "\n".join(line for line in LOG.splitlines() if "[rank1]" not in line).replace("[rank0]:", "")
    assert output.read_steps(alone) == output.read_steps(LOG)


def test_other_lines_are_no_steps(output: ModuleType) -> None:
    assert output.read_steps("[rank0]:[titan] - Training starts at step 1\nstep: what\n") == ()


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        ("a\n[rank1]:[rank1]: torch.OutOfMemoryError: CUDA out of memory\n====\n", "torch.OutOfMemoryError: CUDA out"),
        ("ValueError: the first\nRuntimeError: the last\nrank 0 failed\n", "RuntimeError: the last"),
        ("Killed\n\n", "Killed"),
        ("", "nothing was written"),
    ],
)
def test_the_line_that_says_why_a_visit_failed(output: ModuleType, log: str, expected: str) -> None:
    assert expected in output.last_words(log)


# --- the order of the visits, and the journal --------------------------------------------------------------------


def test_choices_that_convert_the_same_linears_are_one_run(titan: ModuleType) -> None:
    float8 = {"bf16": (), "all": (QKV, W1), "rule": (QKV, W1), "table": (W1,), "plan": (W1,)}
    runs = titan.runs_of(float8, ["async TP", "without CUDA graphs"], {})
    assert [(run.choices, run.variant) for run in runs] == [
        *((("bf16",), None), (("all", "rule"), None), (("table", "plan"), None)),
        *((("bf16",), "async TP"), (("plan",), "async TP")),
        *((("bf16",), "without CUDA graphs"), (("plan",), "without CUDA graphs")),
    ]
    assert [run.name for run in runs][3:5] == ["bf16; async TP", "fp8gate, plan; async TP"]
    assert len(titan.runs_of(float8, [], {})) == 3


def test_without_a_plan_the_table_has_the_variants(titan: ModuleType) -> None:
    runs = titan.runs_of({"bf16": (), "table": (W1,)}, ["async TP"], {})
    assert [run.choices for run in runs if run.variant] == [("bf16",), ("table",)]


def test_with_fp8gates_casts_all_float8_runs_and_the_set_of_their_own_table(titan: ModuleType) -> None:
    float8 = {"bf16": (), "all": (QKV, W1), "table": (W1,), "plan": (QKV,)}
    runs = titan.runs_of(float8, ["fp8gate casts"], {"all": (QKV, W1), "table": (QKV,)})[4:]
    assert [(run.choices, run.float8) for run in runs] == [(("all",), (QKV, W1)), (("table",), (QKV,))]
    assert runs[1].name == "fp8gate, table; fp8gate casts"
    (run,) = titan.runs_of(float8, ["fp8gate casts"], {"all": (QKV, W1), "table": (QKV, W1)})[4:]
    assert run.name == "all float8; fp8gate, table; fp8gate casts"
    without_table = titan.runs_of(float8, ["fp8gate casts"], {"all": (QKV, W1)})[4:]
    assert [run.choices for run in without_table] == [("all",)]
    assert len(titan.runs_of(float8, ["fp8gate casts"], {})) == 4


def test_async_tp_is_for_tensor_parallelism_on_gpus(titan: ModuleType, output: ModuleType) -> None:
    variants = ["async TP", "without CUDA graphs"]
    for tp, kind, expected in ((2, "cuda", variants), (1, "cuda", ["without CUDA graphs"]), (2, "cpu", [])):
        setup = make_setup(output, tp=tp, fsdp=2 // tp)
        device = msgspec.structs.replace(DEVICE, kind=kind)
        listing = titan.Listing(
            float8={"bf16": (), "table": (W1,)}, linears=8, device=device, gpus=(), software=SOFTWARE_HERE
        )
        runs = titan.header_of(setup, listing, ["table"], 2, variants).runs
        assert list(dict.fromkeys(run.variant for run in runs if run.variant)) == expected


def test_every_other_round_goes_backwards(output: ModuleType) -> None:
    header = make_header(output, visits=3)
    bf16, both, table = (run.name for run in header.runs)
    order = [(run.name, number) for run, number in output.missing_visits(header, [])]
    rounds = [[(name, number) for name in names] for number, names in enumerate([[bf16, both, table]] * 3)]
    assert order == [*rounds[0], *rounds[1][::-1], *rounds[2]]


def test_what_is_measured_is_not_measured_again_nor_what_failed(output: ModuleType) -> None:
    header = make_header(output)
    bf16, both, table = (run.name for run in header.runs)
    visits = [make_visit(output, bf16, 0, 100), make_visit(output, both, 0, error="OutOfMemoryError")]
    left = [(run.name, number) for run, number in output.missing_visits(header, visits)]
    assert left == [(table, 0), (table, 1), (bf16, 1)]


def test_a_round_that_was_begun_on_other_gpus_begins_again(output: ModuleType) -> None:
    header = make_header(output)
    bf16, both, table = (run.name for run in header.runs)
    first = [make_visit(output, name, 0, 100) for name in (bf16, both, table)]
    begun = [make_visit(output, table, 1, 100), make_visit(output, both, 1, 100)]

    def left(gpus: Any) -> list[str]:
        return [run.name for run, _ in output.missing_visits(header, [*first, *begun], gpus)]

    assert left(("a", "b")) == left(None) == [bf16]
    assert left(("c", "d")) == [table, both, bf16]


def test_gains_are_not_over_bf16_on_other_gpus(output: ModuleType) -> None:
    header = make_header(output)
    bf16, both, _ = (run.name for run in header.runs)
    visits = [make_visit(output, bf16, 0, 1, 1, 1000, gpus=("c", "d")), make_visit(output, both, 0, 1, 1, 1100)]
    assert "10.0%" not in output.report(header, visits)
    visits.append(make_visit(output, bf16, 0, 1, 1, 1000))
    assert "| +10.0% " in output.report(header, visits)


def test_a_journal_goes_on_after_its_writer_was_killed(titan: ModuleType, output: ModuleType, tmp_path: Path) -> None:
    header, visit = make_header(output), make_visit(output, "bf16", 0, 100, 100, 110)
    journal = titan.Journal.of(header.setup, tmp_path)
    assert titan.visits_of(journal, header) == []
    titan.append(journal.visits, visit)
    with open(journal.visits, "ab") as file:
        file.write(b'{"run":"bf16","rou')
    assert titan.visits_of(journal, header) == [visit]
    titan.append(journal.visits, visit)
    assert titan.visits_of(journal, header) == [visit, visit]


def test_a_journal_of_something_else_is_refused(titan: ModuleType, output: ModuleType, tmp_path: Path) -> None:
    header = make_header(output)
    journal = titan.Journal.of(header.setup, tmp_path)
    titan.visits_of(journal, header)
    other = make_header(output, setup=make_setup(output, steps=40))
    with pytest.raises(SystemExit, match=r"selective-recompute-rowwise\.jsonl: setup: expected .*steps=40"):
        titan.visits_of(journal, other)


def test_files_are_named_by_the_setup(output: ModuleType) -> None:
    apart = {"recompute": "none", "fused": False, "recipe": "rowwise_with_gw_hp"}
    fsdp = make_setup(output, tp=1, fsdp=2, tokens=4096, **apart)
    assert make_setup(output).name == "titan-llama3-8b-2-layers-m8192-tp2-selective-recompute-rowwise"
    expected = "titan-llama3-8b-2-layers-unfused-m4096-fsdp2-no-recompute-rowwise_with_gw_hp"
    assert fsdp.name == expected
    assert fsdp.ranks == make_setup(output).ranks == 2


def test_no_visit_begins_that_may_not_end_in_time(titan: ModuleType, output: ModuleType) -> None:
    visits = [make_visit(output, "bf16", 0, wall_s=60.0), make_visit(output, "table", 0, wall_s=30.0)]
    now = time.monotonic()
    assert titan.is_too_late(now + 50, visits)
    assert not titan.is_too_late(now + 70, visits)
    assert not titan.is_too_late(now + 1, [])
    assert not titan.is_too_late(None, visits)


def test_help_says_every_default(
    titan: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    given = ["--widths", "tiny", "--tp", "2", "--recipe", "rowwise", "--out", "folder"]
    monkeypatch.setattr(sys, "argv", ["train_titan.py", *given])
    defaults = titan.parse()
    monkeypatch.setattr(sys, "argv", ["train_titan.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        titan.parse()
    options = re.split(r"^  (?=--)", capsys.readouterr().out, flags=re.MULTILINE)
    said = {option.split()[0]: " ".join(option.split()) for option in options}
    for name in ("recompute", "tokens", "steps", "warm_up", "visits"):
        assert said[f"--{name.replace('_', '-')}"].endswith(f"; default: {getattr(defaults, name)}")
    others = {
        "--fsdp": f"; {defaults.fsdp} by default",
        "--layers": "default: 16 for llama3-8b, 4 for llama3-70b, 2 for tiny",
        "--tables": "default: those of fp8gate",
        "--plan": "default: none, and that choice is left out",
        "--choices": "default: all",
        "--variants": "default: all",
        "--stop-after": "default: after all visits",
    }
    assert all(said[name].endswith(default) for name, default in others.items()), said


# --- the table ---------------------------------------------------------------------------------------------------


def test_gains_are_over_bf16_of_the_same_round(output: ModuleType) -> None:
    header = make_header(output)
    bf16, both, table = (run.name for run in header.runs)
    visits = [
        make_visit(output, bf16, 0, 1, 1, 1000, 1000),  # the steps up to 10 do not count
        make_visit(output, both, 0, 1, 1, 800, 1200),  # 960: as many tokens in each line
        make_visit(output, table, 0, 1, 1, 1050, 1050),
        make_visit(output, table, 1, 1, 1, 1060, 1060),
        make_visit(output, both, 1, 1, 1, 980, 980),
        make_visit(output, bf16, 1, 1, 1, 1020, 1020),
    ]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in output.report(header, visits).splitlines()]
    found = {row[0]: row[1:] for row in rows if row}
    assert found[bf16] == ["0 of 8", "1010", "", "-1.0%, +1.0%", "64.0", "", "5.0000"]
    assert found[both] == ["4 of 8", "970", "-4.0%", "-4.0%, -3.9%", "64.0", "", "5.0000"]
    assert found[table] == ["1 of 8", "1055", "+4.5%", "+5.0%, +3.9%", "64.0", "", "5.0000"]
    assert "bf16 against itself: its visits differ by 2.0%" in output.report(header, visits)
    assert "not measured" not in output.report(header, visits)


def test_the_table_says_what_is_missing_and_what_failed(output: ModuleType) -> None:
    header = make_header(output)
    bf16, both, _ = (run.name for run in header.runs)
    visits = [make_visit(output, bf16, 0, 1, 1, 1000), make_visit(output, both, 0, error="OutOfMemoryError: CUDA")]
    said = output.report(header, visits)
    assert "not measured yet: 3 of 6 visits" in said
    assert f"failed: {both}, visit 1: OutOfMemoryError: CUDA" in said
    assert "selective recomputation, 8192 tokens, rowwise, steps 11 to 20" in said


# --- where a step's time goes --------------------------------------------------------------------------------------


@pytest.fixture
def trace(output: ModuleType) -> ModuleType:
    import train_titan_trace

    return train_titan_trace


def test_a_step_is_taken_apart_by_kernels(trace: ModuleType) -> None:
    """Two steps, in microseconds. NCCL runs beside a product; from 700 to 900 nothing runs."""
    events = [
        {"cat": "kernel", "name": "nvjet_tst_192x192_64x4_2x1_v_bz_TNN", "ts": 100, "dur": 400},
        {"cat": "kernel", "name": "ncclDevKernel_ReduceScatter_Sum_bf16", "ts": 300, "dur": 400},
        {"cat": "kernel", "name": "triton_red_fused__to_copy_abs_max_0", "ts": 900, "dur": 150},
        {"cat": "gpu_memcpy", "name": "Memcpy DtoD", "ts": 1050, "dur": 50},
        {"cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 5000},
        {"ph": "M", "name": "process_name"},
    ]
    found = trace.summarize(events, "bf16", 2)
    assert (found.step_ms, found.idle_ms) == (0.5, 0.1)
    assert {kind: ms for kind, ms in found.kinds_ms.items() if ms} == {
        "bf16 products": 0.2,
        "communication": 0.2,
        "casts and others": 0.1,
    }
    assert "| bf16     | 0.5         | 0.1" in trace.report([found])


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("void cutlass::device_kernel<enable_3x_kernel_for_sm9x<cutlass::float_e4m3_t, ...>>", "float8 products"),
        ("nvjet_qqtst_128x256_128x4_1x2_h_bz_coopA_TNT", "float8 products"),
        ("nvjet_sm90_qqtst_128x256_128x4_1x2_h_bz_coopA_TNT", "float8 products"),
        ("nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNN", "bf16 products"),
        ("nvjet_sm90_tst_192x192_64x4_2x1_v_bz_coopB_TNN", "bf16 products"),
        ("triton_red_fused__scaled_mm__to_copy_amax_clamp_12", "casts and others"),
        ("void pytorch_flash::flash_fwd_kernel<...>", "attention"),
        ("ncclDevKernel_AllGather_RING_LL", "communication"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
    ],
)
def test_kernels_are_told_by_their_names(trace: ModuleType, kernel: str, kind: str) -> None:
    assert trace.kind_of(kernel) == kind


def test_a_trace_without_a_gpu_is_refused(trace: ModuleType) -> None:
    with pytest.raises(ValueError, match="bf16: expected kernels in the trace, found none"):
        trace.summarize([{"cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 5}], "bf16", 2)


def test_runs_are_traced_once(
    titan: ModuleType, output: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    header, traced = make_header(output), []

    def train(setup: Any, run: Any, log: Any, limit_s: float, flag: str, file: str) -> int:
        assert flag == "--trace"
        traced.append(run.name)
        if run.choices == ("table",):
            return 1
        made = titan.StepTrace(run="?", steps=2, step_ms=1.0, idle_ms=0.5, kinds_ms=dict.fromkeys(KINDS, 0.0))
        Path(file).write_bytes(msgspec.json.encode(made))
        return 0

    monkeypatch.setattr(titan, "train", train)
    log = titan.Journal.of(header.setup, tmp_path).log
    titan.trace_runs(header.setup, header, log, None)
    assert traced == [run.name for run in header.runs]
    said = capsys.readouterr()
    assert f"fp8gate, table: failed, see {log}" in said.err
    assert f"| {header.runs[1].name}" in said.out
    titan.trace_runs(header.setup, header, log, None)
    assert traced[3:] == [header.runs[2].name]  # what failed is tried again, what was traced is not
    other = msgspec.structs.replace(header, setup=msgspec.structs.replace(header.setup, plan="/other.yaml"))
    with pytest.raises(SystemExit, match=r"-traces\.jsonl: setup: expected .*/other\.yaml.*another folder to --out"):
        titan.trace_runs(other.setup, other, log, None)  # it has the same names for other sets of linears


KINDS = ("bf16 products", "float8 products", "attention", "communication", "optimizer", "casts and others")


# --- real runs ---------------------------------------------------------------------------------------------------

ROWS, DIM, HIDDEN, OUT = 64, 256, 768, 768  # of torchtitan's debug model
SHAPES = {
    "self_attn.qkv_proj": (ROWS, DIM, OUT // 2),
    "self_attn.o_proj": (ROWS, DIM // 2, DIM),
    "mlp.gate_proj": (ROWS, DIM, HIDDEN // 2),
    "mlp.up_proj": (ROWS, DIM, HIDDEN // 2),
    "mlp.down_proj": (ROWS, HIDDEN // 2, DIM),
}
WINS = ("self_attn.qkv_proj", "mlp.down_proj")


def write_inputs(folder: Path) -> tuple[Path, Path]:
    """A table in which all but wo win, and a plan with wqkv and w2, of a rank's shards under TP 2."""
    table = make_table(
        make_point(ROWS, DIM, OUT // 2, 1.5),
        make_point(ROWS, DIM // 2, DIM, 0.5),
        make_point(ROWS, HIDDEN // 2, DIM, 1.5),
    )
    none = Candidate((), 7, 100.0, 200.0, 1.0, 1.0, 1.0, 1.0, 0.0, "measured")
    best = Candidate(WINS, 7, 90.0, 180.0, 1.1, 1.09, 1.12, 1.05, 0.0, "measured")
    rest = {"indivisible": (), "left_alone": (), "table": None, "torchao": None}
    plan = make_plan(shapes=SHAPES, tokens=ROWS, tp=2, convert=WINS, candidates=(none, best), **rest)
    write_plans([plan], folder / "plan.yaml")
    return write_file(table, folder / "rowwise.yaml"), folder / "plan.yaml"


# --- what it compiles -------------------------------------------------------------------------------------------


NEEDS_TITAN = pytest.mark.skipif(util.find_spec("torchtitan") is None, reason="not installed: torchtitan")


@NEEDS_TITAN
@pytest.mark.parametrize("is_used", [True, False])
def test_a_collective_is_dead_whose_result_nothing_uses(output: ModuleType, is_used: bool) -> None:
    import train_titan_graphs

    ops, graph = torch.ops._c10d_functional, torch.fx.Graph()
    x = graph.placeholder("x")
    both = [graph.call_function(op, (x, "max", "0")) for op in (ops.all_reduce.default, ops.all_reduce_.default)]
    used, other = (graph.call_function(ops.wait_tensor.default, (one,)) for one in both)
    graph.output((used, other) if is_used else (used,))
    assert train_titan_graphs.dead_collectives(graph) == ([] if is_used else ["all_reduce"])
    rows = train_titan_graphs.report({"forward": graph}).splitlines()[2:]
    assert [cell.strip() for cell in rows[0].split("|")[1:-1]] == ["forward", "all_reduce", "2", "" if is_used else "1"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@NEEDS_TITAN
@pytest.mark.parametrize(
    ("options", "row"),
    [
        (["--choice", "bf16"], "| none (bf16) | 0, 0 | |"),
        (["--choice", "table"], "| w1, w3 (the table) | 2, 4 | 2 |"),
        (["--choice", "table", "--casts", "fp8gate"], "| w1, w2, w3 (the table of fp8gate's casts) | 4, 4 | 2 |"),
        (["--choice", "all"], "| all | 7, 6 | 3 |"),
    ],
)
def test_the_collectives_of_the_documents_are_what_torchtitan_compiles(options: list[str], row: str) -> None:
    command = [sys.executable, ROOT / "benchmarks" / "train_titan_graphs.py", "--widths", "llama3-8b", "--tp", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([*command, *options], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if "|" in line]
    counts = {(cells[0], cells[1]): cells[2:] for cells in found}
    assert counts["forward", "all_gather_into_tensor"] == ["2", ""]
    forward, backward = (counts.get((which, "all_reduce"), ["0", ""]) for which in ("forward", "backward"))
    assert row in page_text("plans.md")
    assert row.split(" | ", 1)[1] == f"{forward[0]}, {backward[0]} | {backward[1]} |".replace("|  |", "| |")


@pytest.mark.slow
@pytest.mark.timeout(900)
@NEEDS_TITAN
def test_two_ranks_train_every_choice_and_a_second_command_goes_on(output: ModuleType, tmp_path: Path) -> None:
    table, plan = write_inputs(tmp_path)
    options = ["--widths", "tiny", "--layers", 1, "--tp", 2, "--recipe", "rowwise", "--tokens", ROWS]
    options += [
        "--steps",
        10,
        "--warm-up",
        5,
        "--visits",
        1,
        "--tables",
        table,
        "--plan",
        plan,
        "--out",
        tmp_path / "out",
    ]

    def bench(*more: object) -> Any:
        path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        command = [sys.executable, BENCHMARK, *map(str, options), *map(str, more)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        (file,) = (tmp_path / "out").glob("*.jsonl")
        return done.stdout, *output.read_journal(file)

    _, header, visits = bench("--stop-after", 0.01)  # it lists the choices, which takes longer
    assert visits == []
    assert {run.choices: len(run.float8) for run in header.runs} == {
        ("bf16", "rule", "rule-shards"): 0,
        ("all",): 5,
        ("table",): 4,
        ("plan",): 2,
    }
    said, _, visits = bench()
    assert [visit.run for visit in visits] == [run.name for run in header.runs]
    assert all(visit.error is None and [step.step for step in visit.steps] == [1, 5, 10] for visit in visits)
    assert all(visit.steps[-1].loss < visit.steps[0].loss for visit in visits)
    assert "| fp8gate, plan" in said
    assert msgspec.json.encode(header) in (tmp_path / "out" / f"{header.setup.name}.jsonl").read_bytes()
    assert "the model has 4 Float8Linear" in (tmp_path / "out" / f"{header.setup.name}.log").read_text()
