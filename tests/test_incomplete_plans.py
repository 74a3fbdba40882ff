"""Plans whose search was stopped: how they are written and read, and what each part of fp8gate makes of them."""

from __future__ import annotations

import json
import shlex
import warnings
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
import torch
from builders import make_point, make_table, write_folder
from commands import parse
from plans import CANDIDATES, MEASURED_AT, PROTOCOL, make_plan, meta_block
from torch import nn
from typer.testing import CliRunner

from fp8gate import IncompleteTableWarning, PlanError, PlanMismatchWarning, auto_filter
from fp8gate.cli import app
from fp8gate.filter.contract.plans.fastest_set import MeasuredSet, fastest
from fp8gate.filter.contract.plans.plan import Candidate
from fp8gate.filter.contract.plans.plan_file import are_complete, format_plans, parse_plans, read_plans, write_plans
from fp8gate.filter.contract.plans.planned_set import PlannedSets
from fp8gate.filter.locate.places import default_out
from fp8gate.filter.planned.incomplete_plan import completing_plan_command, how_far, incomplete_remark

THRESHOLDS = Path(__file__).parents[1] / "thresholds"
Q, GATE, SHARED = (64, 64), (64, 128), (64, 32)
Q_PROJ, GATE_PROJ, SHARED_PROJ = "self_attn.q_proj", "mlp.gate_proj", "mlp.shared.gate_proj"
DENSE, SPARSE = {Q_PROJ: Q, GATE_PROJ: GATE}, {Q_PROJ: Q, SHARED_PROJ: SHARED}
FIRST, REST = "model.layers.0", "model.layers.1-2"
LAYERS = {
    **{f"model.layers.0.{role}": size for role, size in DENSE.items()},
    **{f"model.layers.{i}.{role}": size for i in (1, 2) for role, size in SPARSE.items()},
    "lm_head": GATE,
}


def plan_of(layers, shapes, convert, **fields):
    """A plan that converts a set, which was visited 8 times, as bf16 was."""
    candidates = tuple(
        Candidate(roles, 8, 100.0, 200.0, found, found - 0.01, found + 0.01, 1.0, 0.1, "measured")
        for roles, found in {(): 1.0, convert: 1.2}.items()
    )
    fixed = {"indivisible": (), "left_alone": (), "table": None, "torchao": None, "candidates": candidates}
    shapes = {role: (32, *size) for role, size in shapes.items()}
    return make_plan(**{**fixed, "shapes": shapes, "convert": convert, "layers": layers, **fields})


def dense(**fields):
    """Of the first layer, whose MLP it converts."""
    return plan_of(FIRST, DENSE, (GATE_PROJ,), **fields)


def sparse(**fields):
    """Of the other two layers, whose attention it converts."""
    return plan_of(REST, SPARSE, (Q_PROJ,), **fields)


# --- the file --------------------------------------------------------------------------------------------------


def test_the_file_says_that_a_search_was_stopped_and_what_was_not_begun(tmp_path):
    path = tmp_path / "plan.yaml"
    plans = dense(missing=("model.layers.3",)), sparse(incomplete=True, missing=("model.layers.3",))
    write_plans(plans, path)
    first, second = path.read_text().split("---\n")
    assert "\nlayers: model.layers.0\nmissing: [model.layers.3]\ncolumns: " in first
    assert "\nlayers: model.layers.1-2\nincomplete: true\nmissing: [model.layers.3]\ncolumns: " in second
    assert read_plans(path) == plans


@pytest.mark.parametrize("path", sorted(THRESHOLDS.glob("*/plans/*.yaml")), ids=lambda path: path.stem)
def test_a_plan_is_written_as_it_was_read(path):
    plans, text = read_plans(path), path.read_text()
    assert format_plans(plans) == text
    assert are_complete(plans) is not ("\nincomplete: " in text or "\nmissing: " in text)


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("incomplete: true", "incomplete: 3", r"document 2: Expected `bool`, got `int` - at `\$\.incomplete`"),
        ("incomplete: true", "incomplete: 'yes'", r"document 2: Expected `bool`, got `str` - at `\$\.incomplete`"),
        ("incomplete: true", "incomplete: {visits: 3}", r"document 2: Expected `bool`, got `object`"),
        ("[model.layers.3]", "[three]", r"document 1: Expected `str` matching regex .* - at `\$\.missing\[0\]`"),
        ("[model.layers.3]", "model.layers.3", r"document 1: Expected `array`, got `str` - at `\$\.missing`"),
        ("[model.layers.3]", "[model.layers.4-3]", r"document 1: \$\.missing: expected ranges from low to high; found"),
        ("[model.layers.3]", "[model.layers.4]", r"\$\.missing: expected \('model\.layers\.4',\) as in the first doc"),
    ],
)
def test_what_it_says_is_checked(old, new, complaint):
    missing = ("model.layers.3",)
    text = format_plans([dense(missing=missing), sparse(missing=missing, incomplete=True)])
    with pytest.raises(PlanError, match=rf"^plan\.yaml: {complaint}"):
        parse_plans(text.replace(old, new, 1), source="plan.yaml")


@pytest.mark.parametrize("overlapping", ["model.layers.2-7", "model.layers.*", "layers.0"])
def test_layers_that_are_missing_are_in_no_document(overlapping):
    text = format_plans([dense(missing=(overlapping,)), sparse(missing=(overlapping,))])
    with pytest.raises(
        PlanError, match=r"^plan\.yaml: \$\.missing: expected layers of no document, found '(model\.)?l"
    ):
        parse_plans(text, source="plan.yaml")


@pytest.mark.parametrize(
    ("control", "low", "is_valid"), [(None, 1.01, True), (None, 0.99, False), (1.02, 1.01, False), (1.0, 1.01, True)]
)
def test_an_incomplete_plan_may_choose_a_set_before_bf16_was_compared_with_itself(control, low, is_valid):
    chosen = Candidate((Q_PROJ,), 1, 90.0, 180.0, 1.05, low, 1.09, 1.05, 0.04, "measured")
    plan = make_plan(control=control, candidates=(CANDIDATES[0], chosen, *CANDIDATES[2:]), incomplete=True)
    if is_valid:
        assert parse_plans(format_plans([plan]), source="plan.yaml") == (plan,)
    else:
        above = r"1\.0, bounds" if control is None else r"1\.0 and \$\.control = 1\.02, either way, bounds"
        with pytest.raises(PlanError, match=rf"plan\.yaml: \$\.convert: expected a set above {above} included"):
            parse_plans(format_plans([plan]), source="plan.yaml")


def test_a_complete_plan_chooses_no_set_without_that_comparison():
    text = format_plans([make_plan(control=None)])
    with pytest.raises(PlanError, match=r"plan\.yaml: \$\.convert: expected a set above 1\.0 and \$\.control = None"):
        parse_plans(text, source="plan.yaml")


def test_a_set_whose_screening_was_stopped_is_taken_only_if_no_screened_one_gains():
    once, twice = MeasuredSet("ab", 1.06, 1.04, False, is_screened=False), MeasuredSet("a", 1.04, 1.03, False)
    assert fastest([once, twice], noise=0.01) == twice
    assert fastest([once._replace(is_screened=True), twice], noise=0.01).convert == "ab"
    assert fastest([once, twice._replace(speedup=1.004, speedup_low=0.994)], noise=0.01) == once
    assert fastest([once, twice._replace(is_final=True)], noise=0.03) == twice._replace(is_final=True)


@pytest.mark.parametrize(("visits", "convert"), [(1, (Q_PROJ,)), (2, (Q_PROJ, GATE_PROJ))])
def test_the_filter_too_takes_a_screened_set_first(visits, convert):
    """Where one linear holds the roles k and v, of which the plan's own set has one."""
    k, v = "self_attn.k_proj", "self_attn.v_proj"
    rows = {(): (2, 1.0), (Q_PROJ, k): (2, 1.3), (Q_PROJ,): (2, 1.1), (Q_PROJ, GATE_PROJ): (visits, 1.2)}
    candidates = tuple(
        Candidate(roles, visited, 100.0, 200.0, found, found - 0.01, found + 0.01, 1.0, 0.1, "measured")
        for roles, (visited, found) in rows.items()
    )
    plan = plan_of(
        "",
        {Q_PROJ: Q, k: SHARED, v: SHARED, GATE_PROJ: GATE},
        (Q_PROJ, k),
        candidates=candidates,
        control=None,
        incomplete=True,
        protocol=msgspec.structs.replace(PROTOCOL, screening=2, noise=0.008),
    )
    linears = {"layers.0.attention.wq": (Q_PROJ,), "layers.0.attention.wkv": (k, v)}
    assert PlannedSets(plan).of(linears).convert == convert


# --- what is said of it ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plans", "expected"),
    [
        ((dense(incomplete=True),), "16 visits of model.layers.0"),
        ((make_plan(incomplete=True),), "15 visits"),
        ((dense(), sparse(incomplete=True)), "16 visits of model.layers.1-2"),
        ((dense(missing=(REST,)),), "nothing of model.layers.1-2"),
        (
            (dense(incomplete=True, missing=(REST, "tower.layers.*")),),
            "16 visits of model.layers.0, nothing of model.layers.1-2, nothing of tower.layers.*",
        ),
    ],
)
def test_how_far_it_came(plans, expected):
    assert how_far(plans) == expected
    instead = f"; the table decides {' and '.join(plans[0].missing)}" if plans[0].missing else ""
    assert incomplete_remark(plans, "plan.yaml", "fp8gate plan") == (
        f"plan.yaml is incomplete, its search was stopped with {expected}{instead}; "
        "to complete it, run on NVIDIA H200: fp8gate plan"
    )


def test_complete_plans_have_no_remark():
    assert incomplete_remark((dense(), sparse()), "plan.yaml", "fp8gate plan") is None


def test_the_command_names_the_folder_that_the_plan_lies_in(tmp_path):
    plans, command = (
        (make_plan(incomplete=True),),
        "fp8gate plan CONFIG.json --recipe rowwise --tokens 32 --sequence 32",
    )
    place = Path("nvidia-h200", "plans", "tiny-rowwise-m32.yaml")
    assert completing_plan_command(plans, str(tmp_path / "my tables" / place)) == (
        f"{command} --out {shlex.quote(str(tmp_path / 'my tables'))}"
    )
    assert completing_plan_command(plans, str(default_out() / place)) == command
    for source in ("of tiny", str(tmp_path / "elsewhere.yaml")):
        assert completing_plan_command(plans, source) == command


def test_the_table_of_what_plans_gain_marks_it(monkeypatch):
    monkeypatch.syspath_prepend(str(THRESHOLDS.parent / "benchmarks"))
    import plan_choices

    labels = [plan_choices.label(sparse(tp=tp, incomplete=tp > 1)) for tp in (1, 2)]
    assert labels == ["tiny layers 1-2", "tiny layers 1-2 TP 2, incomplete"]


# --- the filter ------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Tables that convert the shapes of the shared experts and of the head."""
    points = [make_point(32, *Q, 0.5), make_point(32, *SHARED, 2.0), make_point(32, *GATE, 2.0)]
    return write_folder(tmp_path / "thresholds", make_table(*points))


def write(folder, *plans, name="tiny-rowwise-m32"):
    path = folder / "nvidia-h200" / "plans" / f"{name}.yaml"
    path.parent.mkdir(exist_ok=True)
    write_plans(plans, path)
    return path


def checked(folder, layers=LAYERS, *, plan="auto", **options):
    """A filter that has looked at the layers. No plan may be said not to fit them."""
    options = {"on_plan": "error", **options}
    wants_float8 = auto_filter("rowwise", tokens=32, device="NVIDIA H200", tables=folder, plan=plan, **options)
    wants_float8.findings = wants_float8.check(
        [(fqn, SimpleNamespace(in_features=k, out_features=n)) for fqn, (k, n) in layers.items()]
    )
    return wants_float8


def converted(wants_float8):
    return [fqn.removeprefix("model.") for fqn, decision in wants_float8.decisions.items() if decision.convert]


BY_BOTH = ["layers.0.mlp.gate_proj", "layers.1.self_attn.q_proj", "layers.2.self_attn.q_proj", "lm_head"]
REST_BY_TABLE = [
    "layers.0.mlp.gate_proj",
    "layers.1.mlp.shared.gate_proj",
    "layers.2.mlp.shared.gate_proj",
    "lm_head",
]
BY_TABLE = ["layers.0.mlp.gate_proj", *REST_BY_TABLE[1:]]


@pytest.mark.parametrize("given", ["auto", "tiny", "file", "plans"])
def test_the_filter_takes_an_incomplete_plan_and_says_so(folder, given):
    plans = dense(), sparse(incomplete=True, control=None)
    path = write(folder, *plans)
    source = "of tiny" if given == "plans" else str(path)
    asked = {"file": path, "plans": plans}.get(given, given)
    command = "fp8gate plan CONFIG.json --recipe rowwise --tokens 32 --sequence 32"
    command += "" if given == "plans" else f" --out {folder}"
    how_far = "16 visits of model.layers.1-2"
    message = (
        f"{source} is incomplete, its search was stopped with {how_far}; to complete it, run on NVIDIA H200: {command}"
    )
    with pytest.warns(IncompleteTableWarning) as caught:
        wants_float8 = checked(folder, plan=asked)
    assert [str(warning.message) for warning in caught] == [message]
    assert [finding.message for finding in wants_float8.findings] == [message]
    assert converted(wants_float8) == BY_BOTH
    assert f"the plan is incomplete, with {how_far}; to complete it: {command}" in wants_float8.summary()
    assert parse(command)["recipe"] == "rowwise"


def test_a_complete_plan_is_not_warned_of(folder):
    write(folder, dense(), sparse())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wants_float8 = checked(folder)
    assert converted(wants_float8) == BY_BOTH
    assert "incomplete" not in wants_float8.summary()


@pytest.mark.parametrize("given", ["auto", "file"])
def test_it_can_be_an_error_or_ignored(folder, given):
    path = write(folder, dense(), sparse(incomplete=True))
    asked = path if given == "file" else given
    for policy in ({"on_incomplete": "error"}, {"strict": True}):
        with pytest.raises(IncompleteTableWarning, match="is incomplete, its search was stopped with 16 visits"):
            checked(folder, plan=asked, **policy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert converted(checked(folder, plan=asked, on_incomplete="ignore")) == BY_BOTH


@pytest.mark.parametrize("given", ["auto", "file"])
def test_layers_that_were_not_planned_yet_are_the_tables(folder, given):
    path = write(folder, dense(missing=(REST,)))
    with pytest.warns(
        IncompleteTableWarning, match=r"nothing of model\.layers\.1-2; the table decides model\.layers\.1"
    ):
        wants_float8 = checked(folder, plan=path if given == "file" else given)
    assert converted(wants_float8) == REST_BY_TABLE
    reasons = {fqn: decision.reason for fqn, decision in wants_float8.decisions.items()}
    assert reasons["model.layers.0.mlp.gate_proj"] == "the plan: block 1.200x"
    assert reasons["model.layers.1.self_attn.q_proj"] == "not in the plan: below 1.00x, measured"
    assert reasons["model.layers.1.mlp.shared.gate_proj"] == "not in the plan: measured"


def test_layers_that_no_plan_is_about_and_none_misses_fit_none(folder):
    """As before: only layers that the file says are missing may be without a plan."""
    write(folder, dense(missing=("model.layers.1",)))
    wants_float8 = checked(folder)
    assert wants_float8.plans.chosen is None
    assert converted(wants_float8) == BY_TABLE
    with pytest.warns(PlanMismatchWarning, match=r"self_attn\.q_proj is in other layers than model\.layers\.0"):
        checked(folder, plan=(dense(missing=("model.layers.1",)),), on_plan="warn", on_incomplete="ignore")


@pytest.mark.parametrize("has_its_own", [True, False])
def test_the_experts_of_a_plan_are_there_and_others_may_be_in_layers_that_are_missing(folder, has_its_own):
    """The layers that are missing hold `experts`."""
    write(folder, dense(left_alone=("mlp.router",), missing=(REST,)))
    model = nn.Module()
    model.model = nn.Module()
    model.model.layers = nn.ModuleList([meta_block(DENSE), meta_block(SPARSE), meta_block(SPARSE)])
    for layer, name in ((0, "router"), (1, "experts"), (2, "experts"))[0 if has_its_own else 1 :]:
        holder = nn.Module()
        holder.weight = nn.Parameter(torch.empty(4, 8, 8, device="meta"))
        model.model.layers[layer].mlp.add_module(name, holder)
    wants_float8 = auto_filter("rowwise", tokens=32, device="NVIDIA H200", tables=folder, on_incomplete="ignore")
    wants_float8.check(model)
    assert (wants_float8.plans.chosen is not None) == has_its_own


@pytest.mark.parametrize("given", ["auto", "tiny"])
@pytest.mark.parametrize("newer", [{"incomplete": True}, {"missing": ("model.layers.3",)}])
def test_a_complete_plan_comes_before_an_incomplete_one_that_is_newer(folder, given, newer):
    later = MEASURED_AT + timedelta(days=1)
    complete = write(folder, dense(), sparse())
    write(folder, *(one(measured_at=later, **newer) for one in (dense, sparse)), name="new-rowwise-m32")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checked(folder, plan=given).plans.chosen.source == str(complete)
    complete.unlink()
    assert "new-rowwise-m32" in checked(folder, plan=given, on_incomplete="ignore").plans.chosen.source


def test_another_model_hears_nothing_of_the_plan_that_decided_before(folder):
    write(folder, dense(), sparse(incomplete=True))
    with pytest.warns(IncompleteTableWarning):
        wants_float8 = checked(folder)
    linear = SimpleNamespace(in_features=64, out_features=128)
    assert wants_float8.check([("model.layers.0.mlp.gate_proj", linear)]) == []
    assert wants_float8.plans.chosen is None


def test_what_is_left_of_the_set_is_converted_though_bf16_was_not_compared_with_itself(folder):
    """The set without the linear that the user leaves out was visited once, and its lower bound is above 1."""
    both = (Q_PROJ, GATE_PROJ)
    rows = {(): (2, 1.0, 1.0), both: (2, 1.2, 1.19), (GATE_PROJ,): (1, 1.1, 1.08)}
    candidates = tuple(
        Candidate(roles, visits, 100.0, 200.0, found, low, 2 * found - low, 1.0, 0.1, "measured")
        for roles, (visits, found, low) in rows.items()
    )
    plan = plan_of("", DENSE, both, candidates=candidates, control=None, incomplete=True)
    layers = {fqn: size for fqn, size in LAYERS.items() if "layers.0" in fqn}
    options = {"filter_fqns": ["q_proj"], "on_plan": "ignore", "on_incomplete": "ignore"}
    wants_float8 = checked(folder, layers, plan=plan, **options)
    assert converted(wants_float8) == ["layers.0.mlp.gate_proj"]
    reason = wants_float8.decisions["model.layers.0.mlp.gate_proj"].reason
    assert reason == "the plan: block 1.100x, what is left of its set"


# --- explain ---------------------------------------------------------------------------------------------------


@pytest.fixture
def explain(tmp_path, folder):
    """The command on a model of one kind of layers, of three roles that a plan knows."""
    config = tmp_path / "tiny" / "config.json"
    config.parent.mkdir()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 4}
    config.write_text(
        json.dumps({"model_type": "llama", "num_hidden_layers": 2, "vocab_size": 128, "head_dim": 16, **sizes})
    )
    roles = {
        **dict.fromkeys((Q_PROJ, "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"), Q),
        **dict.fromkeys((GATE_PROJ, "mlp.up_proj"), GATE),
        "mlp.down_proj": (128, 64),
    }
    points = [make_point(32, *size, 0.5) for size in sorted({*roles.values()})]
    write_folder(folder, make_table(*points))

    def run(layers, *args, **fields):
        write(folder, plan_of(layers, roles, (Q_PROJ,), **fields))
        asked = ["--recipe", "rowwise", "--tokens", "32", "--device", "H200", "--tables", str(folder)]
        return CliRunner().invoke(app, ["explain", str(config), *asked, *args])

    return run


def test_explain_says_it(explain):
    said = "tiny-rowwise-m32.yaml is incomplete, its search was stopped with 16 visits of model.layers.*; "
    result = explain("model.layers.*", incomplete=True)
    assert (result.exit_code, said in result.stdout.replace("\n", " ")) == (0, True), result.output
    assert explain("model.layers.*", "--strict", incomplete=True).exit_code == 1
    (finding,) = json.loads(explain("model.layers.*", "--json", incomplete=True).stdout)["findings"]
    assert finding["category"] == "IncompleteTableWarning"
    assert said in finding["message"]
    complete = explain("model.layers.*", "--strict")
    assert (complete.exit_code, "incomplete" in complete.stdout) == (0, False)


def test_explain_gives_no_gain_in_the_block_where_layers_are_missing(explain):
    whole = json.loads(explain("model.layers.*", "--json").stdout)
    part = json.loads(explain("model.layers.0", "--json", missing=("model.layers.1",)).stdout)
    assert whole["in_block"]["plan"]["speedup"] == pytest.approx(1.2)
    assert part["in_block"] == {}
    assert [layer["role"] for layer in part["layers"] if layer["convert"]] == ["wq"]
    text = explain("model.layers.0", missing=("model.layers.1",)).stdout
    assert "Inside the compiled block nothing was measured of model.layers.1 yet." in text
