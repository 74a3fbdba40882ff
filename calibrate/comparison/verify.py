"""Does a committed table still hold here? Measure a sample of it again and compare.

In: a folder of tables, a device. Out: a `Verification`: what the files say, and a `Comparison` for each recipe if the
tables are of this device.
Try it: fp8gate verify
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fp8gate.calibrate.comparison.compare_tables import Comparison, compare_tables
from fp8gate.calibrate.comparison.table_paths import by_recipe
from fp8gate.calibrate.sweep.run_sweep import make_setup, sweep
from fp8gate.filter.contract.plan import PLANS, read_plan
from fp8gate.filter.contract.recipes import RECIPES, Recipe
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.contract.software_check import stale
from fp8gate.filter.contract.table import WITH_NUMBERS, Grid, Table, TableError, read_table


class UnverifiedError(RuntimeError):
    """The device could not be measured; the tables may hold or not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """files: every table found, and plans: every plan, all of them read without an error. stale: how a table's software
    differs from that here."""

    device: str
    files: tuple[Path, ...]
    plans: tuple[Path, ...]
    comparisons: tuple[Comparison, ...]
    stale: Mapping[Recipe, str]

    @property
    def has_findings(self) -> bool:
        return any(comparison.has_findings for comparison in self.comparisons)


def verify(folder: Path, device: torch.device, *, points: int, min_speedup: float, workers: int | None) -> Verification:
    """Read every table and plan under `folder`; measure `points` of this device's tables again, if there are any.

    Raises TableError for a file that is no table, or if there is none, PlanError for one among the plans that is no
    plan, UnverifiedError if bf16 is not equal to itself here, and what `sweep` raises.
    """
    paths = sorted(folder.rglob("*.yaml"))
    plans = tuple(path for path in paths if path.parent.name == PLANS)
    files = tuple(path for path in paths if path not in plans)
    if not files:
        raise TableError(f"{folder}: expected tables such as nvidia-h200/rowwise.yaml; found none")
    tables = {path: read_table(path) for path in files}
    for path in plans:
        read_plan(path)
    setup = make_setup(device)
    of_device = {path: table for path, table in tables.items() if table.device.name == setup.device.name}
    here = {recipe: table for recipe, (_, table) in by_recipe(of_device).items()}
    if not here:
        return Verification(device=setup.device.name, files=files, plans=plans, comparisons=(), stale={})
    recipes = [recipe for recipe in RECIPES if recipe in here]
    with tempfile.TemporaryDirectory() as out:
        result = sweep(
            Grid(),
            sample(here, points),
            recipes=recipes,
            device=device,
            setup=setup,
            out=Path(out),
            workers=workers,
        )
        again = {table.recipe: table for table in result.tables.values()}
    if not again:
        raise UnverifiedError(f"{setup.device.name}: bf16 against itself was off, so nothing can be verified now")
    comparisons = tuple(compare_tables(here[recipe], again[recipe], min_speedup=min_speedup) for recipe in recipes)
    differences = {recipe: found for recipe in recipes if (found := stale(here[recipe].software))}
    return Verification(device=setup.device.name, files=files, plans=plans, comparisons=comparisons, stale=differences)


def sample(tables: Mapping[Recipe, Table], count: int) -> list[LinearShape]:
    """Shapes that all tables have numbers for, spread evenly over the time that bf16 takes."""
    times_us: dict[LinearShape, float] = {}
    for table in tables.values():
        for point in table.points:
            if point.bf16_fwd_us and point.bf16_bwd_us:
                times_us.setdefault(point.shape, point.bf16_fwd_us + point.bf16_bwd_us)
    known = [{point.shape for point in table.points if point.status in WITH_NUMBERS} for table in tables.values()]
    shapes = sorted(set.intersection(*known), key=lambda shape: (times_us[shape], shape))
    return _evenly(shapes, count)


def _evenly(shapes: Sequence[LinearShape], count: int) -> list[LinearShape]:
    if count >= len(shapes):
        return list(shapes)
    return [shapes[(2 * i + 1) * len(shapes) // (2 * count)] for i in range(count)]
