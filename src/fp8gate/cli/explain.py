"""`fp8gate explain`: say which linears of a model would be converted. Needs neither torch nor a GPU.

Try it: fp8gate explain llama3-8b --recipe rowwise --tokens 8192 --device "NVIDIA H200"
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from fp8gate.casts import VARIABLE
from fp8gate.cli.options import (
    BUNDLED_MODELS,
    FilterFqnsOption,
    JsonOption,
    LinearOption,
    ModelArgument,
    RecipeOrAll,
    Recompute,
    TablesOption,
    TokensOption,
    patterns_of,
    print_json,
    recipes_of,
)
from fp8gate.filter.auto_filter import make_filter
from fp8gate.filter.contract.errors import EXIT_FOUND, InputError
from fp8gate.filter.contract.recipes import RECIPES, Casts, Recipe, Variant
from fp8gate.filter.contract.table import TableError
from fp8gate.filter.decision.decide import DEFAULT_MIN_SPEEDUP
from fp8gate.filter.decision.lookup import DEFAULT_LOOKUP, LookupName
from fp8gate.filter.decision.measured_settings import casts_of_environment
from fp8gate.filter.explain.explanation import Explanation, explain
from fp8gate.filter.explain.explanation_text import explanation_json, explanation_text, recipes_json, recipes_text
from fp8gate.filter.locate.find_table import NoTableError
from fp8gate.filter.model.described_model import DescribedModel
from fp8gate.filter.model.parallel import Parallel
from fp8gate.filter.observe.describe import describe_model
from fp8gate.filter.planned.plan_choice import AUTO
from fp8gate.filter.policy.findings import FilterWarning, Findings
from fp8gate.filter.policy.settings import FilterSettings, policies


@dataclass(frozen=True, kw_only=True, slots=True)
class _Question:
    """What is asked about a model, whatever the recipe and its casts."""

    described: DescribedModel
    settings: FilterSettings
    device: str | None
    tables: Path | None
    plan: str

    def explained(self, variant: Variant) -> Explanation:
        # what is enabled in this process says nothing of the training
        findings = Findings(policies("warn", {"on_unmeasured": "ignore"}))
        plan = None if self.plan == "none" else self.plan
        with warnings.catch_warnings():  # an explanation says itself what is doubtful
            warnings.simplefilter("ignore", FilterWarning)
            wants_float8 = make_filter(
                variant, self.settings, findings, device=self.device, tables=self.tables, plan=plan
            )
            findings.settle()
            return explain(self.described, wants_float8)

    def beside_other_casts(self, found: Explanation) -> Explanation:
        """The explanation with that of fp8gate's casts beside it, if those were measured on the same device too."""
        recipe, casts = found.table.variant
        if casts != "inductor" or "fp8gate" not in RECIPES[recipe].casts:
            return found
        plan = self.plan if self.plan == AUTO else "none"
        question = replace(self, device=found.table.device.name, plan=plan)
        try:
            return replace(found, with_casts=question.explained(Variant(recipe, "fp8gate")))
        except TableError:  # there is none that can be used
            return found


def explain_command(
    model: ModelArgument = "",
    *,
    recipe: Annotated[RecipeOrAll, typer.Option(help="The float8 recipe, or all to compare them.")],
    tokens: TokensOption,
    tp: Annotated[int, typer.Option(min=1, help="Tensor parallel degree, which must divide every layer.")] = 1,
    cp: Annotated[int, typer.Option(min=1, help="Context parallel degree, which divides the tokens.")] = 1,
    recompute: Annotated[
        Recompute, typer.Option(help="full: activation checkpointing runs the blocks' forwards twice.")
    ] = "none",
    casts: Annotated[
        Casts | None,
        typer.Option(
            help="Who compiles the casts of rowwise: Inductor, or fp8gate's pass (fp8gate.casts); by default Inductor, "
            f"and fp8gate where {VARIABLE} is 1."
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="A measured device, such as H200; by default the one here (asks torch).")
    ] = None,
    tables: TablesOption = None,
    plan: Annotated[
        str,
        typer.Option(help="auto: the measured plan that fits; none; a bundled model's name; or a plan's file."),
    ] = AUTO,
    filter_fqns: FilterFqnsOption = "",
    linear: LinearOption = None,
    lookup: Annotated[
        LookupName,
        typer.Option(help="Interpolate between the measured points around a shape, or take the nearest one."),
    ] = DEFAULT_LOOKUP,
    min_speedup: Annotated[
        float | None,
        typer.Option(
            help="Convert every linear from this speedup on; by default from 1.05, and from 1.0 where linears share "
            "their input, but for value projections with tensorwise."
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with code 1 where the filter in training code would warn.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Say which linears of a model would be converted, why, and what it is worth. Needs no GPU.

    It asks the filter that training code uses: the measured plan that fits the model's block decides, else the table.

    For example: fp8gate explain llama3-70b --recipe rowwise --tokens 8192 --tp 8 --device H200
    """
    if min_speedup is not None and not min_speedup > 0:
        raise InputError(f"--min-speedup: expected a ratio above 0, such as {DEFAULT_MIN_SPEEDUP}; got {min_speedup}")
    asked = {"model": model, "tokens": tokens, "tp": tp, "cp": cp, "recompute": recompute}
    if not model and not linear:
        raise InputError(f"MODEL: expected a config.json, its folder, or one of {BUNDLED_MODELS}; or --linear")
    described = describe_model(model, tokens, linears=linear or ())
    described.require_divisible(tp)
    settings = FilterSettings(
        tokens=tokens,
        filter_fqns=tuple(patterns_of(filter_fqns)),
        min_speedup=min_speedup,
        lookup=lookup,
        parallel=Parallel(tp=tp, cp=cp, plan=described.parallel_plan),
        recompute=recompute,
    )
    question = _Question(described=described, settings=settings, device=device, tables=tables, plan=plan)
    explanations: dict[Recipe, Explanation] = {}
    left_out: list[Variant] = []
    for name in recipes_of(recipe):
        variant = _variant(name, casts, is_one_of_all=recipe == "all")
        try:
            explanations[name] = question.explained(variant)
        except NoTableError:
            if recipe != "all" or variant.casts == "inductor":
                raise
            left_out.append(variant)
    if casts is None:
        explanations = {name: question.beside_other_casts(found) for name, found in explanations.items()}
    if recipe == "all":
        _print_recipes(asked, explanations, left_out, as_json)
    else:
        _print_one(asked, explanations[recipe], as_json)
    if strict and (left_out or any(explanation.findings for explanation in explanations.values())):
        raise typer.Exit(EXIT_FOUND)


def _variant(recipe: Recipe, casts: Casts | None, *, is_one_of_all: bool) -> Variant:
    """The recipe with the casts that were asked for, or those of the environment.

    is_one_of_all: a recipe that cannot have them is shown with Inductor's.
    """
    if casts is None:
        return Variant(recipe, casts_of_environment(recipe))
    return Variant(recipe, "inductor" if is_one_of_all and casts not in RECIPES[recipe].casts else casts)


def _print_one(asked: dict[str, Any], explanation: Explanation, as_json: bool) -> None:
    if as_json:
        print_json(explanation_json(asked, explanation))
    else:
        typer.echo(explanation_text(_title(asked), explanation))


def _print_recipes(
    asked: dict[str, Any], explanations: dict[Recipe, Explanation], left_out: list[Variant], as_json: bool
) -> None:
    if as_json:
        print_json(recipes_json(asked, explanations, left_out))
    else:
        typer.echo(recipes_text(_title(asked), explanations, left_out))


def _title(asked: dict[str, Any]) -> str:
    """ "llama3-70b, 8192 tokens, tp 8": degrees of 1 are left out."""
    degrees = [f"{name} {asked[name]}" for name in ("tp", "cp") if asked[name] > 1]
    recomputed = ["recomputed"] if asked["recompute"] != "none" else []
    return ", ".join([asked["model"], f"{asked['tokens']} tokens", *degrees, *recomputed])
