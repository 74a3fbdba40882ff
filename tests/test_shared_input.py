"""Linears that share their input are converted sooner, and tensorwise never converts query, key and value together."""

from __future__ import annotations

import pytest
import torch
from builders import make_point, make_table, write_file
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fp8gate import auto_filter
from fp8gate.calibrate.comparison.usual_models import PlacedLayer
from fp8gate.calibrate.report.colour_scale import ColourScale
from fp8gate.calibrate.report.page.layer_rows import layer_rows
from fp8gate.filter.contract.recipes import RECIPES
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.decision.lookup import Lookup
from fp8gate.filter.decision.shared_input import decide_linear, input_kind, least_text
from fp8gate.filter.model.observed import Observation, ObservedLinear
from fp8gate.filter.observe.observe import SharedInputs, observe

TOKENS, WIDTH = 32, 64
SHAPE = LinearShape(TOKENS, WIDTH, WIDTH)


class Attention(nn.Module):
    """Llama's, and with `memory` one whose keys and values come from elsewhere, as in a decoder's cross-attention."""

    def __init__(self, names=("q_proj", "k_proj", "v_proj", "o_proj")):
        super().__init__()
        self.names = names
        for name in names:
            setattr(self, name, nn.Linear(WIDTH, WIDTH, bias=False))

    def forward(self, x, memory=None):
        q, k, v, o = (getattr(self, name) for name in self.names)
        other = x if memory is None else memory
        return o(q(x) * k(other) * v(other))


class Mlp(nn.Module):
    def __init__(self, names=("gate_proj", "up_proj", "down_proj")):
        super().__init__()
        self.names = names
        for name in names:
            setattr(self, name, nn.Linear(WIDTH, WIDTH, bias=False))

    def forward(self, x):
        gate, up, down = (getattr(self, name) for name in self.names)
        return down(nn.functional.silu(gate(x)) * up(x))


class Block(nn.Module):
    """hugging_face: the names are Hugging Face's, else torchtitan's."""

    def __init__(self, *, hugging_face=True):
        super().__init__()
        self.norm = nn.RMSNorm(WIDTH)
        if hugging_face:
            self.self_attn, self.mlp = Attention(), Mlp()
        else:
            self.attention, self.feed_forward = Attention(("wq", "wk", "wv", "wo")), Mlp(("w1", "w3", "w2"))

    def forward(self, x):
        attention, mlp = list(self.children())[1:]
        x = x + attention(self.norm(x))
        return x + mlp(self.norm(x))


class Llama(nn.Module):
    def __init__(self, **names):
        super().__init__()
        self.layers = nn.ModuleList([Block(**names) for _ in range(2)])
        self.lm_head = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


class Others(nn.Module):
    """A router that sees the rows of all sequences, experts that see some of them, a pooled input, cross-attention."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(WIDTH, 2)
        self.experts = nn.ModuleList([Mlp() for _ in range(2)])
        self.pooler = nn.Linear(WIDTH, WIDTH)
        self.up_proj = nn.Linear(WIDTH, WIDTH)
        self.cross = Attention()

    def forward(self, x, memory):
        rows = x.flatten(0, 1)
        self.router(rows)
        parts = [expert(part) for expert, part in zip(self.experts, rows.chunk(2), strict=True)]
        return self.pooler(x[:, 0]), self.up_proj(torch.cat(parts)), self.cross(x, memory)


def filter_of(tmp_path, speedup, recipe="rowwise", **options):
    point = make_point(TOKENS, WIDTH, WIDTH, speedup)
    tables = write_file(make_table(point, recipe=recipe), tmp_path / f"{recipe}.yaml")
    return auto_filter(recipe, tokens=TOKENS, tables=tables, plan=None, on_nothing="ignore", **options)


def converted(wants_float8):
    return {name.rpartition(".")[2] for name, decision in wants_float8.decisions.items() if decision.convert}


X = torch.zeros(2, TOKENS // 2, WIDTH)
SHARING = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
EVERY = {*SHARING, "o_proj", "down_proj", "lm_head"}


@pytest.mark.parametrize("example_inputs", [None, (X,)])
@pytest.mark.parametrize(
    ("recipe", "speedup", "expected"),
    [
        ("rowwise", 0.99, set()),
        ("rowwise", 1.0, SHARING),
        ("rowwise", 1.04, SHARING),
        ("rowwise", 1.05, EVERY),
        ("rowwise_with_gw_hp", 1.5, EVERY),
        ("tensorwise", 0.99, set()),
        ("tensorwise", 1.0, SHARING - {"v_proj"}),
        ("tensorwise", 1.5, EVERY - {"v_proj"}),
    ],
)
def test_llama_by_default(tmp_path, example_inputs, recipe, speedup, expected):
    wants_float8 = filter_of(tmp_path, speedup, recipe)
    wants_float8.check(Llama(), example_inputs=example_inputs)
    assert converted(wants_float8) == expected


@pytest.mark.parametrize(("min_speedup", "expected"), [(1.0, EVERY), (1.05, set())])
def test_a_number_that_is_given_holds_for_all_linears(tmp_path, min_speedup, expected):
    wants_float8 = filter_of(tmp_path, 1.04, "tensorwise", min_speedup=min_speedup)
    wants_float8.check(Llama())
    assert converted(wants_float8) == expected


@pytest.mark.parametrize("hugging_face", [True, False])
@settings(max_examples=25, deadline=None)
@given(speedup=st.floats(0.9, 1.2), recipe=st.sampled_from(list(RECIPES)))
def test_names_say_of_llama_what_a_forward_shows(tmp_path_factory, hugging_face, speedup, recipe):
    model = Llama(hugging_face=hugging_face)
    asked, checked, observed = (filter_of(tmp_path_factory.mktemp("tables"), speedup, recipe) for _ in range(3))
    for name, module in model.named_modules():
        asked(module, name)
    checked.check(model)
    observed.check(model, example_inputs=(X,))
    answers = [
        {name: (decision.convert, decision.reason) for name, decision in one.decisions.items()}
        for one in (asked, checked, observed)
    ]
    assert answers[0] == answers[1] == answers[2]


def test_a_forward_shows_what_names_do_not():
    seen = observe(Others(), (X, X.clone()))
    kinds = {name: input_kind(name, seen) for name in seen.linears}
    assert kinds == {
        "router": "own",
        **{f"experts.{i}.{name}": kind for i in (0, 1) for name, kind in MLP_KINDS.items()},
        "pooler": "own",
        "up_proj": "own",
        "cross.q_proj": "own",
        "cross.k_proj": "shared",
        "cross.v_proj": "shared",
        "cross.o_proj": "own",
    }


MLP_KINDS = {"gate_proj": "shared", "up_proj": "shared", "down_proj": "own"}


def test_a_forward_shows_that_other_names_share_their_input():
    names = ("left", "right", "alone")
    seen = observe(Mlp(names), (X,))
    assert [input_kind(name, seen) for name in names] == ["shared", "shared", "own"]
    assert [input_kind(name) for name in names] == ["own"] * 3


def test_a_tensor_with_the_id_of_one_that_is_gone_is_not_shared():
    inputs, ids = SharedInputs(), set()
    for _ in range(100):
        value = torch.empty(2)
        ids.add(id(value))
        assert not inputs.users(value)
        inputs.users(value).add(1)
        assert inputs.users(value) == {1}
        del value
    assert len(ids) < 100  # else this shows nothing


def test_of_several_microbatches_the_fewest_sharers_count():
    seen = [Observation({"q": ObservedLinear(calls=1, rows=8, sharing=sharing)}) for sharing in (2, 0)]
    assert seen[0].worst(seen[1]).linears["q"].sharing == 0
    never = Observation({"q": ObservedLinear()})
    assert never.worst(seen[0]).linears["q"].sharing == 2


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model.layers.0.self_attn.q_proj", "shared"),
        ("layers.3.attention.wk", "shared"),
        ("layers.3.attention.qkv_linear.wv", "value"),
        ("layers.3.attention.qkv_linear.wkv", "value"),
        ("encoder.layer.0.attention.self.query", "shared"),
        ("encoder.layer.0.attention.self.value", "value"),
        ("decoder.block.0.layer.0.SelfAttention.v", "value"),
        ("layers.0.feed_forward.w1", "shared"),
        ("layers.0.feed_forward.w2", "own"),
        ("layers.0.feed_forward.w3", "shared"),
        ("layers.0.attention.wqkv", "own"),
        ("layers.0.self_attn.qkv_proj", "own"),
        ("layers.0.mlp.gate_up_proj", "own"),
        ("layers.0.mlp.gate", "own"),
        ("q_proj", "shared"),
        ("lm_head", "own"),
    ],
)
def test_what_a_name_suggests(name, kind):
    assert input_kind(name) == kind
    assert input_kind(name, Observation({})) == kind
    assert input_kind(name, Observation({name: ObservedLinear(calls=1, rows=8)})) == kind


@pytest.mark.parametrize(
    ("kind", "recipe", "speedup", "reason"),
    [
        ("own", "rowwise", 1.03, "below 1.05x, measured"),
        ("shared", "rowwise", 1.03, "shares its input, measured"),
        ("shared", "rowwise", 1.5, "measured"),
        ("shared", "rowwise", 0.9, "below 1.00x, measured"),
        ("value", "rowwise", 1.03, "shares its input, measured"),
        ("value", "tensorwise", 1.5, "query, key and value are never all converted, measured"),
        ("value", "tensorwise", 0.9, "below 1.00x, measured"),
    ],
)
def test_the_reason_names_what_decided(kind, recipe, speedup, reason):
    lookup = Lookup(make_table(make_point(SHAPE.m, SHAPE.k, SHAPE.n, speedup), recipe=recipe))
    assert decide_linear(kind, SHAPE, lookup).reason == reason


def test_the_threshold_as_text():
    assert [least_text(None), least_text(1.1)] == ["1.05x or, for a shared input, 1.00x", "1.10x"]


@pytest.mark.parametrize(
    ("recipe", "speedup", "text"),
    [
        ("rowwise", 0.9, "0.90"),
        ("rowwise", 1.04, "1.04 ✓ wq, wv"),
        ("rowwise", 1.5, "1.50 ✓"),
        ("tensorwise", 1.5, "1.50 ✓ wq, wo"),
    ],
)
def test_the_report_marks_the_roles_that_are_converted(recipe, speedup, text):
    layer = PlacedLayer(roles=("wq", "wv", "wo"), k=WIDTH, n=WIDTH, tp=1)
    table = make_table(make_point(TOKENS, WIDTH, WIDTH, speedup), recipe=recipe)
    (row,) = layer_rows([layer], {recipe: table}, {recipe: Lookup(table)}, ColourScale())
    assert [cell.text for cell in row.cells] == [text]
