"""Explanations as text for people and as JSON for programs: of one recipe, or of all recipes side by side. Pure.

In: `Explanation`s of one model. Out: a text, or plain data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fp8gate.filter.contract.merged_sweep import measured_text
from fp8gate.filter.contract.plans.layer_names import DEFAULT
from fp8gate.filter.contract.recipes import MOST_ACCURATE_FIRST, Recipe, Variant, casts_json
from fp8gate.filter.explain.explanation import ALL, BF16, PLAN, RULE, TABLE, Explanation, SpeedupInBlocks
from fp8gate.filter.explain.remarks import remarks, shared_remarks
from fp8gate.filter.planned.model_plans import ModelPlans
from fp8gate.filter.terminal_table import Align, render_table

JSON_NAMES = {BF16: "bf16", ALL: "all_float8", RULE: "torchao_rule", TABLE: "table", PLAN: "plan"}


def explanation_json(title: Mapping[str, Any], explanation: Explanation) -> dict[str, Any]:
    """One explanation as plain data. title: what was asked (model, tokens, degrees); it comes first, unchanged."""
    choices = {name: explanation.choice(choice) for choice, name in JSON_NAMES.items()}
    choices["fp8gate"] = explanation.chosen
    plans = explanation.plans
    return {
        **title,
        "recipe": explanation.table.recipe,
        **casts_json(explanation.table.variant),
        "device": explanation.table.device.name,
        "plan": None if plans is None else _plans_json(plans),
        "layers": [layer.row() for layer in explanation.layers],
        "predicted": {
            **{f"{name}_us": choice.us if choice else None for name, choice in choices.items()},
            "speedup": {name: explanation.speedup_of(one) if one else None for name, one in choices.items()},
        },
        "in_block": {name: one.in_block._asdict() for name, one in choices.items() if one and one.in_block},
        "findings": [{"category": one.category.__name__, "message": one.message} for one in explanation.findings],
        "remarks": list(remarks(explanation)),
        "note": explanation.note,
    }


def explanation_text(title: str, explanation: Explanation) -> str:
    """A table of every kind of linear with its decision, what each choice is worth, and what should be known."""
    table, software = explanation.table, explanation.table.software
    measured = measured_text(table.measured_at, table.merged_from)
    rows = [
        (
            layer.linear.role,
            layer.linear.fqn,
            layer.linear.count,
            *(layer.shape.m, layer.shape.k, layer.shape.n),
            "float8" if layer.decision.convert else "bf16",
            layer.by_table.speedup_text,
            layer.decision.reason,
        )
        for layer in explanation.layers
    ]
    headers = ("role", "linear", "count", "m", "k", "n", "train in", "alone", "reason")
    parts = [
        f"{title}, {table.variant}, {table.device.name} "
        f"(torch {software.torch}, torchao {software.torchao}, measured {measured})",
        render_table(headers, rows),
        _choices_text(explanation),
        *remarks(explanation),
        *([explanation.note] if explanation.note else []),
    ]
    return "\n\n".join(parts)


def recipes_json(
    title: Mapping[str, Any], explanations: Mapping[Recipe, Explanation], left_out: Sequence[Variant] = ()
) -> dict[str, Any]:
    """Every recipe's explanation, the fastest recipe, and how much longer the linears take with each recipe.

    left_out: what was asked about as well, and has no table.
    """
    return {
        **title,
        "recipes": {recipe: explanation_json({}, explanation) for recipe, explanation in explanations.items()},
        "fastest": fastest(explanations),
        "slower_than_fastest": {recipe: slower(explanations, recipe) for recipe in explanations},
        **({"left_out": {one.recipe: _why_left_out(one, explanations) for one in left_out}} if left_out else {}),
    }


def recipes_text(title: str, explanations: Mapping[Recipe, Explanation], left_out: Sequence[Variant] = ()) -> str:
    """The recipes side by side, the most accurate first, each with the layers that the filter converts.

    left_out: as in `recipes_json`.
    """
    ranked = [recipe for recipe in MOST_ACCURATE_FIRST if recipe in explanations]
    headers = ["recipe, most accurate first", "float8", "by the", "predicted ms", "speedup", "slower than fastest"]
    rows = [list(_recipe_row(recipe, explanations)) for recipe in ranked]
    if any(explanation.plans for explanation in explanations.values()):
        headers.append("measured in the block")
        for recipe, row in zip(ranked, rows, strict=True):
            row.append(_in_block_text(explanations[recipe].chosen.in_block))
    best, device = fastest(explanations), _device(explanations)
    sentence = f"{best} is the fastest by the sum of the linears"
    if not any(explanation.chosen.converted for explanation in explanations.values()):
        sentence = "No recipe converts any of them"
    elif best != ranked[0]:
        sentence += f"; {ranked[0]}, the most accurate, takes {slower(explanations, ranked[0]):.1%} longer"
    align: list[Align] = ["left", "left", "left", "right", "right", "right", "right"]
    tables = [f"{title}, {device}", render_table(headers, rows, align=align[: len(headers)])]
    remarked = shared_remarks({recipe: explanations[recipe] for recipe in ranked})
    missing = [_why_left_out(one, explanations) for one in left_out]
    return "\n\n".join([*tables, f"{sentence}.", *missing, *remarked])


def _device(explanations: Mapping[Recipe, Explanation]) -> str:
    return next(iter(explanations.values())).table.device.name


def _why_left_out(variant: Variant, explanations: Mapping[Recipe, Explanation]) -> str:
    return (
        f"{variant}: left out, as {_device(explanations)} has no such table. To see {variant.recipe} with Inductor's "
        f"casts: --casts inductor. To measure, run on it: fp8gate calibrate --recipes {variant.recipe}{variant.option}"
    )


def _recipe_row(recipe: Recipe, explanations: Mapping[Recipe, Explanation]) -> Iterator[str]:
    explanation = explanations[recipe]
    yield str(explanation.table.variant)
    yield ", ".join(dict.fromkeys(layer.linear.role for layer in explanation.chosen.converted)) or "none"
    yield "plan" if explanation.plans else "table"
    yield f"{explanation.chosen.us / 1e3:.1f}"
    yield f"{explanation.speedup:.3f}x"
    yield f"{slower(explanations, recipe):.1%}"


def fastest(explanations: Mapping[Recipe, Explanation]) -> Recipe:
    """The fastest recipe by its speedup over bf16: each recipe has its own bf16 times, so only ratios compare.

    Of equally fast ones it is the most accurate.
    """
    ranked = [recipe for recipe in MOST_ACCURATE_FIRST if recipe in explanations]
    return max(ranked, key=lambda recipe: explanations[recipe].speedup)


def slower(explanations: Mapping[Recipe, Explanation], recipe: Recipe) -> float:
    """How much longer the linears take than with the fastest recipe, as a share of that time."""
    return explanations[fastest(explanations)].speedup / explanations[recipe].speedup - 1


def _choices_text(explanation: Explanation) -> str:
    headers = ["linears, forward + backward", "predicted ms", "speedup"]
    if explanation.plans:
        headers.append("measured in the block")
    align: list[Align] = ["left", "right", "right", "right"]
    return render_table(headers, list(_choice_rows(explanation)), align=align[: len(headers)])


def _choice_rows(explanation: Explanation) -> Iterator[tuple[str, ...]]:
    for choice in explanation.choices:
        row = (choice.name, f"{choice.us / 1e3:.1f}", f"{explanation.speedup_of(choice):.3f}x")
        yield (*row, _in_block_text(choice.in_block) or "not measured") if explanation.plans else row
        if choice.name == ALL and explanation.choice(RULE) is None:
            yield (RULE, "no rule", "", *([""] if explanation.plans else []))


def _plans_json(plans: ModelPlans) -> dict[str, Any]:
    kinds = [{"layers": plan.layers or DEFAULT, "convert": plan.convert} for plan in plans.plans]
    return {"file": plans.source, "model": plans.model, "kinds": kinds}


def _in_block_text(found: SpeedupInBlocks | None) -> str:
    """The speedup with the plan's bounds, which bf16 against itself has not."""
    if found is None:
        return ""
    bounds = (
        "" if found.speedup_low == found.speedup_high else f" ({found.speedup_low:.3f} to {found.speedup_high:.3f})"
    )
    return f"{found.speedup:.3f}x{bounds}"
