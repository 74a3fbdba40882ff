"""Plans of a model whose layers are of several kinds: each layer is decided by its own, and all of them have to fit."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import msgspec
import pytest
from builders import make_point, make_table, write_folder
from plans import make_plan, meta_block

from fp8gate import PlanMismatchWarning, auto_filter
from fp8gate.filter.contract.plans.plan import Candidate
from fp8gate.filter.contract.plans.plan_file import write_plans
from fp8gate.filter.explain.explanation import explain
from fp8gate.filter.model.described_model import DescribedModel, LinearRole

Q, GATE, SHARED = (64, 64), (64, 128), (64, 32)
Q_PROJ, GATE_PROJ, SHARED_PROJ = "self_attn.q_proj", "mlp.gate_proj", "mlp.shared.gate_proj"
DENSE = {Q_PROJ: Q, GATE_PROJ: GATE}
SPARSE = {Q_PROJ: Q, SHARED_PROJ: SHARED}
LAYERS = {
    **{f"model.layers.0.{role}": size for role, size in DENSE.items()},
    **{f"model.layers.{i}.{role}": size for i in (1, 2) for role, size in SPARSE.items()},
    "lm_head": GATE,
}


def plan_of(layers, shapes, convert, speedup=1.2, **fields):
    candidates = tuple(
        Candidate(roles, 8, 100.0, 200.0, found, found - 0.01, found + 0.01, 1.0, 0.1, "measured")
        for roles, found in {(): 1.0, convert: speedup}.items()
    )
    fixed = {"indivisible": (), "left_alone": (), "table": None, "torchao": None}
    shapes = {role: (32, *size) for role, size in shapes.items()}
    return make_plan(
        **{**fixed, "shapes": shapes, "convert": convert, "candidates": candidates, "layers": layers, **fields}
    )


def plans(**of_sparse):
    """The dense layer converts its MLP, the others q_proj."""
    sparse = plan_of("model.layers.1-2", SPARSE, (Q_PROJ,), 1.1, **of_sparse)
    return plan_of("model.layers.0", DENSE, (GATE_PROJ,)), sparse


@pytest.fixture
def folder(tmp_path):
    """Tables that convert nothing but the head's shape."""
    losers = [make_point(32, *size, 0.5) for size in (Q, SHARED)]
    return write_folder(tmp_path / "thresholds", make_table(*losers, make_point(32, *GATE, 2.0)))


def write(folder, found):
    path = folder / "nvidia-h200" / "plans" / "tiny-rowwise-m32.yaml"
    path.parent.mkdir(exist_ok=True)
    write_plans(found, path)
    return path


def checked(folder, layers=None, *, plan="auto"):
    """The names that a filter converts once it has looked at the layers, and the filter."""
    wants_float8 = auto_filter("rowwise", tokens=32, device="NVIDIA H200", tables=folder, plan=plan)
    sizes = (layers or LAYERS).items()
    wants_float8.check([(fqn, SimpleNamespace(in_features=k, out_features=n)) for fqn, (k, n) in sizes])
    return [fqn for fqn, decision in wants_float8.decisions.items() if decision.convert], wants_float8


BY_PLANS = [
    "model.layers.0.mlp.gate_proj",
    "model.layers.1.self_attn.q_proj",
    "model.layers.2.self_attn.q_proj",
    "lm_head",
]


@pytest.mark.parametrize("plan", ["auto", "tiny", "file", "plans"])
def test_each_layer_is_decided_by_the_plan_of_its_kind(folder, plan):
    path = write(folder, plans())
    given = {"file": path, "plans": plans()}.get(plan, plan)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PlanMismatchWarning)
        names, wants_float8 = checked(folder, plan=given)
    assert names == BY_PLANS
    reasons = {fqn: decision.reason for fqn, decision in wants_float8.decisions.items()}
    assert reasons["model.layers.0.mlp.gate_proj"] == "the plan: block 1.200x"
    assert reasons["model.layers.1.self_attn.q_proj"] == "the plan: block 1.100x"


def test_torchtitans_names_are_found_too(folder):
    write(folder, plans())
    names, _ = checked(folder, {fqn.removeprefix("model."): size for fqn, size in LAYERS.items()})
    assert names == [name.removeprefix("model.") for name in BY_PLANS]


def test_a_pipeline_stage_may_be_without_a_kind(folder):
    write(folder, plans())
    names, _ = checked(folder, {fqn: size for fqn, size in LAYERS.items() if ".0." not in fqn})
    assert names == BY_PLANS[1:]


@pytest.mark.parametrize(
    "changed",
    [
        {"model.layers.2.mlp.shared.gate_proj": (64, 48)},
        {"model.layers.3.self_attn.q_proj": Q},  # a layer of which no plan is
        {"model.layers.1.mlp.other": Q},
    ],
)
def test_if_one_layer_differs_no_plan_is_found(folder, changed):
    write(folder, plans())
    names, _ = checked(folder, {**LAYERS, **changed})
    assert "model.layers.0.self_attn.q_proj" not in names
    assert names[:1] == ["model.layers.0.mlp.gate_proj"]  # as the table says


def test_a_list_of_layers_that_differs_is_the_tables_and_the_other_the_plans(folder):
    """Such as a vision tower, whose rows depend on the images, beside the text."""
    tower = msgspec.structs.replace(plan_of("model.tower.layers.*", {"fc": Q}, ("fc",), 3.0), shapes={"fc": (48, *Q)})
    write(folder, (*plans(), tower))
    names, wants_float8 = checked(folder, {**LAYERS, "model.tower.layers.0.fc": Q})
    assert names == BY_PLANS
    assert [plan.layers for plan in wants_float8.plans.chosen.plans] == ["model.layers.0", "model.layers.1-2"]
    names, wants_float8 = checked(folder, {"model.tower.layers.0.fc": Q})
    assert (names, wants_float8.plans.chosen) == ([], None)
    names, _ = checked(folder)
    assert names == BY_PLANS


def test_a_given_plan_names_the_layers_it_is_not_about(folder):
    extra = {**LAYERS, "model.layers.3.self_attn.q_proj": Q}
    with pytest.warns(PlanMismatchWarning, match=r"self_attn.q_proj is in other layers than model.layers.0, model"):
        checked(folder, extra, plan=plans())


@pytest.mark.parametrize(("left_alone", "fits"), [(("mlp.experts",), False), ((), True)])
def test_the_experts_of_one_kind_count_for_its_list(folder, left_alone, fits):
    import torch
    from torch import nn

    write(folder, plans(left_alone=left_alone))

    model = nn.Module()
    model.layers = nn.ModuleList([meta_block(DENSE), meta_block(SPARSE), meta_block(SPARSE)])
    wants_float8 = auto_filter("rowwise", tokens=32, device="NVIDIA H200", tables=folder)
    wants_float8.check(model)
    assert (wants_float8.plans.chosen is not None) == fits
    model.layers[1].mlp.experts = nn.Module()
    model.layers[1].mlp.experts.weight = nn.Parameter(torch.empty(4, 8, 8, device="meta"))
    wants_float8.check(model)
    assert (wants_float8.plans.chosen is not None) != fits


def test_explain_sums_the_blocks_and_shows_each_decision(folder):
    write(folder, plans())
    roles = tuple(
        LinearRole(
            role=role,
            fqn=f"model.layers.*.{role}",
            count=len(layers),
            in_features=64,
            out_features=size[1],
            known_names=tuple(f"model.layers.{i}.{role}" for i in layers),
        )
        for role, size, layers in ((Q_PROJ, Q, (0, 1, 2)), (GATE_PROJ, GATE, (0,)), (SHARED_PROJ, SHARED, (1, 2)))
    )
    wants_float8 = auto_filter("rowwise", tokens=32, device="NVIDIA H200", tables=folder)
    explanation = explain(DescribedModel(name="tiny", linears=roles), wants_float8)
    shown = [(layer.linear.role, layer.linear.count, layer.decision.convert) for layer in explanation.layers]
    assert shown == [(Q_PROJ, 1, False), (Q_PROJ, 2, True), (GATE_PROJ, 1, True), (SHARED_PROJ, 2, False)]
    in_block = explanation.chosen.in_block
    assert in_block.speedup == pytest.approx(3 * 300 / (300 / 1.2 + 2 * 300 / 1.1))
    assert in_block.speedup_low == pytest.approx(3 * 300 / (300 / 1.19 + 2 * 300 / 1.09))
    assert explanation.choice("all float8").in_block is None
