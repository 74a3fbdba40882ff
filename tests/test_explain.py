"""A model under a table small enough to sum by hand."""

from __future__ import annotations

import json

import msgspec
import pytest
from builders import make_point, make_table

from fp8gate.filter.contract.table import Point, TableError
from fp8gate.filter.decision.lookup import Lookup
from fp8gate.filter.explain.explanation import Explanation, explain
from fp8gate.filter.model.model_config import ModelConfig
from fp8gate.filter.model.parallel import Parallel, ShardError, Shards

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
    **degrees: int,
) -> Explanation:
    table = make_table(*points, recipe=recipe)
    shards = Shards(Parallel(plan="transformers", **degrees), tokens)
    return explain(config, table, Lookup(table), shards=shards, recomputed=recomputed, min_speedup=min_speedup)


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
    predicted = explained(recipe=recipe).predicted
    assert predicted.bf16_us == pytest.approx(BF16_US)
    assert predicted.all_float8_us == pytest.approx(ALL_FLOAT8_US)
    assert predicted.torchao_rule_us == (None if rule_us is None else pytest.approx(rule_us))
    assert predicted.fp8gate_us == pytest.approx(FILTER_US)


@pytest.mark.parametrize(
    ("recipe", "rule"), [("tensorwise", 672 / 632), ("rowwise", 1.0), ("rowwise_with_gw_hp", None)]
)
def test_speedups_are_quotients_of_the_sums(recipe, rule):
    assert explained(recipe=recipe).predicted.speedups() == {
        "all_float8": pytest.approx(672 / 592),
        "torchao_rule": None if rule is None else pytest.approx(rule),
        "fp8gate": pytest.approx(672 / 488),
    }


@pytest.mark.parametrize(
    ("min_speedup", "expected_us"), [(0.5, ALL_FLOAT8_US), (1.3, FILTER_US + 2 * (60 - 48)), (2.5, BF16_US)]
)
def test_wanted_speedup_decides_what_is_converted(min_speedup, expected_us):
    assert explained(min_speedup=min_speedup).predicted.fp8gate_us == pytest.approx(expected_us)


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
        "torchao_converts": False,
        "speedup": 0.6,
        "speedup_low": 0.6 / 1.25,
        "speedup_high": 0.6 * 1.25,
        "reason": "0.60x, below 1.02x (measured)",
    }
    assert (rows["output"]["convert"], rows["output"]["torchao_converts"]) == (True, True)
    assert rows["output"]["reason"] == "1.50x (measured)"


def test_recipe_without_a_rule_shows_none():
    assert {layer.row()["torchao_converts"] for layer in explained(recipe="rowwise_with_gw_hp").layers} == {None}


def test_indivisible_layer_stays_bf16_in_every_choice():
    points = [*POINTS[:-1], make_point(TOKENS, 64, 2050, 1.5, bf16_us=(40.0, 80.0))]
    explanation = explained(config=msgspec.structs.replace(CONFIG, vocab_size=2050), points=points)
    output = explanation.layers[-1]
    assert (output.decision.convert, output.torchao) == (False, False)
    assert output.decision.reason == "n = 2050: not a multiple of 16"
    predicted = explanation.predicted
    assert predicted.bf16_us == pytest.approx(BF16_US)
    assert predicted.all_float8_us == pytest.approx(ALL_FLOAT8_US - 80 + 120)
    assert predicted.torchao_rule_us == pytest.approx(BF16_US)
    assert predicted.fp8gate_us == pytest.approx(FILTER_US - 80 + 120)


def test_unmeasured_layer_takes_its_time_from_the_work():
    """Of the measured columns 2048 are nearest to 3072: 1.5 times their work, with the same speedup."""
    output = explained(config=msgspec.structs.replace(CONFIG, vocab_size=3072)).layers[-1]
    assert (output.bf16_us, output.fp8_us) == (pytest.approx(180.0), pytest.approx(120.0))


def test_experts_are_noted_and_not_counted():
    mixture = msgspec.structs.replace(CONFIG, model_type="mixtral", num_local_experts=4)
    explanation = explained(config=mixture)
    assert [layer.linear.role for layer in explanation.layers] == ["wq", "wk", "wv", "wo", "output"]
    assert explanation.note.startswith("the 4 experts of each layer")
    assert explanation.predicted.bf16_us == pytest.approx(2 * (30 + 18 + 18 + 30) + 120)
    assert explained().note is None


def test_table_without_numbers_is_an_error():
    with pytest.raises(TableError, match=r"tensorwise on NVIDIA H200: \$\.points: expected a measured point"):
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
    assert twice.predicted.bf16_us == pytest.approx(RECOMPUTED_BF16_US)
    assert twice.predicted.fp8gate_us == pytest.approx((FILTER_US - 80) * 4 / 3 + 80)
    assert [x.decision.speedup for x in twice.layers] == pytest.approx([x.decision.speedup for x in once.layers])
    assert [x.decision.convert for x in twice.layers] == [x.decision.convert for x in once.layers]


def test_recomputation_turns_a_decision_where_the_forward_loses():
    w2 = Point(TOKENS, 128, 64, 40.0, 80.0, 80.0, 20.0, 1.2, 1.2, 1.2, "measured")
    points = [p for p in POINTS if (p.k, p.n) != (128, 64)] + [w2]
    once, twice = (explained(points=points, recomputed=r).layers[-2] for r in (False, True))
    assert (once.decision.convert, once.bf16_us, once.fp8_us) == (True, 120.0, pytest.approx(100.0))
    assert (twice.decision.convert, twice.bf16_us, twice.fp8_us) == (False, 160.0, pytest.approx(180.0))
    assert twice.decision.reason == "0.89x, below 1.02x (measured, recomputed)"
