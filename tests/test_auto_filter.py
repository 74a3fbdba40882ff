"""The filter as training code uses it: on modules, on configs, and inside torchao's conversion."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from importlib import metadata
from types import SimpleNamespace

import msgspec
import pytest
import torch
from builders import SOFTWARE_HERE, make_point, make_table, write_file
from torch import nn
from torchao.float8 import convert_to_float8_training
from torchao.float8.float8_linear import Float8Linear

from fp8gate import AutoFilter, OutsideGridWarning, Parallel, StaleTableWarning, auto_filter
from fp8gate.filter.contract import software_check as stale_module
from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.contract.table import Point
from fp8gate.filter.model.linear_layer import LinearSize, linear_size

TOKENS = 32
WINNER, LOSER = (64, 128), (128, 64)  # (in_features, out_features): swapped, they would change places
TABLE = make_table(make_point(TOKENS, *WINNER, 1.5), make_point(TOKENS, *LOSER, 0.5))


@pytest.fixture(autouse=True)
def _no_driver(tmp_path, monkeypatch):
    monkeypatch.setattr(stale_module, "DRIVER_VERSION", tmp_path / "version")


@pytest.fixture
def table_path(tmp_path):
    return write_file(TABLE, tmp_path / "rowwise.yaml")


@pytest.fixture
def wants_float8(table_path):
    return auto_filter("rowwise", tokens=TOKENS, tables=table_path)


# --- which layers are candidates -------------------------------------------------------------------------------


@dataclass
class LinearConfig:
    """A linear that is not built yet, as torchtitan describes it."""

    in_features: int
    out_features: int
    bias: bool = False


class Linear(nn.Module):
    """A user's own linear, with a config nested in it."""

    @dataclass
    class Config:
        in_features: int
        out_features: int


class NotFloat8Linear(nn.Linear):
    """It has a name like torchao's class and nothing else in common with it."""


def as_module(k, n):
    return nn.Linear(k, n)


def on_meta_device(k, n):
    return nn.Linear(k, n, bias=False, device="meta")


def as_subclass(k, n):
    return NotFloat8Linear(k, n)


def as_bare_weight(k, n):
    return SimpleNamespace(weight=torch.empty(n, k, device="meta"))


LINEARS = [as_module, on_meta_device, as_subclass, LinearConfig, Linear.Config, as_bare_weight]


@pytest.mark.parametrize("layer", LINEARS)
def test_only_the_winner_is_converted(wants_float8, layer):
    assert wants_float8(layer(*WINNER), "layers.0.w1") is True
    assert wants_float8(layer(*LOSER), "layers.0.w2") is False
    assert wants_float8.decisions["layers.0.w1"].shape == LinearShape(TOKENS, *WINNER)
    assert wants_float8.decisions["layers.0.w2"].shape == LinearShape(TOKENS, *LOSER)


def float8_linear():
    """A linear that torchao has converted."""
    return convert_to_float8_training(nn.Sequential(nn.Linear(*WINNER)))[0]


def float8_config():
    """A config nested in a Float8Linear, as torchtitan nests it."""

    class Float8Linear(Linear):
        @dataclass
        class Config(Linear.Config):
            pass

    return Float8Linear.Config(*WINNER)


def derived_float8_config():
    """A subclass of that config, under another name."""

    class FusedLinearConfig(type(float8_config())):
        pass

    return FusedLinearConfig(*WINNER)


OTHERS = {
    "embedding": lambda: nn.Embedding(WINNER[1], WINNER[0]),
    "embedding bag": lambda: nn.EmbeddingBag(WINNER[1], WINNER[0]),
    "layer norm": lambda: nn.LayerNorm(64),
    "convolution": lambda: nn.Conv2d(64, 128, 1),
    "transposed Conv1D of transformers": lambda: SimpleNamespace(nf=WINNER[0], weight=torch.empty(128, 64)),
    "activation": nn.ReLU,
    "container": lambda: nn.Sequential(nn.Linear(*WINNER)),
    "weight that is none": lambda: SimpleNamespace(weight=None),
    "grouped experts": lambda: SimpleNamespace(weight=torch.empty(8, 128, 64)),
    "not a layer": object,
    "float8 linear": float8_linear,
    "float8 linear's config": float8_config,
    "derived from a float8 linear's config": derived_float8_config,
}


@pytest.mark.parametrize("make_layer", OTHERS.values(), ids=OTHERS)
def test_other_layers_are_not_converted_and_not_counted(wants_float8, make_layer):
    assert wants_float8(make_layer(), "layer") is False
    assert wants_float8.decisions == {}


def test_float8_linear_is_known_by_its_class():
    assert isinstance(float8_linear(), Float8Linear)
    assert linear_size(float8_linear()) == "already float8"
    assert linear_size(float8_config()) == "already float8"
    assert linear_size(nn.LayerNorm(64)) == "not a linear layer"
    assert linear_size(nn.Linear(*WINNER)) == LinearSize(*WINNER)


# --- inside torchao's conversion -------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.ModuleDict({"wq": nn.Linear(*WINNER), "wk": nn.Linear(*LOSER)})
        self.norm = nn.LayerNorm(64)
        self.feed_forward = nn.Sequential(nn.Linear(*WINNER), nn.ReLU(), nn.Linear(*LOSER))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(128, 64)
        self.layers = nn.ModuleList([Block(), Block()])
        self.output = nn.Linear(64, 100)


def float8_names(model):
    return {name for name, module in model.named_modules() if isinstance(module, Float8Linear)}


def converted_names(model, module_filter_fn):
    return float8_names(convert_to_float8_training(model, module_filter_fn=module_filter_fn))


def test_torchao_converts_exactly_the_winners(wants_float8):
    assert converted_names(Model(), wants_float8) == {
        "layers.0.attention.wq",
        "layers.0.feed_forward.0",
        "layers.1.attention.wq",
        "layers.1.feed_forward.0",
    }
    assert len(wants_float8.decisions) == 9
    assert wants_float8.decisions["output"].reason == "n = 100: not a multiple of 16"


def test_torchao_converts_every_layer_when_all_are_fast_enough(table_path):
    wants_float8 = auto_filter("rowwise", tokens=TOKENS, tables=table_path, min_speedup=0.5)
    assert len(converted_names(Model(), wants_float8)) == 8  # all but the output, which no speedup makes divisible


def test_filter_fqns_leaves_out_names_that_contain_a_pattern(table_path):
    wants_float8 = auto_filter(
        "rowwise", tokens=TOKENS, tables=table_path, filter_fqns=["layers.1", "attention", "mlp"]
    )
    assert wants_float8.unmatched == ("layers.1", "attention", "mlp")
    assert converted_names(Model(), wants_float8) == {"layers.0.feed_forward.0"}
    assert wants_float8.decisions["layers.1.feed_forward.0"].reason == "filter_fqns has 'layers.1'"
    assert wants_float8.decisions["layers.0.attention.wq"].reason == "filter_fqns has 'attention'"
    assert wants_float8.unmatched == ("mlp",)


def test_filter_fqns_comes_before_the_size(table_path):
    wants_float8 = auto_filter("rowwise", tokens=TOKENS, tables=table_path, filter_fqns=("output",))
    assert not wants_float8(nn.Linear(64, 100), "output")
    assert wants_float8.decisions["output"].reason == "filter_fqns has 'output'"


def test_tokens_decide_too(tmp_path):
    points = [make_point(32, *WINNER, 0.5), make_point(64, *WINNER, 1.5)]
    path = write_file(make_table(*points), tmp_path / "t.yaml")
    for tokens, expected in [(32, set()), (64, {"0"})]:
        wants_float8 = auto_filter("rowwise", tokens=tokens, tables=path)
        assert converted_names(nn.Sequential(nn.Linear(*WINNER)), wants_float8) == expected


def test_root_linear_has_the_empty_name(wants_float8):
    assert converted_names(nn.Linear(*WINNER), wants_float8) == {""}
    assert list(wants_float8.decisions) == [""]


def test_second_conversion_finds_nothing_more_to_convert(table_path, wants_float8):
    model = convert_to_float8_training(Model(), module_filter_fn=wants_float8)
    before = float8_names(model)
    again = auto_filter("rowwise", tokens=TOKENS, tables=table_path)
    assert converted_names(model, again) == before
    assert not any(decision.convert for decision in again.decisions.values())
    assert before.isdisjoint(again.decisions)


def test_lookup_by_interpolation(tmp_path):
    path = write_file(make_table(make_point(32, 64, 64, 0.5), make_point(32, 64, 1024, 2.0)), tmp_path / "t.yaml")
    layer = LinearConfig(64, 512)  # nearest: 2.00x; interpolated: 0.5 ** (1/4) * 2 ** (3/4)
    for lookup, speedup in [("nearest", 2.0), ("interpolate", 2**0.5)]:
        wants_float8 = auto_filter("rowwise", tokens=32, tables=path, lookup=lookup)
        assert wants_float8(layer, "w1")
        assert wants_float8.decisions["w1"].speedup == pytest.approx(speedup)


# --- recomputation ---------------------------------------------------------------------------------------------

SLOW_FORWARD = Point(32, *WINNER, 100.0, 200.0, 150.0, 90.0, 1.25, 1.2, 1.3, "measured")
"""With one forward 300 us against 240 us, 1.25x. With two forwards 400 us against 390 us."""


@pytest.fixture
def decided(tmp_path):
    path = write_file(make_table(SLOW_FORWARD), tmp_path / "t.yaml")

    def decide(recompute, *fqns):
        wants_float8 = auto_filter("rowwise", tokens=32, tables=path, min_speedup=1.1, recompute=recompute)
        for fqn in fqns:
            wants_float8(LinearConfig(*WINNER), fqn)
        return {fqn: (d.convert, d.reason) for fqn, d in wants_float8.decisions.items()}

    return decide


ONCE, TWICE = (True, "measured"), (False, "below 1.10x, measured, recomputed")


@pytest.mark.parametrize(
    ("recompute", "expected"),
    [
        ("none", [ONCE, ONCE, ONCE]),
        ("full", [TWICE, TWICE, ONCE]),
        (lambda fqn: fqn.startswith("layers."), [TWICE, TWICE, ONCE]),
        (lambda fqn: ".1." in fqn, [ONCE, TWICE, ONCE]),
        (lambda fqn: False, [ONCE, ONCE, ONCE]),
    ],
)
def test_recomputed_layers_are_judged_with_two_forwards(decided, recompute, expected):
    names = ["layers.0.w1", "layers.1.w1", "output"]
    assert decided(recompute, *names) == dict(zip(names, expected, strict=True))
    assert list(decided(recompute, *names[::-1]).values()) == expected[::-1]


# --- what it says ----------------------------------------------------------------------------------------------


def test_summary_counts_converted_linears(wants_float8):
    convert_to_float8_training(Model(), module_filter_fn=wants_float8)
    assert wants_float8.summary() == (
        "converted 4 of 9 linears to float8 rowwise "
        "(at least 1.05x or, for a shared input, 1.00x on NVIDIA H200 at 32 tokens)"
    )


def test_summary_says_what_is_outside_and_what_matched_nothing(table_path):
    wants_float8 = auto_filter("rowwise", tokens=TOKENS, tables=table_path, filter_fqns=["mlp", "wq", "moe"])
    with pytest.warns(OutsideGridWarning):
        wants_float8(LinearConfig(64, 256), "output")
    wants_float8(LinearConfig(*WINNER), "wq")
    assert wants_float8.summary() == (
        "converted 1 of 2 linears to float8 rowwise "
        "(at least 1.05x or, for a shared input, 1.00x on NVIDIA H200 at 32 tokens); "
        "outside the measured range: 1 (output); to measure them: fp8gate calibrate --model CONFIG.json --tokens "
        "32; filter_fqns that matched no linear: mlp, moe"
    )


def test_the_command_in_the_summary_measures_what_a_rank_holds(table_path):
    parallel = Parallel(tp=2, cp=2, plan="transformers")
    wants_float8 = auto_filter("rowwise", tokens=2 * TOKENS, tables=table_path, parallel=parallel)
    with pytest.warns(OutsideGridWarning):
        wants_float8(LinearConfig(64, 512), "model.layers.0.mlp.up_proj")
    assert f"fp8gate calibrate --model CONFIG.json --tokens {TOKENS} --tp 2" in wants_float8.summary()


def test_summary_says_that_the_table_is_stale_and_what_cures_it(table_path, monkeypatch):
    monkeypatch.setattr(stale_module, "installed_version", {"torch": "9.9.0"}.get)
    wants_float8 = auto_filter("rowwise", tokens=TOKENS, tables=table_path, on_stale="ignore")
    summary = wants_float8.summary()
    assert re.search(
        r"the table was measured with torch \S+, here 9\.9\.0.*; to measure again: fp8gate calibrate$", summary
    )
    assert wants_float8.report().endswith(summary)


def test_summary_before_anything_was_asked(wants_float8):
    assert wants_float8.summary().startswith("converted 0 of 0 linears")


def test_report_has_a_row_for_each_role_and_in_full_for_each_linear(wants_float8):
    for name in ("layers.0.wq", "layers.0.wk", "layers.1.wq", "layers.1.wk"):
        wants_float8(LinearConfig(*(WINNER if name.endswith("wq") else LOSER)), name)
    header, _, *rows, _ = wants_float8.report().splitlines()
    assert re.split(r"\s{2,}", header) == ["linear", "count", "m", "k", "n", "train in", "speedup", "reason"]
    assert [re.split(r"\s{2,}", row)[:2] for row in rows] == [["layers.*.wq", "2"], ["layers.*.wk", "2"]]
    *rows, _ = wants_float8.report(full=True).splitlines()
    assert [row.split()[0] for row in rows[2:]] == ["layers.0.wq", "layers.0.wk", "layers.1.wq", "layers.1.wk"]


def test_report_has_rows_in_the_order_asked(wants_float8):
    for layer, name in [(LOSER, "wk"), (WINNER, "wq"), ((64, 100), "output")]:
        wants_float8(LinearConfig(*layer), name)
    wants_float8(nn.LayerNorm(64), "norm")
    header, _, *rows, summary = wants_float8.report().splitlines()
    assert re.split(r"\s{2,}", header) == ["linear", "count", "m", "k", "n", "train in", "speedup", "reason"]
    assert [re.split(r"\s{2,}", row.strip()) for row in rows] == [
        ["wk", "1", "32", "128", "64", "bf16", "0.50x", "below 1.00x, measured"],
        ["wq", "1", "32", "64", "128", "float8", "1.50x", "measured"],
        ["output", "1", "32", "64", "100", "bf16", "n = 100: not a multiple of 16"],
    ]
    assert summary == wants_float8.summary()


def test_repr_says_which_table_is_used(wants_float8, table_path):
    assert isinstance(wants_float8, AutoFilter)
    assert repr(wants_float8) == f"<fp8gate filter: rowwise on NVIDIA H200, 32 tokens, 2 points from {table_path}>"


# --- arguments -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ({"recipe": "mxfp8"}, "recipe: expected one of tensorwise, rowwise, rowwise_with_gw_hp; got 'mxfp8'"),
        ({"tokens": 0}, "tokens: expected .* at least 1; got 0"),
        ({"tokens": -1}, "tokens: .* got -1"),
        ({"tokens": True}, "tokens: .* got True"),
        ({"tokens": 32.0}, "tokens: .* got 32.0"),
        ({"tokens": "32"}, "tokens: .* got '32'"),
        ({"filter_fqns": "output"}, "filter_fqns: expected a list of strings; got the string 'output'"),
        ({"min_speedup": 0}, "min_speedup: expected a ratio above 0, such as 1.05; got 0"),
        ({"min_speedup": -1.0}, "min_speedup: .* got -1.0"),
        ({"min_speedup": float("nan")}, "min_speedup: .* got nan"),
        ({"lookup": "linear"}, "lookup: expected one of nearest, interpolate; got 'linear'"),
        ({"recompute": "selective"}, "recompute: expected none, full or a predicate of names; got 'selective'"),
        ({"recompute": True}, "recompute: .* got True"),
        ({"recompute": None}, "recompute: .* got None"),
        ({"parallel": 8}, "parallel: expected a fp8gate.Parallel; got 8"),
    ],
)
def test_argument_out_of_range_is_named(table_path, arguments, complaint):
    with pytest.raises(InputError, match=f"^{complaint}"):
        auto_filter(**{"recipe": "rowwise", "tokens": 32, "tables": table_path, **arguments})


@pytest.mark.parametrize(
    "arguments",
    [
        {"tokens": 1},
        {"filter_fqns": ()},
        {"filter_fqns": ["output"]},
        {"min_speedup": 0.01},
        {"lookup": "interpolate"},
        {"recompute": "full"},
        {"recompute": lambda fqn: True},
        {"parallel": Parallel()},
    ],
)
def test_argument_in_range_is_taken(table_path, arguments):
    assert auto_filter(**{"recipe": "rowwise", "tokens": 32, "tables": table_path, **arguments}).decisions == {}


# --- stale tables ----------------------------------------------------------------------------------------------


def write_made_with(path, **versions):
    return write_file(msgspec.structs.replace(TABLE, software=msgspec.structs.replace(SOFTWARE_HERE, **versions)), path)


def test_table_of_another_torch_warns_at_the_caller(tmp_path):
    path = write_made_with(tmp_path / "t.yaml", torch="0.0.1+cu130")
    with pytest.warns(StaleTableWarning) as caught:
        auto_filter("rowwise", tokens=32, tables=path)
    here = metadata.version("torch").split("+")[0]
    assert [str(warning.message) for warning in caught] == [
        f"{path} was measured with torch 0.0.1, here {here}; to measure again: fp8gate calibrate"
    ]
    assert caught[0].filename == __file__


@pytest.mark.parametrize("build", ["", "+cu999"])
def test_table_of_the_installed_torch_is_silent(tmp_path, build):
    path = write_made_with(tmp_path / "t.yaml", torch=metadata.version("torch").split("+")[0] + build)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        auto_filter("rowwise", tokens=32, tables=path)
