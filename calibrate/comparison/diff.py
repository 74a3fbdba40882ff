"""Read the tables that are to be compared: two files, or two folders of them.

In: two paths. Out: a `Comparison` for each recipe that both have, with what it means for the bundled models.
Try it: fp8gate diff benchmarks/data/nvidia-h200-second-sweep thresholds/nvidia-h200
"""

from __future__ import annotations

from pathlib import Path

from fp8gate.calibrate.comparison.compare_tables import Comparison, compare_tables
from fp8gate.calibrate.comparison.table_paths import by_recipe, read_tables
from fp8gate.calibrate.comparison.usual_models import usual_models
from fp8gate.filter.contract.recipes import RECIPES
from fp8gate.filter.contract.table import TableError


def compare_paths(before: Path, after: Path, *, min_speedup: float) -> list[Comparison]:
    """Compare two files of one recipe, or two folders recipe by recipe.

    Raises TableError if a table cannot be read, if a folder has two tables of one recipe, or if the two sides have no
    recipe in common.
    """
    old, new = (
        {recipe: table for recipe, (_, table) in by_recipe(read_tables(path)).items()} for path in (before, after)
    )
    common = [recipe for recipe in RECIPES if recipe in old and recipe in new]
    if not common:
        raise TableError(
            f"{before} and {after}: expected tables of the same recipe; found {', '.join(old)} and {', '.join(new)}"
        )
    models = usual_models()
    return [compare_tables(old[recipe], new[recipe], min_speedup=min_speedup, models=models) for recipe in common]
