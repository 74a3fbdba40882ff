"""The set that a plan has for a block where one linear holds several roles: the fastest measured one that fits."""

from __future__ import annotations

import json
import warnings
from types import SimpleNamespace

import msgspec
import pytest
from builders import make_point, make_table, write_folder
from plans import PROTOCOL, make_plan
from typer.testing import CliRunner

from fp8gate import PlanMismatchWarning, auto_filter
from fp8gate.cli.app import app
from fp8gate.filter.contract.plans.fastest_set import BF16, MeasuredSet, fastest
from fp8gate.filter.contract.plans.plan import Candidate
from fp8gate.filter.contract.plans.plan_file import write_plans

SHAPES = {  # of Llama 3 70B under TP 2
    "self_attn.q_proj": (8192, 8192, 4096),
    "self_attn.k_proj": (8192, 8192, 512),
    "self_attn.v_proj": (8192, 8192, 512),
    "self_attn.o_proj": (8192, 4096, 8192),
    "mlp.gate_proj": (8192, 8192, 14336),
    "mlp.up_proj": (8192, 8192, 14336),
    "mlp.down_proj": (8192, 14336, 8192),
}
Q, K, V, OUT, GATE, UP, DOWN = SHAPES
MLP = (GATE, UP, DOWN)
ALL = tuple(SHAPES)
OWN, WITHOUT_KV = (Q, V, OUT, *MLP), (Q, OUT, *MLP)


def measured(convert, visits, speedup, half=0.005):
    bounds = (speedup - half, speedup + half) if convert else (1.0, 1.0)
    return Candidate(convert, visits, 100.0, 200.0, speedup, *bounds, 1.0, 0.1, "measured")


CANDIDATES = (  # what was measured with rowwise on an H100
    measured((), 20, 1.0),
    measured(OWN, 8, 1.187),
    measured(WITHOUT_KV, 8, 1.186),
    measured((Q, *MLP), 2, 1.186),
    measured((Q, K, OUT, *MLP), 8, 1.186),
    measured((Q, K, V, *MLP), 2, 1.185),
    measured(ALL, 8, 1.183),
)
UNFUSED = {"wq": (8192, 4096), "wk": (8192, 512), "wv": (8192, 512)}
WQKV = {"wqkv": (8192, 5120)}
WKV = {"wq": (8192, 4096), "wkv": (8192, 512)}


def block(projections, index=0):
    """The linears of a torchtitan layer with these projections, as sizes by name."""
    attention = {f"attention.qkv_linear.{name}": size for name, size in projections.items()}
    wide, narrow = (8192, 14336), (14336, 8192)
    mlp = {"feed_forward.w1": wide, "feed_forward.w2": narrow, "feed_forward.w3": wide}
    return {f"layers.{index}.{name}": size for name, size in {**attention, "attention.wo": (4096, 8192), **mlp}.items()}


@pytest.fixture
def folder(tmp_path):
    """A thresholds folder. By its table no linear wins."""
    return write_folder(
        tmp_path / "thresholds", make_table(*(make_point(*shape, 0.5) for shape in sorted({*SHAPES.values()})))
    )


@pytest.fixture
def check(folder):
    """A function that writes a plan with these candidates, and returns a filter that has checked a model with it."""

    def checked(layers, candidates=CANDIDATES, *, plan="auto", convert=OWN, control=0.999, **options):
        rest = {"indivisible": (), "left_alone": (), "table": None, "torchao": None, "control": control}
        protocol = msgspec.structs.replace(PROTOCOL, screening=2, final=6, noise=0.008)
        made = make_plan(tokens=8192, shapes=SHAPES, protocol=protocol, convert=convert, candidates=candidates, **rest)
        path = folder / "nvidia-h200" / "plans" / "llama3-70b-rowwise-m8192.yaml"
        path.parent.mkdir(exist_ok=True)
        write_plans([made], path)
        plan = path if plan == "file" else plan
        wants_float8 = auto_filter("rowwise", tokens=8192, tables=folder, device="NVIDIA H200", plan=plan, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = wants_float8.check([(fqn, layer(*sizes)) for fqn, sizes in layers.items()])
        wants_float8.said = [finding.message for finding in found if finding.category is PlanMismatchWarning]
        return wants_float8

    return checked


def layer(in_features, out_features):
    return SimpleNamespace(in_features=in_features, out_features=out_features)


def converted(wants_float8, index=0):
    """The last parts of the names of what one layer converts."""
    decisions = wants_float8.decisions.items()
    return [fqn.rpartition(".")[2] for fqn, d in decisions if d.convert and fqn.startswith(f"layers.{index}.")]


def reasons(wants_float8, index=0):
    return {d.reason for fqn, d in wants_float8.decisions.items() if fqn.startswith(f"layers.{index}.")}


@pytest.mark.parametrize("plan", ["auto", "file"])
def test_with_wqkv_the_fastest_set_with_all_three_or_none_is_converted(check, plan):
    wants_float8 = check(block(WQKV), plan=plan)
    assert converted(wants_float8) == ["wqkv", "wo", "w1", "w2", "w3"]
    reason = "the plan's fastest measured set with wqkv whole: block 1.183x"
    assert reasons(wants_float8) == {reason, f"{reason}, measured as several linears"}
    assert f"; {reason}, in place of its own: block 1.187x" in wants_float8.summary()
    assert wants_float8.said == []


def test_with_wkv_k_and_v_are_converted_together_or_not_at_all(check):
    wants_float8 = check(block(WKV))
    assert converted(wants_float8) == ["wq", "wo", "w1", "w2", "w3"]
    reason = "the plan's fastest measured set with wkv whole"
    assert reasons(wants_float8) == {f"{reason}: block 1.186x", f"{reason}: bf16"}
    assert f"; {reason}: block 1.186x, in place of its own: block 1.187x" in wants_float8.summary()
    assert wants_float8.said == []


def test_the_plans_own_set_stays_where_it_is_whole(check):
    apart = check(block(UNFUSED))
    assert converted(apart) == ["wq", "wv", "wo", "w1", "w2", "w3"]
    together = check(block(WQKV), convert=ALL)  # though three other sets were faster, one of them without q, k and v
    for wants_float8 in (apart, together):
        assert all(reason.startswith("the plan: ") for reason in reasons(wants_float8))
        assert "fastest measured" not in wants_float8.summary()


@pytest.mark.parametrize("plan", ["auto", "file"])
@pytest.mark.parametrize("failed", [False, True])
def test_without_a_set_that_is_whole_the_table_decides(check, plan, failed):
    candidates = [one for one in CANDIDATES if one.convert in ((), OWN)]
    if failed:
        candidates.append(Candidate(ALL, 0, *(None,) * 5, 1.0, None, "out_of_memory"))
    wants_float8 = check(block(WQKV), tuple(candidates), plan=plan)
    assert converted(wants_float8) == []
    assert not any(decision.planned for decision in wants_float8.decisions.values())
    assert (wants_float8.plans.chosen is None) == (plan == "auto")
    assert [f"expected all or none of {Q}, {K}, {V}" in one for one in wants_float8.said][:1] == [True] * (
        plan != "auto"
    )


def test_each_layer_has_the_set_that_is_whole_in_it(check):
    wants_float8 = check({**block(UNFUSED, 0), **block(WQKV, 1), **block(WKV, 2)})
    assert [len(converted(wants_float8, index)) for index in range(3)] == [6, 5, 5]
    assert "wkv" not in converted(wants_float8, 2)
    for index, begin in enumerate(("the plan: ", "the plan's fastest measured set with wqkv", "the plan's fastest")):
        assert all(reason.startswith(begin) for reason in reasons(wants_float8, index))
    assert wants_float8.said == []
    assert wants_float8.summary().count("in place of its own") == 2


@pytest.mark.parametrize(
    ("whole", "control", "expected"),
    [
        ([measured(ALL, 8, 0.99)], 0.999, 0),
        ([measured(ALL, 8, 1.03)], 0.96, 0),  # not beyond what bf16 differs from itself
        ([measured(ALL, 8, 1.05), measured((OUT, *MLP), 2, 1.1)], 0.999, 4),  # by more than the noise
        ([measured(ALL, 8, 1.05), measured((OUT, *MLP), 2, 1.056)], 0.999, 5),
        ([measured(ALL, 8, 1.05), measured((OUT, *MLP), 8, 1.056)], 0.999, 4),
        ([measured(ALL, 8, 1.05), measured((OUT, *MLP), 8, 1.05)], 0.999, 4),  # of equals the smallest
        ([measured(ALL, 2, 1.05)], 0.999, 5),
        ([measured(ALL, 2, 1.006)], 0.999, 0),
    ],
)
def test_the_rule_is_the_searchs(check, whole, control, expected):
    wants_float8 = check(block(WQKV), (*CANDIDATES[:2], *whole), control=control, on_nothing="ignore")
    assert len(converted(wants_float8)) == expected
    assert all(decision.planned for decision in wants_float8.decisions.values())
    gain = "block" if expected else "bf16, in place of its own: block 1.187x"
    assert f"the plan's fastest measured set with wqkv whole: {gain}" in wants_float8.summary()
    assert wants_float8.said == []


def test_what_is_left_of_such_a_set_has_its_own_number(check):
    left = measured((Q, K, V, *MLP), 2, 1.185)
    wants_float8 = check(block(WQKV), (*CANDIDATES[:2], CANDIDATES[-1], left), filter_fqns=["wo"])
    assert converted(wants_float8) == ["wqkv", "w1", "w2", "w3"]
    assert "the plan's fastest measured set with wqkv whole: block 1.185x, what is left of its set" in reasons(
        wants_float8
    )
    assert wants_float8.said[0].endswith(f"expected {', '.join(ALL)}")


def test_without_a_check_the_table_decides_a_linear_that_the_own_set_tears_apart(check, folder):
    check(block(WQKV))
    path = folder / "nvidia-h200" / "plans" / "llama3-70b-rowwise-m8192.yaml"
    unchecked = auto_filter("rowwise", tokens=8192, tables=folder, device="H200", plan=path)
    with pytest.warns(PlanMismatchWarning, match=f"expected all or none of {Q}, {K}, {V}"):
        assert not unchecked(layer(8192, 5120), "layers.0.attention.qkv_linear.wqkv")
    assert unchecked(layer(4096, 8192), "layers.0.attention.wo")


def test_explain_says_the_same(check, folder):
    check(block(WQKV))
    linears = [f"{fqn.replace('.0.', '.*.')},{k},{n},1" for fqn, (k, n) in block(WQKV).items()]
    options = [option for linear in linears for option in ("--linear", linear)]
    asked = [
        "explain",
        "--recipe",
        "rowwise",
        "--tokens",
        "8192",
        "--device",
        "H200",
        "--tables",
        str(folder),
        "--json",
    ]
    found = json.loads(CliRunner().invoke(app, [*asked, *options]).output)
    assert all(layer["convert"] for layer in found["layers"])
    assert found["in_block"]["plan"]["speedup"] == pytest.approx(1.183)
    reason = "the plan's fastest measured set with wqkv whole: block 1.183x, in place of its own: block 1.187x"
    assert f"The filter takes {reason}." in found["remarks"]


def test_the_fastest_of_measured_sets():
    small, large = MeasuredSet("q", 1.1, 1.09, is_final=True), MeasuredSet("qk", 1.1, 1.09, is_final=True)
    screened = MeasuredSet("v", 1.115, 1.1, is_final=False)
    assert fastest([], noise=0.01) == BF16
    assert fastest([large, small], noise=0.01) == small
    assert fastest([large, screened], noise=0.02) == large
    assert fastest([large, screened], noise=0.01) == screened
    assert fastest([MeasuredSet("q", 1.1, 1.0004, is_final=True)], noise=0.01) == BF16
