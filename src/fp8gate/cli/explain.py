"""`fp8gate explain`: say which linears of a model would be converted. Needs neither torch nor a GPU.

Try it: fp8gate explain llama3-8b --recipe rowwise --tokens 8192 --device "NVIDIA H200"
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fp8gate.cli.options import (
    JsonOption,
    MinSpeedupOption,
    ModelArgument,
    RecipeOrAll,
    Recompute,
    TablesOption,
    TokensOption,
    print_json,
    recipes_of,
)
from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.contract.recipes import Recipe
from fp8gate.filter.decision.decide import DEFAULT_MIN_SPEEDUP
from fp8gate.filter.decision.lookup import DEFAULT_LOOKUP, Lookup, LookupName
from fp8gate.filter.explain.explanation import Explanation, explain
from fp8gate.filter.explain.explanation_text import explanation_json, explanation_text, recipes_json, recipes_text
from fp8gate.filter.locate.find_table import find_table
from fp8gate.filter.model.model_config import load_model
from fp8gate.filter.model.parallel import Parallel, Shards


def explain_command(
    model: ModelArgument,
    recipe: Annotated[RecipeOrAll, typer.Option(help="The float8 recipe, or all to compare them.")],
    tokens: TokensOption,
    tp: Annotated[int, typer.Option(min=1, help="Tensor parallel degree, which must divide every layer.")] = 1,
    cp: Annotated[int, typer.Option(min=1, help="Context parallel degree, which divides the tokens.")] = 1,
    recompute: Annotated[
        Recompute, typer.Option(help="full: activation checkpointing runs the blocks' forwards twice.")
    ] = "none",
    device: Annotated[
        str | None,
        typer.Option(help="Device name, such as 'NVIDIA H200'; by default the one here (asks torch)."),
    ] = None,
    tables: TablesOption = None,
    lookup: Annotated[
        LookupName,
        typer.Option(help="Interpolate between the measured points around a shape, or take the nearest one."),
    ] = DEFAULT_LOOKUP,
    min_speedup: MinSpeedupOption = DEFAULT_MIN_SPEEDUP,
    as_json: JsonOption = False,
) -> None:
    """Say which linears of a model would be converted, why, and what it is worth. Needs no GPU."""
    if not min_speedup > 0:
        raise InputError(f"--min-speedup: expected a ratio above 0, such as {DEFAULT_MIN_SPEEDUP}; got {min_speedup}")
    asked = {"model": model, "tokens": tokens, "tp": tp, "cp": cp, "recompute": recompute}
    config, shards = load_model(model), Shards(Parallel(tp=tp, cp=cp, plan="transformers"), tokens)
    explanations: dict[Recipe, Explanation] = {}
    for name in recipes_of(recipe):
        table, _ = find_table(name, device=device, tables=tables)
        explanations[name] = explain(
            config,
            table,
            Lookup(table, lookup),
            shards=shards,
            recomputed=recompute == "full",
            min_speedup=min_speedup,
        )
    if recipe == "all":
        _print_recipes(asked, explanations, as_json)
    else:
        _print_one(asked, explanations[recipe], as_json)


def _print_one(asked: dict[str, Any], explanation: Explanation, as_json: bool) -> None:
    if as_json:
        print_json(explanation_json(asked, explanation))
    else:
        typer.echo(explanation_text(_title(asked), explanation))


def _print_recipes(asked: dict[str, Any], explanations: dict[Recipe, Explanation], as_json: bool) -> None:
    if as_json:
        print_json(recipes_json(asked, explanations))
    else:
        typer.echo(recipes_text(_title(asked), explanations))


def _title(asked: dict[str, Any]) -> str:
    """ "llama3-70b, 8192 tokens, tp 8": degrees of 1 are left out."""
    degrees = [f"{name} {asked[name]}" for name in ("tp", "cp") if asked[name] > 1]
    recomputed = ["recomputed"] if asked["recompute"] != "none" else []
    return ", ".join([asked["model"], f"{asked['tokens']} tokens", *degrees, *recomputed])
