"""Read the tables that are to be compared: two files, or two folders of them.

In: two paths. Out: a `Comparison` for each recipe and casts that both have, with what it means for the bundled models.
Try it: fp8gate diff benchmarks/data/nvidia-h200-second-sweep thresholds/nvidia-h200
"""

from __future__ import annotations

from pathlib import Path

from fp8gate.calibrate.comparison.compare_tables import Comparison, compare_tables
from fp8gate.calibrate.comparison.table_paths import by_variant, read_tables
from fp8gate.calibrate.comparison.usual_models import usual_models
from fp8gate.filter.contract.recipes import SEE_BOTH_CASTS, VARIANTS
from fp8gate.filter.contract.table import TableError


def compare_paths(before: Path, after: Path, *, min_speedup: float) -> list[Comparison]:
    """Compare two files of one recipe and casts, or those of two folders.

    Raises TableError if a table cannot be read, if a folder has two tables of one recipe and casts, or if the two sides
    have none in common.
    """
    old, new = (
        {variant: table for variant, (_, table) in by_variant(read_tables(path)).items()} for path in (before, after)
    )
    common = [variant for variant in VARIANTS if variant in old and variant in new]
    if not common:
        differ_by_casts = {variant.recipe for variant in old} & {variant.recipe for variant in new}
        instead = f". {SEE_BOTH_CASTS}" if differ_by_casts else ""
        raise TableError(
            f"{before} and {after}: expected tables of the same recipe and casts; "
            f"found {', '.join(map(str, old))} and {', '.join(map(str, new))}{instead}"
        )
    models = usual_models()
    return [compare_tables(old[variant], new[variant], min_speedup=min_speedup, models=models) for variant in common]
