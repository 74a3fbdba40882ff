"""Does a committed table still hold here? Measure a sample of its points again and compare.

In: a folder of tables, a device. Out: a `Verification`: which files were read, and a `Comparison` for each
table of this device.
Try it: fp8gate verify
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from fp8gate.calibrate.comparison.compare_tables import Comparison, compare_tables
from fp8gate.calibrate.comparison.table_paths import by_variant, incomplete_of, read_all
from fp8gate.calibrate.points.noise import TOO_MANY
from fp8gate.calibrate.points.setup import make_setup
from fp8gate.calibrate.processes.run_folder import run_folder
from fp8gate.calibrate.sweep.run_sweep import sweep
from fp8gate.filter.contract.errors import UnfinishedError
from fp8gate.filter.contract.plans.plan_file import Plans
from fp8gate.filter.contract.recipes import Casts, Variant
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.contract.software_check import stale
from fp8gate.filter.contract.table import WITH_NUMBERS, Grid, Incomplete, Table


class UnverifiedError(UnfinishedError):
    """The device could not be measured, so nobody knows whether the tables hold."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """files, plans: every table and every model's plans that were found; all of them could be read.

    comparisons: empty if no table is of this device. stale: how the software of a table differs from the software here.
    compared: the file of each table that was compared. incomplete: how far the sweep of a table came that was stopped.
    """

    device: str
    files: tuple[Path, ...]
    plans: Mapping[Path, Plans]
    comparisons: tuple[Comparison, ...]
    stale: Mapping[Variant, str]
    compared: Mapping[Variant, Path]
    incomplete: Mapping[Path, Incomplete]

    @property
    def contradicted(self) -> dict[Variant, Path]:
        """The tables that do not hold here."""
        return {one.variant: self.compared[one.variant] for one in self.comparisons if one.has_findings}

    @property
    def has_findings(self) -> bool:
        return any(comparison.has_findings for comparison in self.comparisons)

    @property
    def has_more(self) -> bool:
        """Whether the tables have points that were not measured again."""
        return any(comparison.only_before for comparison in self.comparisons)

    @property
    def can_tell(self) -> bool:
        """Whether the absence of findings says that the tables hold. True if there was nothing to compare."""
        return all(comparison.can_tell for comparison in self.comparisons)


def verify(folder: Path, device: torch.device, *, points: int, min_speedup: float, workers: int | None) -> Verification:
    """Read every table and plan under `folder`, or the file. If tables are of this device, measure `points` again.

    Points that are noise now are left out. Raises TableError for a file that is no table, or if there is no file,
    PlanError for a file among the plans that is no plan, UnverifiedError if too many points are noise now or bf16
    timed against itself is off here, and what `sweep` raises.
    """
    tables, plans = read_all(folder)
    setup = make_setup(device)
    of_device = {path: table for path, table in tables.items() if table.device.name == setup.device.name}
    files = by_variant(of_device)
    here = {variant: table for variant, (_, table) in files.items()}
    again: dict[Variant, Table] = {}
    for casts in dict.fromkeys(variant.casts for variant in here):
        of_casts = {variant: table for variant, table in here.items() if variant.casts == casts}
        again |= _measure_again(of_casts, points, device, casts, workers)
    return Verification(
        device=setup.device.name,
        files=tuple(tables),
        plans=plans,
        comparisons=tuple(compare_tables(here[one], again[one], min_speedup=min_speedup) for one in here),
        stale={variant: found for variant, table in here.items() if (found := stale(table.software))},
        compared={variant: path for variant, (path, _) in files.items()},
        incomplete=incomplete_of(tables),
    )


def _measure_again(
    tables: Mapping[Variant, Table], points: int, device: torch.device, casts: Casts, workers: int | None
) -> dict[Variant, Table]:
    """New tables of the same recipes and casts, with those of a sample of the points that are not noise."""
    setup = make_setup(device, casts)
    with tempfile.TemporaryDirectory(dir=run_folder()) as out:
        result = sweep(
            Grid(),
            sample(tables, points),
            recipes=[variant.recipe for variant in tables],
            device=device,
            setup=setup,
            out=Path(out),
            writes_incomplete=False,
            workers=workers,
        )
    if not result.tables:
        raise UnverifiedError(f"{setup.device.name}: bf16 against itself was off, so nothing can be verified now")
    again = [point for table in result.tables.values() for point in table.points]
    noisy = sum(point.status == "noisy" for point in again)
    if noisy > TOO_MANY * len(again):
        where, why = next(iter(result.report.noise.items()))
        raise UnverifiedError(
            f"{noisy} of {len(again)} speedups measured now are noise (of {where}, {why}), so nothing can be verified: "
            "run fp8gate verify again when nothing else runs here"
        )
    return {table.variant: _without_noise(table) for table in result.tables.values()}


def _without_noise(table: Table) -> Table:
    return msgspec.structs.replace(table, points=tuple(p for p in table.points if p.status != "noisy"))


def sample(tables: Mapping[Variant, Table], count: int) -> list[LinearShape]:
    """Shapes for which all tables have numbers, spread evenly over the time that bf16 takes."""
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
