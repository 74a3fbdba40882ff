"""Tables and plans of fp8gate's casts: their names, their files, and what a recipe can have."""

from __future__ import annotations

from pathlib import Path

import pytest
from builders import PROTOCOL, make_point, make_table
from msgspec.structs import replace
from plans import PROTOCOL as PLAN_PROTOCOL
from plans import make_plan

from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.contract.plans.plan import PlanError
from fp8gate.filter.contract.plans.plan_file import format_plans, parse_plans, read_plans
from fp8gate.filter.contract.recipes import VARIANTS, Variant, recipes_with, require_casts
from fp8gate.filter.contract.table import TableError, format_table, parse_table, read_table

THRESHOLDS = Path(__file__).parents[1] / "thresholds"
PLAIN = make_table(make_point(32, 64, 128))
OF_CASTS = replace(PLAIN, protocol=replace(PROTOCOL, casts="fp8gate"))
PLAN_OF_CASTS = make_plan(protocol=replace(PLAN_PROTOCOL, casts="fp8gate"))


def test_the_names_of_a_variant():
    plain, ours = Variant("rowwise"), Variant("rowwise", "fp8gate")
    assert (f"{plain}", plain.file, plain.option) == ("rowwise", "rowwise.yaml", "")
    assert (f"{ours}", ours.file) == ("rowwise, fp8gate's casts", "rowwise-fp8gate_casts.yaml")
    assert ours.option == " --casts fp8gate"


def test_only_rowwise_has_a_choice():
    names = [variant.name for variant in VARIANTS]
    assert names == ["tensorwise", "rowwise", "rowwise-fp8gate_casts", "rowwise_with_gw_hp"]
    assert recipes_with("fp8gate") == ("rowwise",)
    require_casts("rowwise", "fp8gate")
    with pytest.raises(InputError, match=r"^casts: expected inductor for tensorwise; got 'fp8gate' \(rowwise can"):
        require_casts("tensorwise", "fp8gate")
    with pytest.raises(InputError, match=r"^casts: expected inductor or fp8gate for rowwise; got 'triton'$"):
        require_casts("rowwise", "triton")


def test_the_default_is_not_in_a_file():
    assert " casts:" not in format_table(PLAIN)
    assert " casts:" not in format_plans([make_plan()])


def test_what_is_not_the_default_reads_back_equal():
    assert parse_table(format_table(OF_CASTS), source="t").variant == Variant("rowwise", "fp8gate")
    assert parse_plans(format_plans([PLAN_OF_CASTS]), source="p")[0].variant == Variant("rowwise", "fp8gate")


def test_casts_that_the_recipe_cannot_have_are_refused():
    text = format_table(OF_CASTS).replace("recipe: rowwise", "recipe: tensorwise")
    with pytest.raises(TableError, match=r"^t: \$\.protocol\.casts: tensorwise cannot have fp8gate's casts$"):
        parse_table(text, source="t")
    with pytest.raises(PlanError, match=r"^p: \$\.protocol\.casts: tensorwise cannot have fp8gate's casts$"):
        parse_plans(format_plans([PLAN_OF_CASTS]).replace("recipe: rowwise", "recipe: tensorwise"), source="p")


def test_plans_of_a_model_have_the_same_casts():
    kinds = [make_plan(layers="model.layers.0"), replace(PLAN_OF_CASTS, layers="model.layers.1")]
    with pytest.raises(PlanError, match=r"\$\.protocol\.casts: expected inductor as in the first document, found fp8"):
        parse_plans(format_plans(kinds), source="p")


@pytest.mark.parametrize("path", sorted(THRESHOLDS.rglob("*.yaml")), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_committed_files_are_written_again_unchanged(path):
    is_plan = path.parent.name == "plans"
    assert path.read_text() == (format_plans(read_plans(path)) if is_plan else format_table(read_table(path)))
