"""The filter asks for tables and plans of the casts that are enabled, and refuses those of others."""

from __future__ import annotations

import os
import warnings
from types import SimpleNamespace

import pytest
from builders import PROTOCOL, make_point, make_table, write_file, write_folder
from msgspec.structs import replace
from plans import PROTOCOL as PLAN_PROTOCOL
from plans import make_plan
from test_light_import import HEAVY, loaded_after

from fp8gate import (
    OutsideGridWarning,
    PlanError,
    StaleTableWarning,
    TableError,
    UnmeasuredSettingWarning,
    auto_filter,
    casts,
)
from fp8gate.filter import layer_filter
from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.contract.plans.plan import Candidate
from fp8gate.filter.contract.plans.plan_file import write_plans
from fp8gate.filter.contract.table import Software, Table
from fp8gate.filter.locate.incomplete_table import completing_command

Q, GATE = (64, 64), (64, 128)
LAYERS = {"model.layers.0.self_attn.q_proj": Q, "model.layers.0.mlp.gate_proj": GATE}
H200 = "NVIDIA H200"


def table_of(speedup: float, *, ours: bool = False, **fields) -> Table:
    protocol = replace(PROTOCOL, casts="fp8gate") if ours else PROTOCOL
    points = make_point(32, *Q, speedup), make_point(32, *GATE, speedup)
    return make_table(*points, **{"protocol": protocol, **fields})


@pytest.fixture(autouse=True)
def _off_afterwards():
    with casts.not_replaced():
        yield


@pytest.fixture
def folder(tmp_path):
    """Tables of both casts: with Inductor's float8 loses, with fp8gate's it wins."""
    tensorwise = table_of(1.1, recipe="tensorwise")
    return write_folder(tmp_path / "thresholds", table_of(0.5), table_of(2.0, ours=True), tensorwise)


def plan_of(*, ours: bool = False, **fields):
    convert = ("self_attn.q_proj",)
    candidates = tuple(
        Candidate(roles, 8, 1.0, 1.0, speedup, speedup - 0.01, speedup + 0.01, 1.0, 0.1, "measured")
        for roles, speedup in {(): 1.0, convert: 1.2}.items()
    )
    shapes = {"self_attn.q_proj": (32, *Q), "mlp.gate_proj": (32, *GATE)}
    fixed = {"shapes": shapes, "indivisible": (), "left_alone": (), "table": None, "torchao": None}
    protocol = replace(PLAN_PROTOCOL, casts="fp8gate") if ours else PLAN_PROTOCOL
    return make_plan(**{**fixed, "convert": convert, "candidates": candidates, "protocol": protocol, **fields})


def ask(folder, *, recipe="rowwise", plan=None, **options):
    return auto_filter(recipe, tokens=32, tables=folder, device=H200, plan=plan, **options)


def checked(wants_float8):
    layers = [(fqn, SimpleNamespace(in_features=k, out_features=n)) for fqn, (k, n) in LAYERS.items()]
    return wants_float8.check(layers)


def test_without_casts_the_table_of_the_enabled_ones_decides(folder):
    assert ask(folder).path.name == "rowwise.yaml"
    with casts.replaced():
        assert ask(folder).path.name == "rowwise-fp8gate_casts.yaml"


def test_the_environment_turns_them_on(folder, monkeypatch):
    monkeypatch.setenv("FP8GATE_CASTS", "1")
    assert ask(folder).table.protocol.casts == "fp8gate"
    assert casts.is_enabled()


def test_the_environment_is_obeyed_whatever_casts_are_asked_for(folder, monkeypatch):
    monkeypatch.setenv("FP8GATE_CASTS", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnmeasuredSettingWarning)
        ask(folder, casts="fp8gate")
    assert casts.is_enabled()
    with pytest.warns(UnmeasuredSettingWarning, match="^fp8gate's casts are on"):
        assert ask(folder, casts="inductor").table.protocol.casts == "inductor"
    monkeypatch.setenv("FP8GATE_CASTS", "yes")
    with pytest.raises(InputError, match=r"^FP8GATE_CASTS: expected 1 to replace casts, or 0; got 'yes'"):
        ask(folder, casts="inductor")


def test_without_a_table_for_them_they_stay_off(folder, monkeypatch):
    """Who catches the error and trains without the filter has what there was before."""
    (folder / "nvidia-h200" / "rowwise-fp8gate_casts.yaml").unlink()
    monkeypatch.setenv("FP8GATE_CASTS", "1")
    with pytest.raises(TableError):
        ask(folder)
    assert not casts.is_enabled()


def test_ranks_compare_the_casts_that_are_on(folder, monkeypatch):
    found = []
    monkeypatch.setattr(layer_filter, "require_agreement", lambda decided, *_: found.append(decided))
    for context in (casts.not_replaced, casts.replaced):
        with context(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UnmeasuredSettingWarning)
            wants_float8 = ask(folder, casts="inductor")
            checked(wants_float8)
            wants_float8.agree()
    differ = {topic: [one[topic] for one in found] for topic in found[0] if found[0][topic] != found[1][topic]}
    assert differ == {"casts that are on": ["inductor", "fp8gate"]}


def test_a_recipe_that_has_no_choice_keeps_inductors(folder):
    with casts.replaced(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checked(ask(folder, recipe="tensorwise")) == []
    with pytest.raises(InputError, match=r"^casts: expected inductor for tensorwise; got 'fp8gate'"):
        ask(folder, recipe="tensorwise", casts="fp8gate")


def test_the_summary_names_the_casts_and_no_reason_does(folder):
    with casts.replaced():
        wants_float8 = ask(folder)
        checked(wants_float8)
    assert "to float8 rowwise, fp8gate's casts (at least" in wants_float8.summary()
    assert [d.reason for d in wants_float8.decisions.values()] == ["measured"] * 2
    assert wants_float8.report().count("casts") == 1
    plain = ask(folder)
    plain(SimpleNamespace(in_features=64, out_features=64), "lm_head")
    assert "casts" not in plain.report()


def test_a_doubt_about_a_linear_names_the_casts(folder):
    """It is printed by itself, away from the summary."""
    for is_on, said in ((True, r"^far, \(32, 512, 512\) with fp8gate's casts: "), (False, r"^far, \(32, 512, 512\): ")):
        with casts.replaced() if is_on else casts.not_replaced(), pytest.warns(OutsideGridWarning, match=said):
            ask(folder)(SimpleNamespace(in_features=512, out_features=512), "far")


@pytest.mark.parametrize(("asked", "is_on"), [("fp8gate", False), ("inductor", True)])
def test_other_casts_than_are_enabled_are_a_finding(folder, asked, is_on):
    with casts.replaced() if is_on else casts.not_replaced():
        with pytest.warns(
            UnmeasuredSettingWarning, match=rf"^fp8gate's casts are {'on' if is_on else 'off'}, and what"
        ):
            wants_float8 = ask(folder, casts=asked)
        assert UnmeasuredSettingWarning in [finding.category for finding in checked(wants_float8)]
        with pytest.raises(UnmeasuredSettingWarning) as raised:
            ask(folder, casts=asked, strict=True)
        assert ("leave casts to its default" in str(raised.value)) == is_on
        assert "make the filter after" not in str(raised.value)
    with casts.not_replaced() if is_on else casts.replaced():
        assert UnmeasuredSettingWarning not in [finding.category for finding in checked(wants_float8)]


def test_check_looks_again(folder):
    """The usual mistake: the filter is made, and then the casts are turned on."""
    wants_float8 = ask(folder)
    assert UnmeasuredSettingWarning not in [finding.category for finding in checked(wants_float8)]
    casts.enable()
    after = (
        r"^fp8gate's casts are on, and what was measured had Inductor's: make the filter after casts\.enable\(\), to"
    )
    with pytest.warns(UnmeasuredSettingWarning, match=after):
        checked(wants_float8)


@pytest.mark.parametrize("ours", [False, True])
def test_a_table_file_of_other_casts_is_refused(tmp_path, ours):
    path = write_file(table_of(2.0, ours=ours), tmp_path / "t.yaml")
    right, wrong = ("fp8gate", "inductor") if ours else ("inductor", "fp8gate")
    with casts.replaced() if ours else casts.not_replaced():
        assert auto_filter("rowwise", tokens=32, tables=path, casts=right).table.protocol.casts == right
    with pytest.raises(TableError, match=rf"t\.yaml: \$\.protocol\.casts: expected {wrong}, found {right}: ") as error:
        auto_filter("rowwise", tokens=32, tables=path, casts=wrong)
    assert ("fp8gate.casts.enable()" in str(error.value)) == ours
    assert ("give casts='inductor'" in str(error.value)) != ours
    assert "fp8gate calibrate" not in str(error.value)  # both can be had


def test_a_device_without_such_a_table_is_told_how_to_measure(tmp_path):
    folder = write_folder(tmp_path / "t", table_of(2.0))
    with casts.replaced():
        for place in (folder, folder / "nvidia-h200"):
            with pytest.raises(
                TableError, match=r"no rowwise table with fp8gate's casts .*rowwise --casts fp8gate$"
            ) as e:
                ask(place)
            assert ". With Inductor's casts there is one: leave out --casts and FP8GATE_CASTS, or" in str(e.value)
        for place in (folder, write_folder(tmp_path / "u", table_of(2.0, recipe="tensorwise")) / "nvidia-h200"):
            with pytest.raises(TableError, match=r"no rowwise table with fp8gate's casts ") as e:
                auto_filter("rowwise", tokens=32, tables=place, device="NVIDIA H100" if place == folder else None)
            assert "With Inductor's casts" not in str(e.value)


def test_an_incomplete_table_names_its_command(tmp_path):
    path = tmp_path / "t" / "nvidia-h200" / "rowwise-fp8gate_casts.yaml"
    assert completing_command(table_of(2.0, ours=True), path).startswith("fp8gate calibrate --casts fp8gate --out ")
    assert completing_command(table_of(2.0), path).startswith("fp8gate calibrate --out ")


def write_plan(folder, *, ours):
    path = folder / "nvidia-h200" / "plans" / f"tiny-rowwise-m32{'-fp8gate_casts' if ours else ''}.yaml"
    path.parent.mkdir(exist_ok=True)
    write_plans([plan_of(ours=ours)], path)
    return path


@pytest.mark.parametrize("ours", [False, True])
@pytest.mark.parametrize("plan", ["auto", "tiny"])
def test_plans_of_other_casts_are_passed_over(folder, ours, plan):
    """By name too: there may be one of each."""
    write_plan(folder, ours=not ours)
    with casts.replaced() if ours else casts.not_replaced():
        if plan == "auto":
            wants_float8 = ask(folder, plan=plan)
            checked(wants_float8)
            assert wants_float8.plans.chosen is None
            assert ("--casts fp8gate" in wants_float8.summary()) == ours
        else:
            with pytest.raises(PlanError, match="plan: no plan of 'tiny' for rowwise"):
                ask(folder, plan=plan)
        path = write_plan(folder, ours=ours)
        wants_float8 = ask(folder, plan=plan)
        checked(wants_float8)
        assert wants_float8.plans.chosen.source == str(path)
        assert wants_float8.decisions["model.layers.0.self_attn.q_proj"].reason == "the plan: block 1.200x"


def test_a_stale_plan_is_measured_again_with_its_casts(folder):
    old = plan_of(ours=True, software=Software(torch="1.0.0", torchao="0.18.0", fp8gate="0.1.0"))
    command = r"fp8gate plan CONFIG\.json --recipe rowwise --tokens 32 --sequence 32 --casts fp8gate"
    with casts.replaced(), pytest.warns(StaleTableWarning, match=rf"; to measure again: {command}$"):
        ask(folder, plan=old)


@pytest.mark.parametrize("ours", [False, True])
def test_a_plan_of_other_casts_that_is_given_is_refused(folder, ours):
    path = write_plan(folder, ours=not ours)
    with casts.replaced() if ours else casts.not_replaced():
        for plan in (path, plan_of(ours=not ours)):
            with pytest.raises(PlanError, match=r"\$\.protocol\.casts: expected \w+, found \w+: it was meas") as error:
                ask(folder, plan=plan)
            assert ("fp8gate.casts.enable()" in str(error.value)) != ours
            assert "fp8gate plan" not in str(error.value)


def test_asking_for_the_casts_loads_nothing_heavy(folder):
    code = (
        "from fp8gate import auto_filter\n"
        f"auto_filter('rowwise', tokens=32, tables={str(folder)!r}, device={H200!r}, on_unmeasured='ignore')"
    )
    assert "FP8GATE_CASTS" not in os.environ
    assert loaded_after(code) & HEAVY == set()
