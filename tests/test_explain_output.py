"""`fp8gate explain` as people and programs read it: one recipe, or all compared."""

from __future__ import annotations

import json
import re

import pytest
from builders import make_point, make_table, write_folder
from plans import make_plan
from typer.testing import CliRunner

from fp8gate.cli import app
from fp8gate.filter.contract import software_check
from fp8gate.filter.contract.plans.plan import Candidate
from fp8gate.filter.contract.plans.plan_file import write_plans
from fp8gate.filter.contract.table import Point
from fp8gate.filter.locate.places import ENVIRONMENT

CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}
# with --tp 2 at 32 tokens a rank holds wq 64 -> 32, wk and wv 64 -> 16, wo 32 -> 64, w1 and w3 64 -> 64, w2 64 -> 64,
# output 64 -> 128
ATTENTION = [make_point(32, 64, 32, 0.5), make_point(32, 64, 16, 0.5), make_point(32, 32, 64, 0.5)]  # 300 us each


def points(feed_forward: float, output: float = 2.0) -> list[Point]:
    return [*ATTENTION, make_point(32, 64, 64, feed_forward), make_point(32, 64, 128, output)]


@pytest.fixture(autouse=True)
def _nothing_is_stale(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    monkeypatch.setattr(software_check, "installed_version", lambda package: None)
    monkeypatch.setattr(software_check, "_driver", lambda: None)


@pytest.fixture
def explain(tmp_path):
    """A function that runs the command on the tiny model. It takes recipe -> points, and options."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps(CONFIG))

    def run(tables, *options, tokens=32):
        folder = write_folder(tmp_path / "tables", *(make_table(*p, recipe=recipe) for recipe, p in tables.items()))
        place = ["--tables", str(folder), "--device", "NVIDIA H200"]
        return CliRunner().invoke(app, ["explain", str(config), "--tokens", str(tokens), *place, *options])

    return run


@pytest.fixture
def explained(explain):
    def run(*args, **options):
        result = explain(*args, **options)
        assert (result.exit_code, result.stderr) == (0, "")
        return result.stdout

    return run


@pytest.fixture
def explained_json(explained):
    return lambda *args, **options: json.loads(explained(*args, "--json", **options))


def cells(text):
    """The rows of a printed table as lists of cells."""
    return [re.split(r"\s{2,}", line.strip()) for line in text.splitlines()]


# --- one recipe ------------------------------------------------------------------------------------------------


def test_json_has_what_was_asked_and_the_local_shapes(explained_json):
    shown = explained_json({"rowwise": points(2.0)}, "--recipe", "rowwise", "--tp", "2", "--cp", "2", tokens=64)
    asked = {key: shown[key] for key in ("tokens", "tp", "cp", "recompute", "recipe", "device")}
    assert asked == {"tokens": 64, "tp": 2, "cp": 2, "recompute": "none", "recipe": "rowwise", "device": "NVIDIA H200"}
    assert {row["role"]: (row["m"], row["k"], row["n"], row["convert"]) for row in shown["layers"]} == {
        "wq": (32, 64, 32, False),
        "wk": (32, 64, 16, False),
        "wv": (32, 64, 16, False),
        "wo": (32, 32, 64, False),
        "w1": (32, 64, 64, True),
        "w3": (32, 64, 64, True),
        "w2": (32, 64, 64, True),
        "output": (32, 64, 128, True),
    }


def test_json_has_the_sums_of_a_ranks_times(explained_json):
    """Two layers of four attention and three feed forward linears, and the output: 300 us each in bf16."""
    predicted = explained_json({"tensorwise": points(1.5)}, "--recipe", "tensorwise", "--tp", "2")["predicted"]
    assert predicted == {
        "bf16_us": pytest.approx(15 * 300),
        "all_float8_us": pytest.approx(8 * 600 + 6 * 200 + 150),
        "torchao_rule_us": pytest.approx(15 * 300),
        "table_us": pytest.approx(8 * 300 + 6 * 200 + 150),
        "plan_us": None,
        "fp8gate_us": pytest.approx(8 * 300 + 6 * 200 + 150),
        "speedup": {
            "bf16": 1.0,
            "table": pytest.approx(4500 / 3750),
            "plan": None,
            "all_float8": pytest.approx(4500 / 6150),
            "torchao_rule": pytest.approx(1.0),
            "fp8gate": pytest.approx(4500 / 3750),
        },
    }


@pytest.mark.parametrize(("recompute", "bf16_us"), [("none", 15 * 300), ("full", 14 * 400 + 300)])
def test_recomputation_counts_every_forward_but_the_heads_twice(explained_json, recompute, bf16_us):
    shown = explained_json({"rowwise": points(1.5)}, "--recipe", "rowwise", "--tp", "2", "--recompute", recompute)
    assert shown["recompute"] == recompute
    assert shown["predicted"]["bf16_us"] == pytest.approx(bf16_us)
    is_recomputed = [row["reason"].endswith(", recomputed") for row in shown["layers"]]
    assert is_recomputed == [recompute == "full"] * 7 + [False]


@pytest.mark.parametrize(
    ("options", "tokens", "title"),
    [
        ([], 32, "32 tokens, rowwise"),
        (["--tp", "2"], 32, "32 tokens, tp 2, rowwise"),
        (["--cp", "2"], 64, "64 tokens, cp 2, rowwise"),
        (["--recompute", "full"], 32, "32 tokens, recomputed, rowwise"),
        (["--recompute", "none", "--tp", "1", "--cp", "1"], 32, "32 tokens, rowwise"),
        (["--tp", "2", "--cp", "2", "--recompute", "full"], 64, "64 tokens, tp 2, cp 2, recomputed, rowwise"),
    ],
)
def test_title_says_what_is_not_the_default(explained, options, tokens, title):
    first, *_ = explained({"rowwise": points(2.0)}, "--recipe", "rowwise", *options, tokens=tokens).splitlines()
    assert f"config.json, {title}, NVIDIA H200 (torch " in first


def test_text_shows_every_role_of_a_rank_and_what_each_choice_is_worth(explained):
    text = explained({"tensorwise": points(1.5)}, "--recipe", "tensorwise", "--tp", "2")
    _, roles, choices, unplanned = text.split("\n\n")
    header, _, *rows = cells(roles)
    assert header == ["role", "linear", "count", "m", "k", "n", "train in", "alone", "reason"]
    assert [(row[0], *row[2:8]) for row in rows] == [
        ("wq", "2", "32", "64", "32", "bf16", "0.50x"),
        ("wk", "2", "32", "64", "16", "bf16", "0.50x"),
        ("wv", "2", "32", "64", "16", "bf16", "0.50x"),
        ("wo", "2", "32", "32", "64", "bf16", "0.50x"),
        ("w1", "2", "32", "64", "64", "float8", "1.50x"),
        ("w3", "2", "32", "64", "64", "float8", "1.50x"),
        ("w2", "2", "32", "64", "64", "float8", "1.50x"),
        ("output", "1", "32", "64", "128", "float8", "2.00x"),
    ]
    assert cells(choices)[2:] == [
        ["bf16", "4.5", "1.000x"],
        ["all float8", "6.2", "0.732x"],
        ["torchao's rule", "4.5", "1.000x"],
        ["fp8gate, table", "3.8", "1.200x"],
    ]
    assert unplanned.startswith("No measured plan of this block decides. To measure one: fp8gate plan ")
    assert unplanned.endswith("config.json --recipe tensorwise --tokens 32 --tp 2\n")


def test_recipe_without_a_rule_says_so(explained, explained_json):
    tables, options = {"rowwise_with_gw_hp": points(1.5)}, ["--recipe", "rowwise_with_gw_hp", "--tp", "2"]
    assert ["torchao's rule", "no rule"] in cells(explained(tables, *options))
    assert explained_json(tables, *options)["predicted"]["speedup"]["torchao_rule"] is None


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--tp", "3"], "--tp: expected a divisor of the 4 heads of {config} ($.num_attention_heads); got 3"),
        (["--tp", "4"], "--tp: expected a divisor of the 2 heads of {config} ($.num_key_value_heads); got 4"),
        (["--cp", "3"], "parallel.cp: expected a divisor of tokens = 32; got 3"),
        (["--min-speedup", "0"], "--min-speedup: expected a ratio above 0, such as 1.05; got 0.0"),
    ],
)
def test_bad_input_is_one_clear_line(explain, tmp_path, options, complaint):
    result = explain({"rowwise": points(2.0)}, "--recipe", "rowwise", *options)
    complaint = complaint.format(config=tmp_path / "config.json")
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", f"fp8gate: {complaint}\n")


@pytest.mark.parametrize("options", [["--tp", "0"], ["--cp", "0"], ["--recompute", "some"], ["--lookup", "linear"]])
def test_bad_option_is_a_usage_error(explain, options):
    result = explain({"rowwise": points(2.0)}, "--recipe", "rowwise", *options)
    assert result.exit_code == 2
    assert options[0] in result.stderr


def test_what_filter_fqns_leave_out_stays_bf16_and_a_pattern_that_matches_nothing_is_said(explained):
    text = explained({"rowwise": points(2.0)}, "--recipe", "rowwise", "--tp", "2", "--filter-fqns", "mlp, nobody")
    rows = {row[0]: row for row in cells(text.split("\n\n")[1])[2:]}
    assert {role for role, row in rows.items() if "float8" in row} == {"output"}
    assert rows["w1"][-1] == "filter_fqns has 'mlp'"
    assert "filter_fqns: 'nobody' is in no linear's name" in text


def test_strict_ends_with_code_1_where_there_is_something_to_know(explain):
    tables = {"rowwise": points(2.0)}
    assert explain(tables, "--recipe", "rowwise", "--tp", "2", "--strict").exit_code == 0
    doubtful = explain(tables, "--recipe", "rowwise", "--tp", "2", "--strict", "--filter-fqns", "nobody")
    assert (doubtful.exit_code, doubtful.stderr) == (1, "")
    assert "nobody" in doubtful.stdout
    assert explain(tables, "--recipe", "rowwise", "--tp", "2", "--filter-fqns", "nobody").exit_code == 0


def test_far_outside_of_the_table_is_an_error_with_the_command(explain):
    result = explain({"rowwise": points(2.0)}, "--recipe", "rowwise", tokens=8192)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "all linears are more than 10 times outside of what was measured on NVIDIA H200, such as wq" in result.stderr
    assert "run on it: fp8gate calibrate --model" in result.stderr


@pytest.fixture
def plan_file(tmp_path):
    """A plan that converts wq of a rank of two, and measured all float8 as well."""
    shapes = dict.fromkeys(("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"), (32, 64, 64))
    attention = {"q_proj": (32, 64, 32), "k_proj": (32, 64, 16), "v_proj": (32, 64, 16), "o_proj": (32, 32, 64)}
    shapes = {**{f"self_attn.{role}": shape for role, shape in attention.items()}, **shapes}
    speedups = {(): 1.0, ("self_attn.q_proj",): 1.1, tuple(shapes): 1.05}
    apart = {roles: 0.01 if roles else 0.0 for roles in speedups}  # bf16 is what it is compared with
    candidates = tuple(
        Candidate(roles, 8, 1.0, 1.0, found, found - apart[roles], found + apart[roles], 1.0, 0.1, "measured")
        for roles, found in speedups.items()
    )
    fields = {"indivisible": (), "left_alone": (), "table": None, "torchao": None, "tp": 2}
    plan = make_plan(**fields, shapes=shapes, convert=("self_attn.q_proj",), candidates=candidates)
    path = tmp_path / "tables" / "nvidia-h200" / "plans" / "tiny-rowwise-m32-tp2.yaml"
    path.parent.mkdir(parents=True)
    write_plans([plan], path)
    return path


@pytest.mark.parametrize("how", ["auto", "by name", "by file"])
def test_a_plan_that_fits_decides_and_has_its_row(explained, plan_file, how):
    options = {"auto": [], "by name": ["--plan", "tiny"], "by file": ["--plan", str(plan_file)]}[how]
    text = explained({"rowwise": points(2.0)}, "--recipe", "rowwise", "--tp", "2", *options)
    _, roles, choices, which, behind = text.split("\n\n")
    assert {row[0] for row in cells(roles)[2:] if "float8" in row} == {"wq", "output"}
    assert [(row[0], row[-1]) for row in cells(choices)[2:]] == [
        ("bf16", "1.000x"),
        ("all float8", "1.050x (1.040 to 1.060)"),
        ("torchao's rule", "1.000x"),
        ("fp8gate, table", "not measured"),
        ("fp8gate, plan", "1.100x (1.090 to 1.110)"),
    ]
    how = "measured in the compiled block of tiny, one rank's part, without communication"
    assert which == f"The plan decides, {how}: {plan_file}"
    assert behind.startswith("By the sum of single linears, the table's set takes")


@pytest.mark.parametrize(("device", "measured"), [("H100", "2026-11-26, 2 sweeps merged"), ("H200", "2026-11-25")])
def test_the_title_says_how_many_sweeps_were_merged(device, measured):
    asked = ["explain", "llama3-8b", "--recipe", "rowwise", "--tokens", "8192", "--device", device]
    title, *_ = CliRunner().invoke(app, asked).stdout.splitlines()
    assert title.endswith(f", measured {measured})")


def test_a_plan_of_another_model_is_said_in_one_line():
    asked = ["--recipe", "rowwise", "--tokens", "8192", "--device", "H100", "--plan", "qwen3-8b"]
    text = CliRunner().invoke(app, ["explain", "llama3-8b", *asked]).stdout
    (line,) = (line for line in text.splitlines() if "qwen3-8b" in line)
    differs = "expected (8192, 4096, 14336), as model.layers.*.mlp.gate_proj is here; found (8192, 4096, 12288)"
    end = f"{differs}; different too: mlp.up_proj, mlp.down_proj; the table decides 32 of 32 blocks"
    assert line.endswith(f"qwen3-8b-rowwise-m8192.yaml: $.shapes.mlp.gate_proj: {end}")


def test_a_plan_can_be_left_out(explained, plan_file):
    text = explained({"rowwise": points(2.0)}, "--recipe", "rowwise", "--tp", "2", "--plan", "none")
    assert "fp8gate, plan" not in text


def test_json_names_the_plan_and_what_it_measured(explained_json, plan_file):
    shown = explained_json({"rowwise": points(2.0)}, "--recipe", "rowwise", "--tp", "2")
    kinds = [{"layers": "layers.*", "convert": ["self_attn.q_proj"]}]
    assert shown["plan"] == {"file": str(plan_file), "model": "tiny", "kinds": kinds}
    assert {name: round(numbers["speedup"], 6) for name, numbers in shown["in_block"].items()} == {
        "bf16": 1.0,
        "all_float8": 1.05,
        "torchao_rule": 1.0,
        "plan": 1.1,
        "fp8gate": 1.1,
    }
    assert shown["predicted"]["fp8gate_us"] == shown["predicted"]["plan_us"] > shown["predicted"]["table_us"]


# --- all recipes -----------------------------------------------------------------------------------------------

ROWWISE_WINS = {"tensorwise": points(1.5), "rowwise": points(2.0), "rowwise_with_gw_hp": points(1.2)}
ACCURATE_WINS = {"tensorwise": points(1.5), "rowwise": points(1.2), "rowwise_with_gw_hp": points(2.0)}
TIED = {"tensorwise": points(2.0), "rowwise": points(2.0), "rowwise_with_gw_hp": points(1.2)}
ALL_TIED = dict.fromkeys(ROWWISE_WINS, points(2.0))


@pytest.mark.parametrize(
    ("tables", "fastest", "slower"),
    [
        (ROWWISE_WINS, "rowwise", {"tensorwise": 3750 / 3450, "rowwise": 1, "rowwise_with_gw_hp": 4050 / 3450}),
        (ACCURATE_WINS, "rowwise_with_gw_hp", {"tensorwise": 3750 / 3450, "rowwise": 4050 / 3450}),
        (TIED, "rowwise", {"tensorwise": 1, "rowwise_with_gw_hp": 4050 / 3450}),
        (ALL_TIED, "rowwise_with_gw_hp", dict.fromkeys(ALL_TIED, 1)),
    ],
)
def test_json_names_the_fastest_recipe_and_the_cost_of_the_others(explained_json, tables, fastest, slower):
    shown = explained_json(tables, "--recipe", "all", "--tp", "2")
    assert shown["fastest"] == fastest
    assert shown["slower_than_fastest"] == {
        recipe: pytest.approx(slower.get(recipe, 1) - 1, abs=1e-9) for recipe in tables
    }
    assert shown["slower_than_fastest"][fastest] == 0
    assert (shown["tokens"], shown["tp"], shown["cp"], shown["recompute"]) == (32, 2, 1, "none")


def test_json_of_all_has_every_recipe_as_it_is_alone(explained_json):
    together = explained_json(ROWWISE_WINS, "--recipe", "all", "--tp", "2", "--recompute", "full")
    for recipe, shown in together["recipes"].items():
        alone = explained_json(ROWWISE_WINS, "--recipe", recipe, "--tp", "2", "--recompute", "full")
        assert shown == {key: value for key, value in alone.items() if key in shown}
        assert {*alone} - {*shown} == {"model", "tokens", "tp", "cp", "recompute"}
    assert list(together["recipes"]) == ["tensorwise", "rowwise", "rowwise_with_gw_hp"]


def test_only_ratios_are_compared(explained_json):
    """bf16 was measured again with each recipe, on another day, so its times differ."""
    slow_day = [make_point(p.m, p.k, p.n, p.speedup, bf16_us=(200.0, 400.0)) for p in points(2.0)]
    shown = explained_json({**ROWWISE_WINS, "rowwise": slow_day}, "--recipe", "all", "--tp", "2")
    assert shown["fastest"] == "rowwise"
    assert shown["slower_than_fastest"]["tensorwise"] == pytest.approx(3750 / 3450 - 1)
    assert shown["recipes"]["rowwise"]["predicted"]["fp8gate_us"] == pytest.approx(2 * 3450)


def test_text_ranks_the_recipes_most_accurate_first(explained):
    title, table, sentence, _ = explained(ROWWISE_WINS, "--recipe", "all", "--tp", "2").split("\n\n")
    assert title.endswith("config.json, 32 tokens, tp 2, NVIDIA H200")
    header, _, *rows = cells(table)
    assert header == [
        "recipe, most accurate first",
        "float8",
        "by the",
        "predicted ms",
        "speedup",
        "slower than fastest",
    ]
    assert rows == [
        ["rowwise_with_gw_hp", "w1, w3, w2, output", "table", "4.0", "1.111x", "17.4%"],
        ["rowwise", "w1, w3, w2, output", "table", "3.5", "1.304x", "0.0%"],
        ["tensorwise", "w1, w3, w2, output", "table", "3.8", "1.200x", "8.7%"],
    ]
    assert sentence == (
        "rowwise is the fastest by the sum of the linears; rowwise_with_gw_hp, the most accurate, takes 17.4% longer."
    )


def test_text_where_the_most_accurate_is_the_fastest(explained):
    for tables in (ACCURATE_WINS, ALL_TIED):
        _, _, sentence, unplanned = explained(tables, "--recipe", "all", "--tp", "2").split("\n\n")
        assert sentence == "rowwise_with_gw_hp is the fastest by the sum of the linears."
        assert unplanned.startswith(
            "No measured plan of this block decides with rowwise_with_gw_hp, rowwise, tensorwise."
        )


def test_text_where_nothing_wins(explained):
    tables = dict.fromkeys(ROWWISE_WINS, points(0.9, output=0.9))
    _, table, sentence, *_ = explained(tables, "--recipe", "all", "--tp", "2").split("\n\n")
    assert sentence == "No recipe converts any of them."
    assert [row[1:] for row in cells(table)[2:]] == [["none", "table", "4.5", "1.000x", "0.0%"]] * 3


def test_all_recipes_need_a_table_each(explain):
    result = explain({"rowwise": points(2.0)}, "--recipe", "all")
    assert result.exit_code == 2
    assert "no tensorwise table for 'NVIDIA H200'" in result.stderr


# --- the tables that come with fp8gate -------------------------------------------------------------------------


def test_70b_under_tensor_parallelism_on_an_h200():
    """The case that this project began with: torchao's rule cannot see that a rank's wk and wv are 8192 -> 128."""
    options = ["--tp", "8", "--tokens", "8192", "--recipe", "rowwise", "--device", "NVIDIA H200", "--json"]
    result = CliRunner().invoke(app, ["explain", "llama3-70b", *options])
    assert result.exit_code == 0
    shown = json.loads(result.stdout)
    rows = {row["role"]: row for row in shown["layers"]}
    assert {role: (row["m"], row["k"], row["n"]) for role, row in rows.items()} == {
        "wq": (8192, 8192, 1024),
        "wk": (8192, 8192, 128),
        "wv": (8192, 8192, 128),
        "wo": (8192, 1024, 8192),
        "w1": (8192, 8192, 3584),
        "w3": (8192, 8192, 3584),
        "w2": (8192, 3584, 8192),
        "output": (8192, 8192, 16032),
    }
    assert {role for role, row in rows.items() if not row["convert"]} >= {"wq", "wk", "wv", "wo"}
    assert {role for role, row in rows.items() if row["torchao_converts"]} >= {"wq", "wo"}
    assert shown["predicted"]["speedup"]["torchao_rule"] < 1 <= shown["predicted"]["speedup"]["fp8gate"]


def test_70b_on_one_rank_on_an_h200():
    options = ["--tokens", "8192", "--recipe", "rowwise", "--device", "NVIDIA H200", "--json"]
    shown = json.loads(CliRunner().invoke(app, ["explain", "llama3-70b", *options]).stdout)
    rows = {row["role"]: row["convert"] for row in shown["layers"]}
    assert (rows["wq"], rows["wo"]) == (True, True)
