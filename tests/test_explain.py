"""A model under a table small enough to sum by hand."""

from __future__ import annotations

import itertools
import json
import math
import tempfile
from pathlib import Path

import msgspec
import pytest
from builders import make_point, make_table, write_file
from plans import make_plan

from fp8gate import auto_filter
from fp8gate.filter.contract.plans.plan import Candidate
from fp8gate.filter.contract.recipes import RECIPES
from fp8gate.filter.contract.table import Point, TableError
from fp8gate.filter.explain.explanation import Explanation, explain
from fp8gate.filter.explain.remarks import EVIDENCE, remarks
from fp8gate.filter.model.described_model import DescribedModel, LinearRole
from fp8gate.filter.model.model_config import BUNDLED, ModelConfig, linear_roles, not_linear
from fp8gate.filter.model.parallel import Parallel, ShardError
from fp8gate.filter.observe.describe import describe_model

TOKENS = 32
CONFIG = ModelConfig(
    model_type="llama",
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=2048,
)
POINTS = [  # bf16 forward + backward, float8 total
    make_point(TOKENS, 64, 64, 0.6, bf16_us=(10.0, 20.0), spread=1.25),  # wq, wo: 30 us, 50 us
    make_point(TOKENS, 64, 32, 0.75, bf16_us=(6.0, 12.0)),  # wk, wv: 18 us, 24 us
    make_point(TOKENS, 64, 128, 2.0, bf16_us=(20.0, 40.0)),  # w1, w3: 60 us, 30 us
    make_point(TOKENS, 128, 64, 1.25, bf16_us=(20.0, 40.0)),  # w2: 60 us, 48 us
    make_point(TOKENS, 64, 2048, 1.5, bf16_us=(40.0, 80.0)),  # output: 120 us, 80 us
]
BF16_US = 2 * (30 + 18 + 18 + 30 + 60 + 60 + 60) + 120  # 672
ALL_FLOAT8_US = 2 * (50 + 24 + 24 + 50 + 30 + 30 + 48) + 80  # 592
FILTER_US = 2 * (30 + 18 + 18 + 30 + 30 + 30 + 48) + 80  # 488
TENSORWISE_RULE_US = 2 * (30 + 18 + 18 + 30 + 60 + 60 + 60) + 80  # 632: n > 1024 only in the output
ROWWISE_RULE_US = BF16_US  # k <= 1024 everywhere


def explained(
    *,
    recipe: str = "tensorwise",
    config: ModelConfig = CONFIG,
    points=POINTS,
    min_speedup: float = 1.02,
    tokens: int = TOKENS,
    recomputed: bool = False,
    plan=None,
    filter_fqns=(),
    **degrees: int,
) -> Explanation:
    with tempfile.TemporaryDirectory() as folder:
        wants_float8 = auto_filter(
            recipe,
            tokens=tokens,
            tables=write_file(make_table(*points, recipe=recipe), Path(folder) / "table.yaml"),
            plan=plan,
            filter_fqns=filter_fqns,
            min_speedup=min_speedup,
            parallel=Parallel(plan="transformers", **degrees),
            recompute="full" if recomputed else "none",
            on_stale="ignore",
        )
        return explain(describe(config), wants_float8)


def describe(config: ModelConfig) -> DescribedModel:
    return DescribedModel(name="tiny", linears=tuple(linear_roles(config)), note=not_linear(config))


def times_us(explanation: Explanation) -> dict[str, float]:
    return {choice.name: choice.us for choice in explanation.choices}


def test_every_role_is_decided():
    layers = explained().layers
    answers = [(x.linear.role, x.linear.count, x.shape.k, x.shape.n, x.decision.convert) for x in layers]
    assert answers == [
        ("wq", 2, 64, 64, False),
        ("wk", 2, 64, 32, False),
        ("wv", 2, 64, 32, False),
        ("wo", 2, 64, 64, False),
        ("w1", 2, 64, 128, True),
        ("w3", 2, 64, 128, True),
        ("w2", 2, 128, 64, True),
        ("output", 1, 64, 2048, True),
    ]
    assert {layer.shape.m for layer in layers} == {TOKENS}


@pytest.mark.parametrize(
    ("recipe", "rule_us"),
    [("tensorwise", TENSORWISE_RULE_US), ("rowwise", ROWWISE_RULE_US), ("rowwise_with_gw_hp", None)],
)
def test_times_are_summed_over_all_layers(recipe, rule_us):
    explanation = explained(recipe=recipe)
    assert times_us(explanation) == {
        "bf16": pytest.approx(BF16_US),
        "all float8": pytest.approx(ALL_FLOAT8_US),
        **({} if rule_us is None else {"torchao's rule": pytest.approx(rule_us)}),
        "fp8gate, table": pytest.approx(FILTER_US),
    }
    assert explanation.speedup == pytest.approx(BF16_US / FILTER_US)


@pytest.mark.parametrize(
    ("min_speedup", "expected_us"), [(0.5, ALL_FLOAT8_US), (1.3, FILTER_US + 2 * (60 - 48)), (2.5, BF16_US)]
)
def test_wanted_speedup_decides_what_is_converted(min_speedup, expected_us):
    assert explained(min_speedup=min_speedup).chosen.us == pytest.approx(expected_us)


def test_what_filter_fqns_leave_out_stays_bf16_in_every_choice():
    explanation = explained(filter_fqns=["lm_head"])
    assert times_us(explanation) == {
        "bf16": pytest.approx(BF16_US),
        "all float8": pytest.approx(ALL_FLOAT8_US + 40),
        "torchao's rule": pytest.approx(BF16_US),
        "fp8gate, table": pytest.approx(FILTER_US + 40),
    }
    assert explanation.layers[-1].decision.reason == "filter_fqns has 'lm_head'"


def test_row_is_what_json_shows():
    rows = {row["role"]: row for row in (layer.row() for layer in explained().layers)}
    assert json.loads(json.dumps(rows["wq"])) == {
        "role": "wq",
        "fqn": "model.layers.*.self_attn.q_proj",
        "count": 2,
        "m": 32,
        "k": 64,
        "n": 64,
        "convert": False,
        "table_converts": False,
        "torchao_converts": False,
        "speedup": 0.6,
        "speedup_low": 0.6 / 1.25,
        "speedup_high": 0.6 * 1.25,
        "reason": "below 1.02x, measured",
    }
    assert (rows["output"]["convert"], rows["output"]["torchao_converts"]) == (True, True)
    assert rows["output"]["reason"] == "measured"


def test_recipe_without_a_rule_shows_none():
    assert {layer.row()["torchao_converts"] for layer in explained(recipe="rowwise_with_gw_hp").layers} == {None}


def test_indivisible_layer_stays_bf16_in_every_choice():
    points = [*POINTS[:-1], make_point(TOKENS, 64, 2050, 1.5, bf16_us=(40.0, 80.0))]
    explanation = explained(config=msgspec.structs.replace(CONFIG, vocab_size=2050), points=points)
    output = explanation.layers[-1]
    assert (output.decision.convert, output.torchao) == (False, False)
    assert output.decision.reason == "n = 2050: not a multiple of 16"
    assert times_us(explanation) == {
        "bf16": pytest.approx(BF16_US),
        "all float8": pytest.approx(ALL_FLOAT8_US - 80 + 120),
        "torchao's rule": pytest.approx(BF16_US),
        "fp8gate, table": pytest.approx(FILTER_US - 80 + 120),
    }


def test_unmeasured_layer_takes_its_time_from_the_work():
    """3072 columns are 1.5 times the work of 2048, the border. From 2.0x at 128, 1.5x at 2048, the speedup falls on."""
    output = explained(config=msgspec.structs.replace(CONFIG, vocab_size=3072)).layers[-1]
    speedup = 1.5 * (1.5 / 2.0) ** (math.log2(3072 / 2048) / math.log2(2048 / 128))
    assert (output.bf16_us, output.fp8_us) == (pytest.approx(180.0), pytest.approx(180.0 / speedup, rel=1e-3))


def test_experts_are_noted_and_not_counted():
    mixture = msgspec.structs.replace(CONFIG, model_type="mixtral", num_local_experts=4)
    explanation = explained(config=mixture)
    assert [layer.linear.role for layer in explanation.layers] == ["wq", "wk", "wv", "wo", "output"]
    assert explanation.note.startswith("the 4 experts of each layer")
    assert explanation.bf16.us == pytest.approx(2 * (30 + 18 + 18 + 30) + 120)
    assert explained().note is None


def test_table_without_numbers_is_an_error():
    with pytest.raises(TableError, match=r"table\.yaml: \$\.points: expected a measured point"):
        explained(points=[make_point(32, 64, 64, status="failed")])


# --- shards ----------------------------------------------------------------------------------------------------


def local_sizes(explanation: Explanation) -> dict[str, tuple[int, int, int]]:
    return {layer.linear.role: (layer.shape.m, layer.shape.k, layer.shape.n) for layer in explanation.layers}


@pytest.mark.parametrize(
    ("degrees", "tokens", "expected"),
    [
        ({}, 32, {"wq": (32, 64, 64), "wk": (32, 64, 32), "wo": (32, 64, 64), "w2": (32, 128, 64)}),
        ({"tp": 2}, 32, {"wq": (32, 64, 32), "wk": (32, 64, 16), "wo": (32, 32, 64), "w2": (32, 64, 64)}),
        ({"tp": 4}, 32, {"wq": (32, 64, 16), "wk": (32, 64, 8), "wo": (32, 16, 64), "w2": (32, 32, 64)}),
        ({"cp": 2}, 64, {"wq": (32, 64, 64), "wk": (32, 64, 32), "wo": (32, 64, 64), "w2": (32, 128, 64)}),
        ({"tp": 2, "cp": 4}, 64, {"wq": (16, 64, 32), "wk": (16, 64, 16), "wo": (16, 32, 64), "w2": (16, 64, 64)}),
    ],
)
def test_rank_decides_by_its_part(degrees, tokens, expected):
    shapes = local_sizes(explained(tokens=tokens, **degrees))
    assert {role: shapes[role] for role in expected} == expected


def test_part_that_float8_cannot_compute_stays_bf16_in_every_choice():
    wk = explained(tp=4, min_speedup=0.01).layers[1]
    assert (wk.decision.convert, wk.decision.reason) == (False, "n = 8: not a multiple of 16")
    assert wk.fp8_us == wk.bf16_us


def test_torchaos_rule_is_asked_about_the_whole_layer():
    """torchao looks at the whole layer, and so loses the speedup: the output has 2048 columns, a rank 256 of them."""
    output = explained(tp=8).layers[-1]
    assert (output.shape.n, output.torchao) == (256, True)
    assert not explained(config=msgspec.structs.replace(CONFIG, vocab_size=1024)).layers[-1].torchao


@pytest.mark.parametrize(
    ("tp", "complaint"),
    [
        (3, r"^model\.layers\.\*\.self_attn\.q_proj: tp = 3 does not divide n = 64 \(colwise\)$"),
        (64, r"^model\.layers\.\*\.self_attn\.k_proj: tp = 64 does not divide n = 32 \(colwise\)$"),
    ],
)
def test_degree_that_does_not_divide_names_the_layer(tp, complaint):
    with pytest.raises(ShardError, match=complaint):
        explained(tp=tp)


# --- recomputation ---------------------------------------------------------------------------------------------

RECOMPUTED_BF16_US = 2 * (40 + 24 + 24 + 40 + 80 + 80 + 80) + 120


def test_recomputed_forwards_are_counted_in_both_precisions():
    """A forward takes a third of the time in both precisions, so the speedups do not change. The head's runs once."""
    once, twice = explained(), explained(recomputed=True)
    assert twice.bf16.us == pytest.approx(RECOMPUTED_BF16_US)
    assert twice.chosen.us == pytest.approx((FILTER_US - 80) * 4 / 3 + 80)
    assert [x.decision.speedup for x in twice.layers] == pytest.approx(
        [x.decision.speedup for x in once.layers], rel=1e-3
    )
    assert [x.decision.convert for x in twice.layers] == [x.decision.convert for x in once.layers]


def test_recomputation_turns_a_decision_where_the_forward_loses():
    w2 = Point(TOKENS, 128, 64, 40.0, 80.0, 80.0, 20.0, 1.2, 1.2, 1.2, "measured")
    points = [p for p in POINTS if (p.k, p.n) != (128, 64)] + [w2]
    once, twice = (explained(points=points, recomputed=r).layers[-2] for r in (False, True))
    assert (once.decision.convert, once.bf16_us, once.fp8_us) == (True, 120.0, pytest.approx(100.0))
    assert (twice.decision.convert, twice.bf16_us, twice.fp8_us) == (False, 160.0, pytest.approx(180.0))
    assert twice.decision.reason == "below 1.02x, measured, recomputed"


# --- a plan, and what is said in words -------------------------------------------------------------------------

ROLES = {
    "self_attn.q_proj": (TOKENS, 64, 64),
    "self_attn.k_proj": (TOKENS, 64, 32),
    "self_attn.v_proj": (TOKENS, 64, 32),
    "self_attn.o_proj": (TOKENS, 64, 64),
    "mlp.gate_proj": (TOKENS, 64, 128),
    "mlp.up_proj": (TOKENS, 64, 128),
    "mlp.down_proj": (TOKENS, 128, 64),
}


def measured(convert, speedup):
    return Candidate(convert, 8, 1.0, 1.0, speedup, speedup - 0.01, speedup + 0.01, 1.0, 0.1, "measured")


def plan_of(convert, speedup, **fields):
    """A plan of the whole tiny block, which chose a set and has also measured all float8."""
    candidates = (measured((), 1.0), measured(convert, speedup), measured(tuple(ROLES), 1.05))
    torchao = {"tensorwise": ()}[fields.pop("recipe", "tensorwise")]
    fixed = {"recipe": "tensorwise", "shapes": ROLES, "indivisible": (), "table": None, "torchao": torchao}
    return make_plan(**fixed, convert=convert, candidates=candidates, control=1.0, **fields)


def test_a_plan_decides_and_has_a_row_of_its_own():
    explanation = explained(plan=plan_of(("mlp.gate_proj", "mlp.up_proj"), 1.2))
    assert [layer.linear.role for layer in explanation.chosen.converted] == ["w1", "w3", "output"]
    assert [choice.name for choice in explanation.choices][-2:] == ["fp8gate, table", "fp8gate, plan"]
    assert explanation.chosen.us == pytest.approx(FILTER_US + 2 * 12)
    in_block = {choice.name: choice.in_block and choice.in_block.speedup for choice in explanation.choices}
    assert in_block == {
        "bf16": 1.0,
        "all float8": 1.05,
        "torchao's rule": 1.0,
        "fp8gate, table": None,
        "fp8gate, plan": 1.2,
    }


def test_a_row_ahead_of_the_plan_has_its_sentence():
    plan, behind, *_ = remarks(explained(plan=plan_of(("mlp.gate_proj", "mlp.up_proj"), 1.2)))
    assert plan == "The plan decides, measured in the compiled block of tiny: of tiny"
    assert behind == (
        f"By the sum of single linears, the table's set takes {1 - FILTER_US / (FILTER_US + 24):.1%} less time. Inside "
        "the compiled block, where casts fuse with their neighbours, the plan's set runs at 1.200x, the table's set "
        "was not measured."
    )


def test_a_row_ahead_of_the_table_has_its_sentence_with_the_evidence():
    behind, nothing, unplanned = remarks(explained(min_speedup=2.5))
    assert nothing == "none of 15 linears is converted to float8"
    assert behind == (
        f"By the sum of single linears, all float8 takes {1 - ALL_FLOAT8_US / BF16_US:.1%} less time, as it also "
        "converts w1 (2.00x), w3 (2.00x), w2 (1.25x), output (1.50x), which fp8gate leaves in bf16: they are below "
        f"2.50x (--min-speedup) or have no sure number. {EVIDENCE}"
    )
    assert unplanned.endswith("To measure one: fp8gate plan tiny --recipe tensorwise --tokens 32")


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("model", BUNDLED)
def test_no_committed_number_shows_fp8gate_behind_without_its_sentence(model, recipe):
    for tp, tokens, recompute in itertools.product((1, 2, 4, 8), (1024, 8192, 16384), ("none", "full")):
        wants_float8 = auto_filter(
            recipe,
            tokens=tokens,
            device="NVIDIA H200",
            parallel=Parallel(tp=tp, plan="transformers"),
            recompute=recompute,
            **dict.fromkeys(("on_stale", "on_outside", "on_ambiguous", "on_nothing", "on_plan"), "ignore"),
        )
        explanation = explain(describe_model(model, tokens), wants_float8)
        is_behind = min(times_us(explanation).values()) < explanation.chosen.us * (1 - 1e-9)
        said = [remark for remark in remarks(explanation) if remark.startswith("By the sum of single linears")]
        assert len(said) == is_behind


def test_the_evidence_is_what_the_benchmark_prints(monkeypatch):
    """The mean and the worst loss of the table's sets against the plans', from the committed plans of an H200."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import plan_choices

    plans = list(plan_choices.packaged_plans("NVIDIA H200"))
    lines = plan_choices.losses(plans).splitlines()[2:]
    rows = {row[0]: row for row in ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)}
    (mean, worst), (mean_low, worst_low), (mean_high, worst_high) = (
        [cell.replace("%", " %") for cell in rows[rule][-2:]]
        for rule in ("the filter's default", "1.00 for all", "1.05 for all")
    )
    assert len(plans) == 12
    assert f"default set took {mean} more time than the plan's (mean; worst {worst})" in EVIDENCE
    assert f"of all linears from 1.00x on {mean_low} (worst {worst_low})" in EVIDENCE
    assert f"from 1.05x on {mean_high} (worst {worst_high})" in EVIDENCE


def test_the_winner_needs_no_sentence():
    assert len(list(remarks(explained()))) == 1  # no plan was measured


def test_outside_the_grid_one_line_has_the_command():
    outside, _ = remarks(explained(config=msgspec.structs.replace(CONFIG, vocab_size=3072)))
    assert outside.startswith("Outside the measured range, answered by the border and its trend: output. To measure")
    assert outside.endswith(": fp8gate calibrate --model tiny --tokens 32")


@pytest.mark.parametrize(("tokens", "is_far"), [(TOKENS * 10, False), (TOKENS * 10 + 16, True)])
def test_far_outside_the_grid_is_an_error_and_no_number(tokens, is_far):
    if not is_far:
        assert explained(tokens=tokens).bf16.us == pytest.approx(10 * BF16_US)
        return
    with pytest.raises(TableError) as caught:
        explained(tokens=tokens)
    assert "all linears are more than 10 times outside of what was measured on NVIDIA H200, such as wq" in str(
        caught.value
    )
    command = f"run on it: fp8gate calibrate --model tiny --tokens {tokens}; or ask about another --device"
    assert str(caught.value).endswith(command)


def test_one_linear_far_outside_is_left_out_of_the_sums_and_said():
    explanation = explained(config=msgspec.structs.replace(CONFIG, vocab_size=2048 * 16))
    assert times_us(explanation)["fp8gate, table"] == pytest.approx(FILTER_US - 80)
    assert explanation.bf16.us == pytest.approx(BF16_US - 120)
    far, *_ = remarks(explanation)
    assert far.startswith(
        "Too far outside of the measured range, so left in bf16 and not in the sums: output. To measure"
    )


def test_each_size_of_a_name_has_its_own_answer():
    sizes = {"role": "fc", "fqn": "stages.*.fc"}
    small = LinearRole(**sizes, count=1, in_features=64, out_features=64, known_names=("stages.0.fc",))
    large = LinearRole(**sizes, count=2, in_features=64, out_features=128, known_names=("stages.1.fc", "stages.2.fc"))
    with tempfile.TemporaryDirectory() as folder:
        table = write_file(make_table(*POINTS), Path(folder) / "table.yaml")
        wants_float8 = auto_filter("rowwise", tokens=TOKENS, tables=table, plan=None, on_stale="ignore")
        explanation = explain(DescribedModel(name="two", linears=(small, large)), wants_float8)
    assert [layer.decision.convert for layer in explanation.layers] == [False, True]


def test_what_is_left_of_a_plan_and_decided_by_the_table_is_not_called_a_plan():
    explanation = explained(plan=plan_of(("mlp.gate_proj", "mlp.up_proj"), 1.2), filter_fqns=["up_proj"])
    assert explanation.plans is None
    assert explanation.chosen.name == "fp8gate, table"


def test_a_low_threshold_that_converts_losers_has_its_sentence():
    behind, *_ = remarks(explained(min_speedup=0.5, filter_fqns=["mlp", "lm_head"]))
    assert behind.endswith("as fp8gate converts from 0.50x on (--min-speedup), and so layers that lose by themselves.")
