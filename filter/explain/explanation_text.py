"""Explanations as text for people and as JSON for programs: of one recipe, or of all recipes side by side. Pure.

In: `Explanation`s of one model. Out: a text, or plain data.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tabulate import tabulate

from fp8gate.filter.contract.recipes import MOST_ACCURATE_FIRST, Recipe
from fp8gate.filter.explain.explanation import Explanation


def explanation_json(title: Mapping[str, Any], explanation: Explanation) -> dict[str, Any]:
    """One explanation as plain data. title: what was asked (model, tokens, degrees); it comes first, unchanged."""
    predicted = explanation.predicted
    return {
        **title,
        "recipe": explanation.table.recipe,
        "device": explanation.table.device.name,
        "layers": [layer.row() for layer in explanation.layers],
        "predicted": {
            "bf16_us": predicted.bf16_us,
            "all_float8_us": predicted.all_float8_us,
            "torchao_rule_us": predicted.torchao_rule_us,
            "fp8gate_us": predicted.fp8gate_us,
            "speedup": predicted.speedups(),
        },
        "note": explanation.note,
    }


def explanation_text(title: str, explanation: Explanation) -> str:
    """A table of every kind of linear with its decision, then a table of what each choice is worth."""
    table, software = explanation.table, explanation.table.software
    rows = [
        (
            layer.linear.role,
            layer.linear.fqn,
            layer.linear.count,
            *(layer.shape.m, layer.shape.k, layer.shape.n),
            "float8" if layer.decision.convert else "bf16",
            "" if layer.decision.speedup is None else f"{layer.decision.speedup:.2f}x",
            layer.decision.reason,
        )
        for layer in explanation.layers
    ]
    headers = ("role", "linear", "count", "m", "k", "n", "train in", "speedup", "reason")
    parts = [
        f"{title}, {table.recipe}, {table.device.name} "
        f"(torch {software.torch}, torchao {software.torchao}, measured {table.measured_at:%Y-%m-%d})",
        tabulate(rows, headers=headers, disable_numparse=True),
        _predicted_text(explanation),
    ]
    if explanation.note:
        parts.append(explanation.note)
    return "\n\n".join(parts)


def recipes_json(title: Mapping[str, Any], explanations: Mapping[Recipe, Explanation]) -> dict[str, Any]:
    """Every recipe's explanation, the fastest recipe, and how much longer the linears take with each recipe."""
    return {
        **title,
        "recipes": {recipe: explanation_json({}, explanation) for recipe, explanation in explanations.items()},
        "fastest": fastest(explanations),
        "slower_than_fastest": {recipe: slower(explanations, recipe) for recipe in explanations},
    }


def recipes_text(title: str, explanations: Mapping[Recipe, Explanation]) -> str:
    """The recipes side by side, the most accurate first, each with the layers that the filter converts."""
    ranked = [recipe for recipe in MOST_ACCURATE_FIRST if recipe in explanations]
    rows = []
    for recipe in ranked:
        predicted, layers = explanations[recipe].predicted, explanations[recipe].layers
        converted = [layer.linear.role for layer in layers if layer.decision.convert]
        rows.append(
            (
                recipe,
                ", ".join(converted) or "none",
                f"{predicted.fp8gate_us / 1e3:.1f}",
                f"{_speedup(explanations[recipe]):.3f}x",
                f"{slower(explanations, recipe):.1%}",
            )
        )
    headers = ("recipe, most accurate first", "float8 where it wins", "predicted ms", "speedup", "slower than fastest")
    align = ("left", "left", "right", "right", "right")
    table = tabulate(rows, headers=headers, disable_numparse=True, colalign=align)
    best, device = fastest(explanations), next(iter(explanations.values())).table.device.name
    sentence = f"{best} is the fastest"
    if best != ranked[0]:
        sentence += f"; {ranked[0]}, the most accurate, takes {slower(explanations, ranked[0]):.1%} longer"
    return f"{title}, {device}\n\n{table}\n\n{sentence}."


def fastest(explanations: Mapping[Recipe, Explanation]) -> Recipe:
    """The fastest recipe. Of equally fast ones it is the most accurate."""
    ranked = [recipe for recipe in MOST_ACCURATE_FIRST if recipe in explanations]
    return max(ranked, key=lambda recipe: _speedup(explanations[recipe]))


def slower(explanations: Mapping[Recipe, Explanation], recipe: Recipe) -> float:
    """How much longer the linears take than with the fastest recipe, as a share of that time."""
    return _speedup(explanations[fastest(explanations)]) / _speedup(explanations[recipe]) - 1


def _speedup(explanation: Explanation) -> float:
    """The filter's speedup over bf16. Each recipe has its own bf16 times, so only ratios can be compared."""
    return explanation.predicted.bf16_us / explanation.predicted.fp8gate_us


def _predicted_text(explanation: Explanation) -> str:
    predicted, speedups = explanation.predicted, explanation.predicted.speedups()
    choices = [
        ("bf16", predicted.bf16_us, 1.0),
        ("all float8", predicted.all_float8_us, speedups["all_float8"]),
        ("torchao's rule", predicted.torchao_rule_us, speedups["torchao_rule"]),
        ("this filter", predicted.fp8gate_us, speedups["fp8gate"]),
    ]
    rows = [
        (name, "no rule" if us is None else f"{us / 1e3:.1f}", "" if ratio is None else f"{ratio:.3f}x")
        for name, us, ratio in choices
    ]
    headers = ("linears, forward + backward", "predicted ms", "speedup")
    return tabulate(rows, headers=headers, disable_numparse=True, colalign=("left", "right", "right"))
