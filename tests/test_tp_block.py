"""The benchmark of real tensor parallelism: two ranks on the CPU, its journal, its tables, the order of sets."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from builders import DEVICE, MEASURED_AT, SOFTWARE_HERE
from forked import MAX_WAIT_S, Processes, rank_environments
from plans import TINY_CONFIG, make_plan
from tp_ranks import LAYERS, compare

from fp8gate.calibrate.device.cpu import CpuWatch
from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.contract.plans.plan import Candidate
from fp8gate.filter.contract.plans.plan_file import write_plans
from fp8gate.filter.contract.recipes import Variant

ROOT = Path(__file__).parent.parent
Q, K, V, OUT = (f"self_attn.{name}_proj" for name in "qkvo")
GATE, UP, DOWN = (f"mlp.{name}_proj" for name in ("gate", "up", "down"))
POSSIBLE = (Q, K, V, OUT, GATE, UP, DOWN)
NO_TABLE = SimpleNamespace(table=None, torchao=None)

pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture
def output() -> Any:
    import tp_block_output

    return tp_block_output


@pytest.fixture
def config(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **TINY_CONFIG}))
    return folder / "config.json"


def planned(convert: tuple[str, ...], speedup: float, *, visits: int = 8, width: float = 0.005) -> Candidate:
    bounds = (speedup, round(speedup - width, 4), round(speedup + width, 4)) if convert else (1.0, 1.0, 1.0)
    return Candidate(convert, visits, 100.0, 200.0, *bounds, None, 0.1, "measured")


SHAPES = dict.fromkeys(POSSIBLE, (32, 64, 64))
PLAN = make_plan(
    shapes=SHAPES,
    indivisible=(),
    left_alone=(),
    table=None,
    torchao=(Q, OUT, GATE, UP, DOWN),
    convert=(Q, GATE),
    candidates=(
        planned((), 1.0, visits=16),
        planned((Q, GATE), 1.1),
        planned((Q,), 1.05),
        planned(POSSIBLE, 0.97),
        planned((GATE,), 1.09, visits=2),
    ),
)


def make_setup(output: Any, **fields: Any) -> Any:
    sets = (
        output.ConvertedSet(name="bf16", convert=(), plan=(1.0, 1.0, 1.0)),
        output.ConvertedSet(name="all", convert=(Q, GATE), plan=(1.06, 1.05, 1.07)),
        output.ConvertedSet(name="plan", convert=(Q,), plan=(1.1, 1.09, 1.11)),
        output.ConvertedSet(name="bf16 again", convert=()),
    )
    made = {
        "model": "tiny",
        "recipe": "rowwise",
        "tokens": 32,
        "sequence": 32,
        "tp": 2,
        "layers": 3,
        "device": DEVICE,
        "software": SOFTWARE_HERE,
        "compile": True,
        "inductor": {},
        "pause_s": 0.0,
        "settle_s": 0.0,
        "run_s": 0.001,
        "seed": 0,
        "block": "0123",
        "plan": "TP 1, 32 tokens, NVIDIA H200",
        "sets": sets,
    }
    return output.TpSetup(**{**made, **fields})


def make_visit(output: Any, name: str, number: int, *step_us: float, error: float = 0.1, **fields: Any) -> Any:
    of_rank = {"launch_us": 10.0, "sm_clock_mhz": 1980, "is_limited": False, "slowdown": None, **fields}
    ranks = tuple(output.RankVisit(step_us=one, **of_rank) for one in step_us)
    return output.TpVisit(set=name, round=number, measured_at=MEASURED_AT, steps=3, error=error, ranks=ranks)


def make_visits(output: Any, rounds: int = 8, **step_us: float) -> list[Any]:
    """The second rank is the slower one."""
    return [
        make_visit(output, name.replace("_", " "), number, us / 2, us)
        for number in range(1, rounds + 1)
        for name, us in step_us.items()
    ]


def rows_of(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


@pytest.mark.slow
def test_two_ranks_compute_what_one_does(processes: Processes, config: Path) -> None:
    """Each layer gathers and scatters twice, in each direction. Two scales of each float8 linear are divided."""
    script = functools.partial(compare, config, 64)
    ranks = [processes.start(script, CUDA_VISIBLE_DEVICES="", **where) for where in rank_environments(2)]
    for rank in ranks:
        assert rank.exit_code() == 0, rank.said
    found = json.loads(ranks[0].said.splitlines()[-1])
    assert max(found["from whole"]) < 0.005
    assert found["collectives"] == [[4 * LAYERS, 4 * LAYERS, 2 * LAYERS * linears] for linears in (0, 3, 7)]
    same, mlp, everything = found["errors"]
    assert same == 0
    assert 0.02 < mlp < everything < 0.3
    assert max(found["errors compiled"][:2]) < 0.02 < max(found["errors compiled"][2:]) < mlp
    # one graph a set, bf16 again included, however many layers; casts as asked for, whatever is enabled
    assert found["settings"] == [[False, False], [False, False], [True, False], [True, True]]


@pytest.mark.slow
def test_torchrun_measures_and_goes_on(config: Path, tmp_path: Path) -> None:
    write_plans([PLAN], tmp_path / "plan.yaml")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "benchmarks/tp_block.py", config]
    command += ["--recipe", "rowwise", "--tokens", 32, "--layers", 1, "--rounds", 8, "--out", tmp_path / "out"]
    command += ["--plan", tmp_path / "plan.yaml"]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}

    def run(*options: object) -> tuple[str, str]:
        process = subprocess.run(
            [sys.executable, *map(str, (*command, *options))],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=MAX_WAIT_S,
        )
        assert process.returncode == 0, process.stderr
        return process.stdout, process.stderr

    out, said = run("--stop-after", 0)
    assert "the time is up; the same command goes on" in said
    assert out.endswith("0 rounds are complete; bounds need 8: run it again to go on\n")
    out, said = run()
    assert "ready: all, 7 linears a layer in float8" in said
    title, gains, order = out.split("\n\n", 2)
    assert title.startswith("tiny, TP 2 with sequence parallelism, 1 layers, 32 tokens, rowwise, CPU ")
    assert title.endswith("; plan of TP 1, 32 tokens, NVIDIA H200, 8 rounds")
    rows = rows_of(gains)
    assert [row[0] for row in rows] == ["bf16, torchao's rule", "all", "plan", "finalist 2", "bf16 again"]
    assert [row[4] for row in rows[1:4]] == [
        "-3.0% (-3.5% to -2.5%)",
        "+10.0% (+9.5% to +10.5%)",
        "+5.0% (+4.5% to +5.5%)",
    ]
    assert [float(row[5]) for row in rows] == [0.0, *(pytest.approx(0.1, abs=0.09) for _ in range(3)), 0.0]
    assert re.search(r"^This run tells \d of 6 pairs of sets apart", order)
    again, said = run()
    assert "round" not in said
    assert again == out
    (journal,) = (tmp_path / "out").iterdir()
    assert len(journal.read_bytes().splitlines()) == 1 + 8 * len(rows)


def test_without_torchrun_it_says_how_to_start_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import tp_block

    monkeypatch.delenv("RANK", raising=False)
    options = ["llama3-8b", "--recipe", "rowwise", "--tokens", "32", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["tp_block.py", *options])
    with pytest.raises(SystemExit, match=r"torchrun --nproc-per-node=2 benchmarks/tp_block.py MODEL"):
        tp_block.main()


def test_too_few_rounds_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import tp_block

    options = ["llama3-8b", "--recipe", "rowwise", "--tokens", "32", "--out", "x", "--rounds", "7"]
    monkeypatch.setattr(sys, "argv", ["tp_block.py", *options])
    with pytest.raises(SystemExit):
        tp_block.parse()
    assert "--rounds: expected at least 8; got 7" in capsys.readouterr().err


def made_sets(answer: Any, plan: Any) -> tuple[list[tuple[Any, ...]], list[str]]:
    from tp_block_sets import make_sets

    said: list[str] = []
    sets = make_sets(POSSIBLE, answer, plan, "inductor", said.append)
    assert {one.casts for one in sets} == {"inductor"}
    return [(one.name, one.convert, one.plan and one.plan[0]) for one in sets], said


def test_sets_of_a_plan_are_its_finalists_and_what_others_convert() -> None:
    answer = SimpleNamespace(table=SimpleNamespace(convert=(GATE,)), torchao=(Q, OUT))
    sets, said = made_sets(answer, PLAN)
    assert sets == [
        ("bf16", (), 1.0),
        ("all", POSSIBLE, 0.97),
        ("torchao's rule", (Q, OUT), None),
        ("table", (GATE,), 1.09),
        ("plan", (Q, GATE), 1.1),
        ("finalist 2", (Q,), 1.05),
        ("bf16 again", (), None),
    ]
    assert said == []


def test_choices_that_convert_the_same_are_one_set() -> None:
    sets, _ = made_sets(SimpleNamespace(table=SimpleNamespace(convert=()), torchao=POSSIBLE), None)
    assert [name for name, _, _ in sets] == ["bf16, table", "all, torchao's rule", "w1 w2 w3", "bf16 again"]
    sets, said = made_sets(NO_TABLE, None)
    assert [name for name, _, _ in sets] == ["bf16", "all", "w1 w2 w3", "bf16 again"]
    assert said == ["torchao's rule: none for this recipe, left out"]


@pytest.mark.parametrize(
    ("plan", "table", "same"),
    [
        (PLAN, (GATE,), ("plan; Inductor's casts", (Q, GATE))),
        (None, (GATE,), ("table; Inductor's casts", (GATE,))),
        (None, (), ("all; Inductor's casts", POSSIBLE)),
        (PLAN, (Q, GATE), ("table, plan; Inductor's casts", (Q, GATE))),
    ],
)
def test_with_fp8gates_casts_one_set_has_inductors_too(output: Any, plan: Any, table: Any, same: Any) -> None:
    from tp_block_sets import make_sets

    answer = SimpleNamespace(table=SimpleNamespace(convert=table), torchao=None)
    *sets, inductors, control = make_sets(POSSIBLE, answer, plan, "fp8gate", print)
    assert [one.casts for one in sets if one.convert] == ["fp8gate"] * (len(sets) - 1)
    assert (inductors.name, inductors.convert) == same
    assert {one.casts for one in (sets[0], inductors, control)} == {"inductor"}
    assert inductors.plan is None  # so it takes no part in the plan's order
    assert not output.is_plans_choice(inductors)
    setup = make_setup(output, sets=(*sets, inductors, control))
    assert "rowwise, fp8gate's casts, " in output.title(setup)


def test_casts_of_another_recipe_or_where_nothing_compiles_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import tp_block

    (environment,) = rank_environments(1)
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    for recipe, expected in (("tensorwise", "casts: "), ("rowwise", "casts: .* on a CPU nothing is compiled")):
        options = ["llama3-8b", "--recipe", recipe, "--tokens", "32", "--casts", "fp8gate", "--out", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", ["tp_block.py", *options])
        with pytest.raises(SystemExit, match=expected):
            tp_block.main()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),
        (
            {"protocol": msgspec.structs.replace(PLAN.protocol, casts="fp8gate")},
            r"\$\.protocol\.casts: expected inductor, found fp8gate",
        ),
        ({"model": "other"}, r"\$\.model: expected tiny, found other"),
        ({"recipe": "tensorwise"}, r"\$\.recipe: expected rowwise, found tensorwise"),
        ({"possible": POSSIBLE[1:]}, r"float8 can compute here; found \['self_attn.q_proj'\]"),
    ],
)
def test_a_plan_must_be_of_the_model(tmp_path: Path, changes: dict[str, Any], expected: str | None) -> None:
    from tp_block_sets import plan_of

    subject = SimpleNamespace(name="tiny", possible=changes.pop("possible", POSSIBLE))
    path = tmp_path / "plan.yaml"
    write_plans([msgspec.structs.replace(PLAN, **changes)], path)
    if expected is None:
        assert plan_of(path, subject, Variant("rowwise")) == PLAN
        return
    with pytest.raises(InputError, match=expected):
        plan_of(path, subject, Variant("rowwise"))


def test_layers_of_another_kind_are_refused() -> None:
    from tp_block_layers import require_llama

    require_llama(POSSIBLE)
    with pytest.raises(InputError, match="expected layers with the linears"):
        require_llama(POSSIBLE[:-1])


def test_the_slowest_rank_counts(output: Any) -> None:
    setup = make_setup(output)
    text = output.report(setup, make_visits(output, bf16=1000.0, all=750.0, plan=1250.0, bf16_again=1001.0))
    title, gains, *_ = text.split("\n\n")
    assert title == (
        "tiny, TP 2 with sequence parallelism, 3 layers, 32 tokens, rowwise, NVIDIA H200 "
        f"(torch {SOFTWARE_HERE.torch}, torchao {SOFTWARE_HERE.torchao}); "
        "plan of TP 1, 32 tokens, NVIDIA H200, 8 rounds"
    )
    assert rows_of(gains) == [
        ["bf16", "", "1.000", "", "", "0.100"],
        ["all", "q_proj, gate_proj", "0.750", "+33.3% (+33.3% to +33.3%)", "+6.0% (+5.0% to +7.0%)", "0.100"],
        ["plan", "q_proj", "1.250", "-20.0% (-20.0% to -20.0%)", "+10.0% (+9.0% to +11.0%)", "0.100"],
        ["bf16 again", "", "1.001", "-0.1% (-0.1% to -0.1%)", "", "0.100"],
    ]


def test_swapped_pairs_are_named(output: Any) -> None:
    visits = make_visits(output, bf16=1000.0, all=750.0, plan=1250.0, bf16_again=1001.0)
    *_, pairs, best = output.report(make_setup(output), visits).split("\n\n")
    assert pairs.splitlines() == [
        "This run tells 3 of 3 pairs of sets apart; bf16 differs from itself by 0.1%. "
        "Of these, 1 in the plan's order, 2 swapped:",
        "- bf16 over plan: +25.0% (+25.0% to +25.0%); in the plan -9.1%",
        "- all over plan: +66.7% (+66.7% to +66.7%); in the plan -3.6%",
    ]
    assert best == "The fastest set is all: +66.7% (+66.7% to +66.7%) over the plan's."


def test_a_swap_within_the_plans_bounds_is_said_to_be_one(output: Any) -> None:
    sets = list(make_setup(output).sets)
    sets[1] = msgspec.structs.replace(sets[1], plan=(1.095, 1.08, 1.1))
    visits = make_visits(output, bf16=1000.0, all=800.0, plan=900.0, bf16_again=1001.0)
    *_, pairs, _ = output.report(make_setup(output, sets=tuple(sets)), visits).split("\n\n")
    assert pairs.splitlines()[-1].endswith("in the plan -0.5%, within its bounds")


def test_an_order_that_holds(output: Any) -> None:
    visits = make_visits(output, bf16=1000.0, all=950.0, plan=900.0, bf16_again=1000.0)
    *_, pairs, best = output.report(make_setup(output), visits).split("\n\n")
    assert pairs.endswith("Of these, 3 in the plan's order, 0 swapped.")
    assert best == "No set is faster than the plan's beyond the noise."


def test_what_bf16_differs_from_itself_tells_nothing_apart(output: Any) -> None:
    visits = make_visits(output, bf16=1000.0, all=995.0, plan=1005.0, bf16_again=1020.0)
    *_, pairs, best = output.report(make_setup(output), visits).split("\n\n")
    assert pairs.startswith("This run tells 0 of 3 pairs of sets apart; bf16 differs from itself by 2.0%.")
    assert best == "No set is faster than the plan's beyond the noise."


def test_without_a_plan_no_order_is_compared(output: Any) -> None:
    visits = make_visits(output, bf16=1000.0, all=950.0, plan=900.0, bf16_again=1000.0)
    assert output.report(make_setup(output, plan=""), visits).endswith("there is no order to compare with.")


def test_rounds_that_were_cut_short_or_slowed_down_do_not_count(output: Any) -> None:
    setup = make_setup(output)
    visits = make_visits(output, 10, bf16=1000.0, all=950.0, plan=900.0, bf16_again=1000.0)
    del visits[0]
    assert len(output.complete_rounds(setup, visits)) == 9
    visits.append(make_visit(output, "plan", 10, 1.0, 1.0, slowdown="thermal slowdown"))
    assert len(output.complete_rounds(setup, visits)) == 9
    visits[-1] = make_visit(output, "plan", 11, 1.0, 1.0)
    assert len(output.complete_rounds(setup, visits)) == 9
    slowed = [one for one in visits if (one.set, one.round) != ("plan", 5)]
    slowed.append(make_visit(output, "plan", 5, 1.0, 1.0, slowdown="thermal slowdown"))
    assert len(output.complete_rounds(setup, slowed)) == 8


def test_wrong_results_and_a_slow_host_are_said(output: Any) -> None:
    visits = make_visits(output, bf16=1000.0, all=950.0, plan=900.0, bf16_again=1000.0)
    setup = make_setup(output)
    assert "Wrong" not in output.report(setup, visits)
    assert "host" not in output.report(setup, visits)
    visits.append(make_visit(output, "all", 8, 950.0, 950.0, error=float("inf"), launch_us=900.0))
    assert "host" not in output.report(setup, visits)  # once in eight rounds is a hiccup
    visits += [make_visit(output, "all", number, 950.0, 950.0, launch_us=900.0) for number in range(2, 6)]
    *_, wrong, late = output.report(setup, visits).split("\n\n")
    assert wrong == "Wrong results, farther than 0.45 from bf16's: all."
    assert late.startswith("The host takes more than 80% of a step to launch it, so the GPU may have waited: all.")


def test_the_journal_is_read_again_and_is_of_one_setup(output: Any, tmp_path: Path) -> None:
    setup, visit = make_setup(output), make_visit(output, "plan", 1, 2.0, 3.0)
    with output.TpJournal(tmp_path, setup) as journal:
        journal.append(visit)
        assert output.read_journal(journal.path) == (setup, [visit])  # written at once
    with output.TpJournal(tmp_path, setup) as again:
        assert again.records == [visit]
    with output.TpJournal(tmp_path, make_setup(output, layers=1)) as other:
        assert other.records == []
        assert other.path != journal.path


class OneRank:
    """`Ranks` of a single process."""

    rank, world = 0, 1

    def gather(self, value: Any) -> list[Any]:
        return [value]


class Layers:
    """`TpLayers` whose sets do nothing, and note their steps."""

    def __init__(self) -> None:
        self.steps: list[str] = []

    def make(self, roles: Sequence[str], recipe: str, inductor: dict[str, bool] | None, casts: Any) -> Any:
        name = ", ".join(roles) or "bf16"
        step = functools.partial(self.steps.append, name)
        return SimpleNamespace(step=step, start=lambda: SimpleNamespace(error=lambda right: 0.25))


def make_bench(output: Any, folder: Path, until: float = float("inf")) -> Any:
    from tp_block_rounds import Bench

    setup = make_setup(output)
    journal = output.TpJournal(folder, setup).__enter__()
    said: list[str] = []
    device = torch.device("cpu")
    return Bench(setup, OneRank(), device, until, said.append, list(journal.records), journal, CpuWatch())


def test_rounds_go_on_from_the_journal(output: Any, tmp_path: Path) -> None:
    """A round that was cut short is measured anew, under another number."""
    bench = make_bench(output, tmp_path)
    bench.measure(Layers(), 1)
    assert bench.is_done(1)
    bench.journal.append(make_visit(output, "all", 2, 1.0))
    bench.journal.__exit__(None, None, None)

    again = make_bench(output, tmp_path)
    assert again.is_done(1)
    again.measure(Layers(), 3)
    names = [one.name for one in again.setup.sets]
    assert [one.round for one in again.visits] == [1] * 4 + [2] + [3] * 4 + [4] * 4
    orders = [[one.set for one in again.visits if one.round == number] for number in (1, 3, 4)]
    assert all(sorted(order) == sorted(names) for order in orders)
    assert len({tuple(order) for order in orders}) > 1
    assert {one.error for one in again.visits[5:]} == {0.25}
    assert again.journal.records == again.visits
    again.journal.__exit__(None, None, None)


def test_nothing_begins_after_the_time_is_up(output: Any, tmp_path: Path) -> None:
    bench, layers = make_bench(output, tmp_path, until=0.0), Layers()
    bench.measure(layers, 1)
    assert bench.visits == []
    assert layers.steps == []
    bench.journal.__exit__(None, None, None)


def test_a_gpu_that_stays_slow_ends_the_run(output: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CpuWatch, "slowdown", lambda self: "thermal slowdown")
    bench = make_bench(output, tmp_path)
    bench.measure(Layers(), 2)
    assert not bench.is_done(1)
    assert max(one.round for one in bench.visits) == 4
    bench.journal.__exit__(None, None, None)
