"""The plan that decides: the one that fits the model by default, a model's own by name, a file, or none."""

from __future__ import annotations

import warnings
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from builders import DEVICE, make_point, make_table, write_folder
from plans import MEASURED_AT, make_plan
from torch import nn

from fp8gate import Parallel, PlanError, PlanMismatchWarning, StaleTableWarning, auto_filter
from fp8gate.filter.contract import software_check
from fp8gate.filter.contract.plans.plan import Candidate
from fp8gate.filter.contract.plans.plan_file import write_plans

Q, GATE = (64, 64), (64, 128)
ROLES = {"self_attn.q_proj": (32, *Q), "mlp.gate_proj": (32, *GATE)}
LAYERS = {
    "model.layers.0.self_attn.q_proj": Q,
    "model.layers.0.mlp.gate_proj": GATE,
    "model.layers.1.self_attn.q_proj": Q,
    "model.layers.1.mlp.gate_proj": GATE,
    "lm_head": GATE,
}
BY_TABLE = ["model.layers.0.mlp.gate_proj", "model.layers.1.mlp.gate_proj", "lm_head"]
BY_PLAN = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "lm_head"]


@pytest.fixture
def folder(tmp_path):
    """A thresholds folder. Its table says the opposite of its plans."""
    return write_folder(tmp_path / "thresholds", make_table(make_point(32, *Q, 0.5), make_point(32, *GATE, 2.0)))


def write(folder, *, name="tiny-rowwise-m32", convert=("self_attn.q_proj",), **fields):
    candidates = tuple(
        Candidate(roles, 8, 1.0, 1.0, speedup, speedup - 0.01, speedup + 0.01, 1.0, 0.1, "measured")
        for roles, speedup in {(): 1.0, convert: 1.2}.items()
    )
    fixed = {"shapes": ROLES, "indivisible": (), "left_alone": (), "table": None, "torchao": None}
    plan = make_plan(**{**fixed, "convert": convert, "candidates": candidates, **fields})
    path = folder / "nvidia-h200" / "plans" / f"{name}.yaml"
    path.parent.mkdir(exist_ok=True)
    write_plans([plan], path)
    return path


def layer(in_features, out_features):
    return SimpleNamespace(in_features=in_features, out_features=out_features)


def converted(folder, layers=None, *, plan="auto", tokens=32, **options):
    """The names that a filter converts once it has looked at the layers, and the filter."""
    options = {"tables": folder, "device": "NVIDIA H200", **options}
    wants_float8 = auto_filter("rowwise", tokens=tokens, plan=plan, **options)
    wants_float8.check([(fqn, layer(*size)) for fqn, size in (layers or LAYERS).items()])
    return [fqn for fqn, decision in wants_float8.decisions.items() if decision.convert], wants_float8


# --- auto ------------------------------------------------------------------------------------------------------


def test_the_plan_that_fits_decides_by_default_and_is_named(folder):
    path = write(folder)
    names, wants_float8 = converted(folder)
    assert names == BY_PLAN
    assert f"the plan {path}, whatever min_speedup" in wants_float8.summary()
    assert auto_filter("rowwise", tokens=32, tables=folder, device="h200").plans.is_auto


def test_torchtitans_names_fit_too(folder):
    write(folder)
    titan = {"layers.0.attention.wq": Q, "layers.0.feed_forward.w1": GATE}
    assert converted(folder, titan)[0] == ["layers.0.attention.wq"]


@pytest.mark.parametrize(
    ("plan", "layers"),
    [
        ({"tokens": 64, "shapes": {role: (64, k, n) for role, (_, k, n) in ROLES.items()}}, {}),
        ({"recipe": "tensorwise"}, {}),
        ({"recompute": "full"}, {}),
        ({"shapes": {**ROLES, "mlp.gate_proj": (32, 64, 256)}}, {}),
        ({"shapes": {**ROLES, "mlp.up_proj": (32, *GATE)}}, {}),
        ({}, {"model.layers.1.mlp.up_proj": GATE}),
        ({}, {"model.layers.1.mlp.gate_proj": (64, 256)}),
    ],
    ids=["tokens", "recipe", "recompute", "shape", "a role more", "a linear more", "one block differs"],
)
def test_a_plan_of_another_block_does_not_decide(folder, plan, layers):
    write(folder, **plan)
    names, wants_float8 = converted(folder, {**LAYERS, **layers}, on_outside="ignore")
    assert "lm_head" in names
    assert not any(name.endswith("q_proj") for name in names)
    assert wants_float8.plans.chosen is None
    command = "fp8gate plan CONFIG.json --recipe rowwise --tokens 32"
    assert f"no measured plan fits this model; to measure one: {command}" in wants_float8.summary()


def test_a_device_that_only_shares_the_folder_has_no_plans_there(folder):
    import msgspec

    write(folder, device=msgspec.structs.replace(DEVICE, name="NVIDIA H100"))
    assert converted(folder)[0] == BY_TABLE


def test_the_commands_options_are_those_of_the_training(folder):
    layers = {"model.layers.0.self_attn.q_proj": (64, 128)}
    options = {"parallel": Parallel(tp=2, plan="transformers"), "recompute": "full"}
    _, wants_float8 = converted(folder, layers, on_nothing="ignore", **options)
    assert "fp8gate plan CONFIG.json --recipe rowwise --tokens 32 --tp 2 --recompute full" in wants_float8.summary()


def test_what_a_rank_holds_has_to_fit(folder):
    write(folder)
    whole = {"model.layers.0.self_attn.q_proj": (64, 128), "model.layers.0.mlp.gate_proj": (64, 256)}
    names, _ = converted(folder, whole, parallel=Parallel(tp=2, plan="transformers"))
    assert names == ["model.layers.0.self_attn.q_proj"]


def test_context_parallelism_divides_the_tokens_before_a_plan_is_sought(folder):
    write(folder)
    assert converted(folder, tokens=64, parallel=Parallel(cp=2))[0] == BY_PLAN


def test_of_two_that_fit_the_newest_decides(folder):
    write(folder, name="a-rowwise-m32", measured_at=MEASURED_AT + timedelta(days=1))
    write(folder, name="b-rowwise-m32", convert=("mlp.gate_proj",))
    assert converted(folder)[0] == BY_PLAN


def test_filter_fqns_leave_their_roles_out_of_a_plan_that_fits(folder):
    write(folder)
    names, wants_float8 = converted(folder, filter_fqns=["layers.0.self_attn"], on_plan="ignore")
    assert names == BY_PLAN[1:]
    assert wants_float8.plans.chosen


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 4, 4))


class Layer(nn.Module):
    def __init__(self, has_experts):
        super().__init__()
        self.self_attn = nn.ModuleDict({"q_proj": nn.Linear(*Q)})
        self.mlp = nn.ModuleDict({"gate_proj": nn.Linear(*GATE)})
        if has_experts:
            self.mlp["experts"] = Experts()


@pytest.mark.parametrize("has_experts", [False, True])
@pytest.mark.parametrize("left_alone", [(), ("mlp.experts",)])
def test_a_module_has_the_experts_that_were_measured_or_none(folder, has_experts, left_alone):
    write(folder, left_alone=left_alone)
    wants_float8 = auto_filter("rowwise", tokens=32, tables=folder, device="NVIDIA H200")
    model = nn.Module()
    model.layers = nn.ModuleList([Layer(has_experts), Layer(has_experts)])
    wants_float8.check(model)
    assert (wants_float8.plans.chosen is not None) == (has_experts == bool(left_alone))


def test_without_a_check_the_table_decides_and_the_summary_says_why(folder):
    write(folder)
    wants_float8 = auto_filter("rowwise", tokens=32, tables=folder, device="NVIDIA H200")
    assert [wants_float8(layer(*size), fqn) for fqn, size in LAYERS.items()] == [False, True, False, True, True]
    assert "1 measured plans may fit: check(model) chooses one" in wants_float8.summary()


def test_another_model_is_looked_at_anew(folder):
    write(folder)
    _, wants_float8 = converted(folder)
    wants_float8.check([("model.layers.0.mlp.gate_proj", layer(*GATE))])
    assert wants_float8.plans.chosen is None
    wants_float8.check([(fqn, layer(*size)) for fqn, size in LAYERS.items()])
    assert [fqn for fqn, decision in wants_float8.decisions.items() if decision.convert] == BY_PLAN


def test_a_file_that_is_no_plan_is_named_where_none_fits(folder):
    path = write(folder)
    broken = path.with_name("broken-rowwise-m32.yaml")
    broken.write_text("schema: 1\n")
    path.with_name("other-rowwise-m320.yaml").write_text("schema: 1\n")
    assert converted(folder, on_plan="error")[0] == BY_PLAN
    path.unlink()
    with pytest.warns(PlanMismatchWarning) as caught:
        assert converted(folder)[0] == BY_TABLE
    (message,) = [str(warning.message) for warning in caught if warning.category is PlanMismatchWarning]
    assert message.startswith(f"{broken}: ")
    assert message.endswith("; this file is left out")


def test_the_age_of_a_plan_that_fits_is_found(folder, monkeypatch):
    write(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wants_float8 = auto_filter("rowwise", tokens=32, tables=folder, device="NVIDIA H200")
    monkeypatch.setattr(software_check, "installed_version", {"torch": "9.9.0"}.get)
    with pytest.warns(StaleTableWarning, match=r"tiny-rowwise-m32\.yaml was measured with torch .*, here 9\.9\.0"):
        wants_float8.check([(fqn, layer(*size)) for fqn, size in LAYERS.items()])


@pytest.mark.parametrize("linear", ["frozen", "subclass"])
def test_a_block_with_a_linear_that_no_plan_can_decide_is_another(folder, linear):
    write(folder)
    odd = nn.Linear(*Q).requires_grad_(False) if linear == "frozen" else type("Own", (nn.Linear,), {"forward": max})(*Q)
    wants_float8 = auto_filter("rowwise", tokens=32, tables=folder, device="H200", on_not_plain="ignore")
    layers = {fqn: layer(*size) for fqn, size in LAYERS.items()}
    wants_float8.check([*layers.items(), ("model.layers.0.other", odd)])
    assert wants_float8.plans.chosen is None


def test_a_plan_that_was_found_says_nothing_of_what_is_in_no_block(folder):
    write(folder)
    layers = {**LAYERS, "model.vision_tower.layers.0.self_attn.q_proj": Q}
    _, wants_float8 = converted(folder, layers, on_plan="error")
    assert wants_float8.plans.chosen


@pytest.mark.parametrize(("filter_fqns", "fits"), [([], False), (["gate_proj"], True), (["q_proj"], False)])
def test_a_plan_that_left_roles_out_fits_who_leaves_them_out_too(folder, filter_fqns, fits):
    write(folder, left_out=("mlp.gate_proj",))
    _, wants_float8 = converted(folder, filter_fqns=filter_fqns, on_plan="ignore")
    assert (wants_float8.plans.chosen is not None) == fits


# --- a name, a file, none --------------------------------------------------------------------------------------


def test_a_models_name_means_its_plan(folder):
    write(folder, name="other-rowwise-m32", convert=("mlp.gate_proj",), measured_at=MEASURED_AT + timedelta(days=1))
    path = write(folder, name="mine-rowwise-m32", model="mine")
    names, wants_float8 = converted(folder, plan="mine")
    assert (names, wants_float8.plans.chosen.source) == (BY_PLAN, str(path))


@pytest.mark.parametrize(
    ("options", "asked"),
    [
        ({}, "at 32 tokens on NVIDIA H200"),
        ({"parallel": Parallel(tp=2, plan="transformers")}, "at 32 tokens, tp 2 on NVIDIA H200"),
        ({"recompute": "full"}, "at 32 tokens on NVIDIA H200"),
    ],
)
def test_a_model_without_a_plan_for_this_training_is_an_error_with_the_command(folder, options, asked):
    write(folder, model="tiny", tp=4)
    with pytest.raises(PlanError) as caught:
        converted(folder, plan="tiny", **options)
    assert str(caught.value).startswith(f"plan: no plan of 'tiny' for rowwise {asked}; plans of this device: tiny-row")
    assert "run on it: fp8gate plan CONFIG.json --recipe rowwise --tokens 32" in str(caught.value)


def test_a_file_decides_and_none_does_without(folder):
    path = write(folder)
    assert converted(folder, plan=path)[0] == converted(folder, plan=str(path))[0] == BY_PLAN
    names, wants_float8 = converted(folder, plan=None)
    assert names == BY_TABLE
    assert "plan" not in wants_float8.report().replace(str(folder), "")


def test_a_file_that_is_not_there_is_an_error(folder):
    with pytest.raises(PlanError, match=r"missing\.yaml"):
        converted(folder, plan="missing.yaml")
