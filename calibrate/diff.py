"""Read what is to be compared: two tables, or two folders of them.

In: two paths. Out: a `Comparison` for each recipe that both have, with what it means for the bundled models.
Try it: fp8gate diff benchmarks/data/nvidia-h200-second-sweep thresholds/nvidia-h200
"""

from __future__ import annotations

from pathlib import Path

from fp8gate.calibrate.compare import Comparison, compare_tables
from fp8gate.filter.models import BUNDLED, ModelConfig
from fp8gate.filter.parallel import Parallel, Shards
from fp8gate.filter.table import RECIPES, Recipe, Table, TableError, read_table

MODEL_TOKENS = 8192
MODEL_TP = {"llama3-8b": 1, "qwen3-8b": 1, "mixtral-8x7b": 1, "llama3-70b": 8, "llama3-405b": 8}
"""Each model as it is usually trained; a test holds that none is missing."""


def compare_paths(before: Path, after: Path, *, min_speedup: float) -> list[Comparison]:
    """Compare files of one recipe, or folders recipe by recipe.

    Raises TableError if a table cannot be read, or if the two have no recipe in common.
    """
    one, other = _tables(before), _tables(after)
    common = [recipe for recipe in RECIPES if recipe in one and recipe in other]
    if not common:
        raise TableError(
            f"{before} and {after}: expected tables of the same recipe; found {', '.join(one)} and {', '.join(other)}"
        )
    models = usual_models()
    return [compare_tables(one[recipe], other[recipe], min_speedup=min_speedup, models=models) for recipe in common]


def usual_models() -> list[tuple[str, ModelConfig, Shards]]:
    """The bundled models as a rank holds them, named with what is not the default."""
    models = []
    for name, tp in MODEL_TP.items():
        shards = Shards(Parallel(tp=tp, plan="transformers"), MODEL_TOKENS)
        models.append((name if tp == 1 else f"{name}, TP {tp}", BUNDLED[name], shards))
    return models


def _tables(path: Path) -> dict[Recipe, Table]:
    """A file's table, or a folder's by recipe. Raises TableError if there is none."""
    files = [path] if path.is_file() else sorted(path.glob("*.yaml"))
    tables = {table.recipe: table for table in map(read_table, files)}
    if not tables:
        raise TableError(f"{path}: expected a table, or a folder of tables such as thresholds/nvidia-h200; found none")
    return tables
