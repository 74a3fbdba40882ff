"""The page's verdict: numbers counted by hand, a plan before the table, and what is said where nothing wins."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from builders import DEVICE, make_point, make_table, write_file, write_folder
from msgspec.structs import replace

from fp8gate.calibrate.report.page.verdict import DeviceVerdict, PlanMeasurement, few_wins_sentence
from fp8gate.filter.contract.plans.plan import Candidate
from fp8gate.filter.contract.plans.plan_file import read_plan, write_plans
from fp8gate.filter.contract.table import read_table
from fp8gate.filter.decision.lookup import Lookup

PLANS = Path(__file__).parents[1] / "thresholds" / "nvidia-h200" / "plans"
SIZES = itertools.product((8192,), (1024, 4096, 8192, 14336, 53248), (128, 1024, 4096, 14336, 128256))
TABLE = make_table(*(make_point(m, k, n, 1.5 if n > 1024 else 0.9, bf16_us=(100.0, 200.0)) for m, k, n in SIZES))
"""In the table every linear of llama3-8b takes 0.3 ms, and all but wk and wv win."""


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path, TABLE) / "nvidia-h200"


def verdict_of(folder, tokens=8192):
    tables = {table.variant: (path, table) for path in folder.glob("*.yaml") for table in [read_table(path)]}
    lookups = {variant: Lookup(table) for variant, (_, table) in tables.items()}
    return DeviceVerdict("NVIDIA H200", tables, lookups, tokens).make()


def row_of(verdict, model):
    return next(one for one in verdict.models if one.model == model).rows[0]


def write_small_plan(folder, **fields):
    """A plan of llama3-8b whose block takes 3 ms with w2 in float8, 1.2 times faster than without."""
    candidates = (
        Candidate((), 7, 1200.0, 2400.0, 1.0, 1.0, 1.0, 1.0, 0.0, "measured"),
        Candidate(("mlp.down_proj",), 7, 1000.0, 2000.0, 1.2, 1.1, 1.3, 1.05, 0.04, "measured"),
    )
    measured = read_plan(PLANS / "llama3-8b-rowwise-m8192.yaml")
    plan = replace(measured, control=1.0, convert=("mlp.down_proj",), candidates=candidates, **fields)
    (folder / "plans").mkdir()
    write_plans([plan], folder / "plans" / "llama3-8b-rowwise-m8192.yaml")


def test_without_a_plan_the_table_predicts(folder):
    row = row_of(verdict_of(folder), "llama3-8b")
    assert row.convert == ("wq", "wo", "w1", "w3", "w2", "output")
    assert row.plan is None
    assert row.bf16_ms == pytest.approx((32 * 7 + 1) * 0.3)
    assert row.saved_ms == pytest.approx((32 * 5 + 1) * 0.1)
    assert row.saved_share == pytest.approx(16.1 / 67.5)


def test_a_plan_that_was_measured_for_the_block_comes_before_the_table(folder):
    write_small_plan(folder)
    row = row_of(verdict_of(folder), "llama3-8b")
    assert row.convert == ("w2", "output")
    assert row.plan == PlanMeasurement(speedup=1.2, low=1.1, high=1.3, blocks=32, by_table=("output",))
    assert row.bf16_ms == pytest.approx(32 * 3.6 + 0.3)
    assert row.float8_ms == pytest.approx(32 * 3.0 + 0.2)


@pytest.mark.parametrize(
    "other",
    [{"recipe": "tensorwise"}, {"tokens": 4096}, {"recompute": "full"}, {"device": replace(DEVICE, name="B200")}],
)
def test_a_plan_for_other_training_does_not_count(folder, other):
    write_small_plan(folder, **other)
    assert row_of(verdict_of(folder), "llama3-8b").plan is None


def test_a_plan_decides_only_for_the_model_with_its_block(folder):
    write_small_plan(folder)
    assert row_of(verdict_of(folder), "qwen3-8b").plan is None


def test_a_plan_that_cannot_be_read_is_named(folder):
    (folder / "plans").mkdir()
    broken = folder / "plans" / "llama3-8b-rowwise-m8192.yaml"
    broken.write_text("schema: 1\n")
    (problem,) = verdict_of(folder).problems
    assert str(broken) in problem


def test_models_and_degrees_are_all_there(folder):
    verdict = verdict_of(folder)
    assert [model.model for model in verdict.models][-1] == "llama3-405b, TP 8"
    assert verdict.unanswered == ()
    assert verdict.sentence is None
    assert next(model.note for model in verdict.models if model.model == "mixtral-8x7b")


def test_a_model_is_there_as_the_plan_divides_it(folder):
    measured = read_plan(PLANS / "llama3-8b-rowwise-m8192.yaml")
    write_small_plan(folder, tp=2, shapes=divided(measured.shapes))
    assert row_of(verdict_of(folder), "llama3-8b, TP 2").plan is not None
    assert row_of(verdict_of(folder), "llama3-8b").plan is None


def divided(shapes):
    """Under TP 2: each rank has half of the outputs of q, k, v, gate and up, and half of the inputs of o and down."""
    by_input = ("self_attn.o_proj", "mlp.down_proj")
    return {role: (m, k // 2, n) if role in by_input else (m, k, n // 2) for role, (m, k, n) in shapes.items()}


def test_models_far_beyond_the_table_have_no_answer(tmp_path):
    small = make_table(*(make_point(8192, k, n) for k in (128, 256) for n in (128, 256)))
    verdict = verdict_of(write_folder(tmp_path, small) / "nvidia-h200")
    assert verdict.models == ()
    assert verdict.unanswered[0] == "llama3-8b"


def test_where_nothing_wins_one_sentence_is_the_verdict(tmp_path):
    write_file(make_table(*(make_point(p.m, p.k, p.n, 0.5) for p in TABLE.points)), tmp_path / "rowwise.yaml")
    verdict = verdict_of(tmp_path)
    assert verdict.sentence == (
        "Convert nothing: float8 never wins here; the best of 25 measured points reaches 0.50x the speed of bf16."
    )
    assert verdict.models == verdict.unanswered == ()


@pytest.mark.parametrize(
    ("speedups", "start"),
    [
        ([0.2, 0.57], "Convert nothing: float8 never wins here; the best of 2"),
        ([0.2, 1.02], "Convert next to nothing: float8 wins nowhere by 1.05x, as the filter asks"),
        ([*[0.2] * 40, 1.3], "Float8 loses nearly everywhere here: 1 of 41 measured points reach 1.05x"),
        ([0.2, 1.3], None),
    ],
)
def test_the_sentence_says_how_little_wins(speedups, start):
    points = [make_point(8192, 4096, 16 * (i + 1), speedup) for i, speedup in enumerate(speedups)]
    sentence = few_wins_sentence([*points, make_point(16, 16, 16, status="failed")])
    assert sentence is None if start is None else sentence.startswith(start)
