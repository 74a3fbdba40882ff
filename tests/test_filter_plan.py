"""The filter with a plan. The plan decides the linears that it knows, and the table decides the others."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
from builders import DEVICE, make_point, make_table, write_file
from plans import make_plan

from fp8gate import (
    NothingConvertedWarning,
    Parallel,
    PlanError,
    PlanMismatchWarning,
    StaleTableWarning,
    auto_filter,
)
from fp8gate.filter.contract import software_check as stale_module
from fp8gate.filter.contract.plans.plan import Candidate
from fp8gate.filter.contract.plans.plan_file import write_plans
from fp8gate.filter.contract.table import Device, Software

TABLE = make_table(make_point(32, 64, 64, 0.5), make_point(32, 64, 128, 2.0))  # the plan says the opposite of both
Q, GATE, HEAD = (64, 64), (64, 128), (64, 128)
LAYERS = {
    "model.layers.0.self_attn.q_proj": Q,
    "model.layers.1.self_attn.q_proj": Q,
    "model.layers.0.mlp.gate_proj": GATE,
    "lm_head": HEAD,
}


@pytest.fixture(autouse=True)
def _no_driver(tmp_path, monkeypatch):
    monkeypatch.setattr(stale_module, "DRIVER_VERSION", tmp_path / "version")


@pytest.fixture
def with_plan(tmp_path):
    """A function that makes a filter with a plan of these fields."""

    def make(*, file=False, plan=None, recipe="rowwise", tokens=32, **options):
        plan = make_plan(**(plan or {}))
        if file:
            write_plans([plan], tmp_path / "plan.yaml")
        table = write_file(
            TABLE if recipe == "rowwise" else make_table(*TABLE.points, recipe=recipe), tmp_path / "t.yaml"
        )
        return auto_filter(
            recipe, tokens=tokens, tables=table, plan=tmp_path / "plan.yaml" if file else plan, **options
        )

    return make


def layer(in_features, out_features):
    return SimpleNamespace(in_features=in_features, out_features=out_features)


def answers(wants_float8, layers=LAYERS):
    return {fqn: wants_float8(layer(*sizes), fqn) for fqn, sizes in layers.items()}


@pytest.mark.parametrize("file", [True, False])
def test_the_plan_decides_its_roles_and_the_table_the_others(with_plan, file):
    wants_float8 = with_plan(file=file)
    assert list(answers(wants_float8).values()) == [True, True, False, True]
    reasons = [decision.reason for decision in wants_float8.decisions.values()]
    assert reasons[0] == "the plan: block 1.111x, as a whole, not checked"
    assert reasons[2] == "the plan: bf16"
    assert reasons[3] == "not in the plan: measured"


def test_without_a_plan_the_table_decides(with_plan, tmp_path):
    wants_float8 = auto_filter("rowwise", tokens=32, tables=write_file(TABLE, tmp_path / "t.yaml"))
    assert list(answers(wants_float8).values()) == [False, False, True, True]
    assert "plan" not in wants_float8.report()


def test_torchtitans_names_find_the_same_roles(with_plan):
    names = {"layers.0.attention.wq": Q, "layers.0.feed_forward.w1": GATE}
    assert list(answers(with_plan(), names).values()) == [True, False]


def test_the_report_says_which_roles_the_plan_does_not_know(with_plan):
    wants_float8 = with_plan()
    answers(wants_float8)
    least = "(by a plan on NVIDIA H200 at 32 tokens); the plan of tiny, whatever min_speedup"
    assert (
        f"{least}; not in it, by the table, at least 1.05x or, for a shared input, 1.00x: lm_head"
        in wants_float8.report()
    )
    assert "the plan: bf16" in wants_float8.report()
    del wants_float8.decisions["lm_head"]
    assert wants_float8.summary().endswith(least)


def test_filter_fqns_and_the_check_go_on_working(with_plan):
    wants_float8 = with_plan(filter_fqns=["q_proj"], on_nothing="error")
    layers = [(fqn, layer(*sizes)) for fqn, sizes in LAYERS.items() if fqn != "lm_head"]
    with pytest.raises(NothingConvertedWarning):
        wants_float8.check(layers)
    assert wants_float8.decisions["model.layers.0.self_attn.q_proj"].reason == "filter_fqns has 'q_proj'"


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ({"recipe": "tensorwise"}, r"of tiny: \$.recipe: expected tensorwise, found rowwise"),
        ({"tokens": 64}, r"of tiny: \$.tokens: expected 64, found 32"),
        (
            {"plan": {"device": Device(name="NVIDIA H100", kind="cuda", memory_gib=79.1)}},
            r"of tiny: \$.device.name: expected NVIDIA H200, found NVIDIA H100",
        ),
        ({"tokens": 32, "file": True, "recipe": "tensorwise"}, r"plan.yaml: \$.recipe: expected tensorwise"),
    ],
)
def test_a_plan_of_other_training_is_an_error_that_names_file_and_field(with_plan, asked, complaint):
    with pytest.raises(PlanError, match=complaint):
        with_plan(**asked)


def test_context_parallelism_divides_the_tokens_before_they_are_compared(with_plan):
    assert answers(with_plan(tokens=64, parallel=Parallel(cp=2)))["model.layers.0.self_attn.q_proj"]


def test_a_device_is_the_same_whatever_its_spelling(with_plan):
    spelled = Device(name=DEVICE.name.lower(), kind="cuda", memory_gib=1.0)
    assert answers(with_plan(plan={"device": spelled}))


def test_a_layer_of_another_local_shape_is_the_tables_to_decide_and_that_is_said(with_plan):
    wants_float8 = with_plan()
    message = (
        r"of tiny: \$.shapes.self_attn.q_proj: expected \(32, 64, 128\), as model.layers.\*.self_attn.q_proj is here; "
        r"found \(32, 64, 64\); the table decides"
    )
    with pytest.warns(PlanMismatchWarning, match=message):
        assert wants_float8(layer(64, 128), "model.layers.0.self_attn.q_proj")
    (decision,) = wants_float8.decisions.values()
    assert decision.reason == "not in the plan: measured"


def test_the_shape_that_a_rank_holds_counts(with_plan):
    wants_float8 = with_plan(parallel=Parallel(tp=2, plan="transformers"), on_plan="error")
    assert wants_float8(layer(64, 128), "model.layers.0.self_attn.q_proj")
    with pytest.raises(PlanMismatchWarning, match=r"expected \(32, 64, 32\)"):
        wants_float8(layer(64, 64), "model.layers.1.self_attn.q_proj")


def test_recomputation_must_be_the_plans(with_plan):
    assert answers(with_plan(recompute="full", plan={"recompute": "full"}))
    with pytest.warns(PlanMismatchWarning, match=r"\$.recompute: expected full, as model.*; found none"):
        answers(with_plan(recompute="full"))


TWO = ("self_attn.q_proj", "mlp.gate_proj")
TOGETHER = (
    Candidate((), 7, 100.0, 200.0, 1.0, 1.0, 1.0, 1.0, 0.0, "measured"),
    Candidate(TWO, 7, 90.0, 180.0, 1.111, 1.1, 1.12, 1.05, 0.04, "measured"),
    Candidate(("mlp.gate_proj",), 1, 100.0, 201.0, 0.9967, 0.9917, 1.002, 1.01, 0.03, "measured"),
)
OF_TWO = {"convert": TWO, "candidates": TOGETHER}


def checked(wants_float8, layers):
    """The messages of `check` that are about the plan."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = wants_float8.check([(fqn, layer(*sizes)) for fqn, sizes in layers.items()])
    return [finding.message for finding in found if finding.category is PlanMismatchWarning]


BLOCKS = {f"model.layers.{i}.{role}": size for i in range(3) for role, size in zip(TWO, (Q, GATE), strict=True)}
EXPECTED = "expected self_attn.q_proj, mlp.gate_proj"


def decided(wants_float8):
    """Name within the block -> (whether it is converted, why). All blocks must agree."""
    found = {(fqn.split(".", 3)[-1], d.convert, d.reason) for fqn, d in wants_float8.decisions.items()}
    assert len({name for name, *_ in found}) == len(found)
    return {name: (convert, reason) for name, convert, reason in found}


def test_where_every_block_converts_the_plans_set_there_is_nothing_to_say(with_plan):
    wants_float8 = with_plan(plan=OF_TWO)
    assert checked(wants_float8, BLOCKS) == []
    assert decided(wants_float8) == dict.fromkeys(TWO, (True, "the plan: block 1.111x"))


def test_half_a_plan_that_loses_is_not_converted(with_plan):
    wants_float8 = with_plan(plan=OF_TWO, filter_fqns=["q_proj"])
    (message,) = checked(wants_float8, BLOCKS)
    assert message == f"of tiny: $.convert: 3 of 3 blocks convert nothing, measured at 1.000x; {EXPECTED}"
    reason = "the plan: bf16, what is left of its set, mlp.gate_proj, measured at 0.997x"
    assert decided(wants_float8)["mlp.gate_proj"] == (False, reason)
    assert not any(answers(wants_float8, BLOCKS).values())  # the conversion gets the answers that were checked


def test_half_a_plan_that_wins_has_its_own_number(with_plan):
    alone = Candidate(("self_attn.q_proj",), 7, 95.0, 190.0, 1.053, 1.04, 1.06, 1.02, 0.04, "measured")
    wants_float8 = with_plan(plan={**OF_TWO, "candidates": (*TOGETHER, alone)}, filter_fqns=["gate_proj"])
    (message,) = checked(wants_float8, BLOCKS)
    assert message == f"of tiny: $.convert: 3 of 3 blocks convert self_attn.q_proj, measured at 1.053x; {EXPECTED}"
    reason = "the plan: block 1.053x, what is left of its set"
    assert decided(wants_float8)["self_attn.q_proj"] == (True, reason)


def test_half_a_plan_wins_by_more_than_the_control_or_not_at_all(with_plan):
    alone = Candidate(("self_attn.q_proj",), 7, 95.0, 190.0, 1.053, 1.04, 1.06, 1.02, 0.04, "measured")
    fields = {**OF_TWO, "candidates": (*TOGETHER, alone), "control": 1.05}
    wants_float8 = with_plan(plan=fields, filter_fqns=["gate_proj"])
    checked(wants_float8, BLOCKS)
    reason = "the plan: bf16, what is left of its set, self_attn.q_proj, measured at 1.053x"
    assert decided(wants_float8)["self_attn.q_proj"] == (False, reason)


def test_half_a_plan_that_was_not_measured_is_the_tables_to_decide(with_plan):
    wants_float8 = with_plan(plan=OF_TWO, filter_fqns=["gate_proj"])
    (message,) = checked(wants_float8, BLOCKS)
    assert message == f"of tiny: $.convert: 3 of 3 blocks convert nothing, measured at 1.000x; {EXPECTED}"
    reason = "not in the plan: below 1.00x, measured"
    assert decided(wants_float8)["self_attn.q_proj"] == (False, reason)
    by_table = "not in it, by the table, at least 1.05x or, for a shared input, 1.00x"
    assert f"{by_table}: model.layers.*.self_attn.q_proj" in wants_float8.summary()
    assert "the plan of tiny decides none of them; not in it" in wants_float8.summary()
    assert "by a plan" not in wants_float8.summary()


def test_asked_layer_by_layer_no_more_is_claimed_than_is_known(with_plan):
    wants_float8 = with_plan(plan=OF_TWO, filter_fqns=["q_proj"])
    assert list(answers(wants_float8, BLOCKS).values()) == [False, True] * 3
    assert decided(wants_float8)["mlp.gate_proj"] == (True, "the plan: block 1.111x, as a whole, not checked")
    with pytest.warns(PlanMismatchWarning, match="3 of 3 blocks convert mlp.gate_proj, measured at 0.997x"):
        wants_float8.check()


def test_another_model_is_judged_anew(with_plan):
    wants_float8 = with_plan(plan=OF_TWO)
    left_to_the_table = {fqn: size for fqn, size in BLOCKS.items() if fqn.endswith("q_proj")}
    assert len(checked(wants_float8, left_to_the_table)) == 1
    assert checked(wants_float8, BLOCKS) == []
    assert all(answers(wants_float8, BLOCKS).values())


def test_torchtitans_fused_projection_is_not_in_a_plan_that_lacks_a_role_of_it(with_plan):
    wants_float8 = with_plan(plan=OF_TWO)
    fused, half = checked(wants_float8, {"layers.0.attention.qkv_linear.wqkv": GATE, "layers.0.feed_forward.w1": GATE})
    wqkv = "layers.*.attention.qkv_linear.wqkv"
    assert fused == f"of tiny: $.shapes: {wqkv} is none of its roles; the table decides"
    assert half == f"of tiny: $.convert: 1 of 1 blocks convert {wqkv}, which was not measured; {EXPECTED}"


def test_torchtitans_fused_projection_beside_a_whole_set_is_said(with_plan):
    wants_float8 = with_plan()  # converts q_proj alone
    layers = {"layers.0.attention.wq": Q, "layers.0.attention.qkv_linear.wqkv": GATE}
    _, mix = checked(wants_float8, layers)
    assert "convert self_attn.q_proj, layers.*.attention.qkv_linear.wqkv, which was not measured" in mix
    reason = wants_float8.decisions["layers.0.attention.wq"].reason
    assert reason == "the plan: block 1.111x, measured without the linears beside its own"


def test_what_is_left_of_a_set_says_what_else_is_there(with_plan):
    gate = Candidate(("mlp.gate_proj",), 7, 95.0, 190.0, 1.053, 1.04, 1.06, 1.02, 0.04, "measured")
    wants_float8 = with_plan(plan={**OF_TWO, "candidates": (*TOGETHER[:2], gate)})
    checked(wants_float8, {"layers.0.attention.qkv_linear.wqkv": GATE, "layers.0.feed_forward.w1": GATE})
    left = "the plan: block 1.053x, what is left of its set, measured without the linears beside its own"
    assert wants_float8.decisions["layers.0.feed_forward.w1"].reason == left


KV = ("self_attn.k_proj", "self_attn.v_proj")
TITAN = {"layers.0.attention.qkv_linear.wq": Q, "layers.0.attention.qkv_linear.wkv": (64, 32)}


def of_attention(*convert):
    """The fields of a plan with the three roles of an attention that converts these."""
    shapes = {"self_attn.q_proj": (32, 64, 64), **dict.fromkeys(KV, (32, 64, 32))}
    best = Candidate(convert, 7, 90.0, 180.0, 1.2, 1.1, 1.3, 1.05, 0.04, "measured")
    none = {"indivisible": (), "table": None, "torchao": None}
    candidates = (TOGETHER[0], best) if convert else TOGETHER[:1]
    return {"shapes": shapes, "convert": convert, "candidates": candidates, **none}


@pytest.mark.parametrize(("convert", "expected"), [(KV, [False, True]), (("self_attn.q_proj",), [True, False])])
def test_torchtitans_wkv_is_both_roles(with_plan, convert, expected):
    wants_float8 = with_plan(plan=of_attention(*convert))
    assert checked(wants_float8, TITAN) == []
    assert list(answers(wants_float8, TITAN).values()) == expected


def test_torchtitans_wkv_cannot_be_converted_by_half(with_plan):
    wants_float8 = with_plan(plan=of_attention("self_attn.q_proj", "self_attn.k_proj"))
    (torn,) = checked(wants_float8, TITAN)
    assert "expected all or none of self_attn.k_proj, self_attn.v_proj, as layers.*" in torn
    assert torn.endswith("found self_attn.k_proj; the table decides 1 of 1 blocks")
    assert all(d.reason.startswith("not in the plan: below 1.00x") for d in wants_float8.decisions.values())


FUSED = {"layers.0.attention.qkv_linear.wqkv": (64, 128)}


@pytest.mark.parametrize(
    ("convert", "expected"),
    [
        (("self_attn.q_proj", *KV), (True, "the plan: block 1.200x, measured as several linears")),
        ((), (False, "the plan: bf16")),
    ],
)
def test_torchtitans_wqkv_is_three_roles_that_agree(with_plan, convert, expected):
    wants_float8 = with_plan(plan=of_attention(*convert), on_nothing="ignore")
    assert checked(wants_float8, FUSED) == []
    (decision,) = wants_float8.decisions.values()
    assert (decision.convert, decision.reason) == expected


def test_torchtitans_wqkv_is_the_tables_if_its_roles_do_not_agree(with_plan):
    wants_float8 = with_plan(plan=of_attention("self_attn.q_proj"))
    (torn,) = checked(wants_float8, FUSED)
    assert "expected all or none of self_attn.q_proj, self_attn.k_proj, self_attn.v_proj, as layers.*" in torn
    (decision,) = wants_float8.decisions.values()
    assert decision.reason.startswith("not in the plan: ")


def test_a_fused_linear_of_another_width_is_the_tables(with_plan):
    wants_float8 = with_plan(plan=of_attention("self_attn.q_proj", *KV))
    (wider,) = checked(wants_float8, {"layers.0.attention.qkv_linear.wqkv": (64, 64)})
    assert "$.shapes.self_attn.q_proj: expected (32, 64, 64), as layers.*.attention.qkv_linear.wqkv is here" in wider
    assert "found (32, 64, 128)" in wider


def test_a_plan_of_a_fused_role_decides_it(with_plan):
    best = Candidate(("self_attn.qkv_proj",), 7, 90.0, 180.0, 1.2, 1.1, 1.3, 1.05, 0.04, "measured")
    none = {"indivisible": (), "table": None, "torchao": None}
    plan = {"shapes": {"self_attn.qkv_proj": (32, 64, 128)}, "convert": best.convert, **none}
    wants_float8 = with_plan(plan={**plan, "candidates": (TOGETHER[0], best)})
    assert checked(wants_float8, FUSED) == []
    assert wants_float8.decisions[next(iter(FUSED))].reason == "the plan: block 1.200x"


def test_a_block_with_another_layer_is_the_tables_as_a_whole(with_plan):
    first = {"model.layers.0.self_attn.q_proj": Q, "model.layers.0.mlp.gate_proj": (64, 64)}
    wants_float8 = with_plan(plan=OF_TWO)
    (wider,) = checked(wants_float8, {**BLOCKS, **first})
    assert "$.shapes.mlp.gate_proj: expected (32, 64, 64), as model.layers.*.mlp.gate_proj is here" in wider
    assert wider.endswith("found (32, 64, 128); the table decides 1 of 3 blocks")
    converted = [fqn for fqn, decision in wants_float8.decisions.items() if decision.convert]
    assert converted == [fqn for fqn in BLOCKS if ".0." not in fqn]


def test_no_number_of_the_plans_is_used_in_a_block_with_another_layer(with_plan):
    """gate_proj was measured to lose when it is converted alone, but not beside another q_proj."""
    wants_float8 = with_plan(plan=OF_TWO)
    checked(wants_float8, {"layers.0.attention.wq": (64, 128), "layers.0.feed_forward.w1": GATE})
    decision = wants_float8.decisions["layers.0.feed_forward.w1"]
    assert (decision.convert, decision.reason) == (True, "not in the plan: measured")


def test_a_block_of_other_recomputation_is_the_tables(with_plan):
    wants_float8 = with_plan(plan=OF_TWO, recompute=lambda fqn: fqn.startswith("model.layers.1."))
    (message,) = checked(wants_float8, {f"_orig_mod.{fqn}": size for fqn, size in BLOCKS.items()})
    assert "$.recompute: expected full" in message
    assert message.endswith("found none; different too: mlp.gate_proj; the table decides 1 of 3 blocks")


def test_a_plan_of_another_model_is_said_once(with_plan):
    """By each linear that is asked about, too: the plan's policy may be an error, which each answer raises again."""
    wider = {fqn: (64, 2 * n) for fqn, (_, n) in BLOCKS.items()}
    wants_float8 = with_plan(plan=OF_TWO, on_plan="error")
    layers = [(fqn, layer(*sizes)) for fqn, sizes in wider.items()]
    message = (
        "of tiny: $.shapes.self_attn.q_proj: expected (32, 64, 128), as model.layers.*.self_attn.q_proj is here; found "
        "(32, 64, 64); different too: mlp.gate_proj; the table decides 3 of 3 blocks"
    )
    for ask in (lambda: wants_float8.check(layers), lambda: wants_float8(layers[1][1], layers[1][0])):
        with pytest.raises(PlanMismatchWarning) as caught:
            ask()
        assert str(caught.value) == message


def test_asked_layer_by_layer_a_block_with_another_layer_is_said_at_the_check(with_plan):
    wants_float8 = with_plan(plan=OF_TWO, filter_fqns=["gate_proj"])
    answers(wants_float8, {**BLOCKS, "model.layers.0.mlp.gate_proj": (64, 64)})
    with pytest.warns(PlanMismatchWarning, match="1 of 3 blocks convert self_attn.q_proj, in blocks that were not"):
        wants_float8.check()


def test_whole_blocks_may_be_left_out(with_plan):
    assert checked(with_plan(plan=OF_TWO, filter_fqns=["layers.1."]), BLOCKS) == []


def test_a_plan_of_another_models_names_is_said(with_plan):
    (message,) = checked(with_plan(), {"h.0.attn.c_attn": Q, "lm_head": HEAD})
    assert message == "of tiny: $.shapes: no linear has any of its roles, such as self_attn.q_proj"


def test_a_vision_towers_layers_are_not_the_decoders(with_plan):
    tower = "model.vision_tower.layers.0.self_attn.q_proj"
    wants_float8 = with_plan(plan=OF_TWO)
    (message,) = checked(wants_float8, {**BLOCKS, tower: Q})
    name = "model.vision_tower.layers.*.self_attn.q_proj is not named (model.)layers.<i>.self_attn.q_proj"
    assert message == f"of tiny: $.shapes: {name}; the table decides"
    assert wants_float8.decisions[tower].reason == "not in the plan: below 1.00x, measured"


def test_an_error_that_check_raises_says_each_thing_once(with_plan):
    wider = {fqn: (64, 64) if fqn.endswith("gate_proj") else size for fqn, size in BLOCKS.items()}
    wants_float8 = with_plan(plan=OF_TWO, on_plan="error")
    with pytest.raises(PlanMismatchWarning) as caught:
        wants_float8.check([(fqn, layer(*sizes)) for fqn, sizes in wider.items()])
    (line,) = str(caught.value).splitlines()
    assert line.endswith("found (32, 64, 128); the table decides 3 of 3 blocks")


def test_no_conversion_ends_halfway(with_plan):
    """The table decides a layer of another shape. No error is raised after other layers were converted."""
    wider = {**BLOCKS, "model.layers.3.mlp.gate_proj": (64, 64)}
    with pytest.warns(PlanMismatchWarning):
        assert list(answers(with_plan(plan=OF_TWO), wider).values()) == [True] * 6 + [False]


def test_a_plan_that_was_never_checked_is_an_error(with_plan):
    with pytest.raises(PlanError, match=r"of tiny: \$.convert: expected a set that was measured"):
        with_plan(plan={"convert": TWO})


def test_a_plan_of_other_software_is_stale(with_plan):
    old = {"software": Software(torch="1.0.0", torchao="0.18.0", fp8gate="0.1.0")}
    command = r"fp8gate plan CONFIG\.json --recipe rowwise --tokens 32 --sequence 32"
    with pytest.warns(StaleTableWarning, match=rf"of tiny was measured with torch 1.0.0, here .*: {command}$"):
        with_plan(plan=old)
    parts = {"tp": 2, "recompute": "full", "left_out": ("mlp.gate_proj",)}
    with pytest.warns(StaleTableWarning, match=rf"{command} --tp 2 --recompute full --filter-fqns gate_proj$"):
        with_plan(plan={**old, **parts})
    with pytest.raises(StaleTableWarning):
        with_plan(plan=old, on_stale="error")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with_plan()
