"""Torchao's fixed rule, for machines on which torchao is not installed."""

from __future__ import annotations

from fp8gate.filter.contract.recipes import RECIPES, Recipe
from fp8gate.filter.contract.shapes import FLOAT8_MULTIPLE


def torchao_converts(recipe: Recipe, *, in_features: int, out_features: int) -> bool | None:
    """Whether torchao's rule converts a linear of this size. None if torchao has no rule for the recipe."""
    skips = RECIPES[recipe].torchao_skips
    if skips is None:
        return None
    is_divisible = in_features % FLOAT8_MULTIPLE == 0 and out_features % FLOAT8_MULTIPLE == 0
    return is_divisible and not skips(in_features, out_features)
