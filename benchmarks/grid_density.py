"""How dense must the grid be, and which lookup reads it better?

The committed tables are thinned: every other size of some axes, or to the points that a refined sweep measures
(calibrate/grid/refinement.py). Each thinned table decides the shapes off the grid, once by its nearest point and once
by interpolation. The shapes are those of benchmarks/against_torchao_rule.py, which says what right and loss mean.

off by: how far the speedup that the lookup predicts is at most from the measured one, leaving out the worst 5 % of the
shapes.
aligned: the same for the shapes whose tokens are a multiple of 128.

Run it: python benchmarks/grid_density.py [--device "NVIDIA H200"]
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence

import msgspec
import numpy as np
from against_torchao_rule import DATA, measured_speedups, score
from tabulate import tabulate

from fp8gate.calibrate.grid.refinement import Refinement
from fp8gate.filter.contract.devices import device_slug
from fp8gate.filter.contract.recipes import RECIPES, Recipe
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.contract.table import Grid, Table
from fp8gate.filter.decision.decide import DEFAULT_MIN_SPEEDUP, decide
from fp8gate.filter.decision.lookup import LOOKUPS, Lookup, LookupName
from fp8gate.filter.locate.find_table import find_table

THINNED = {"all": "", "half of M": "m", "half of K": "k", "half of N": "n", "half of M, K and N": "mkn"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="NVIDIA H200", help="a device with tables and off-grid data")
    print(compare(parser.parse_args().device))


def compare(device: str) -> str:
    """A row for every recipe, thinned grid and lookup, as a Markdown table."""
    rows, refined = [], _refined([find_table(recipe, device=device, tables=None)[0] for recipe in RECIPES])
    for recipe in RECIPES:
        truth = measured_speedups(DATA / device_slug(device) / f"{recipe}.yaml")
        table, _ = find_table(recipe, device=device, tables=None)
        thinned = {name: _thin(table, axes) for name, axes in THINNED.items()}
        thinned["refined"] = msgspec.structs.replace(table, points=tuple(p for p in table.points if p.shape in refined))
        for name, thin in thinned.items():
            for lookup in LOOKUPS:
                rows.append((recipe, name, lookup, *_judge(thin, lookup, truth)))
    headers = ("recipe", "grid", "lookup", "points", "right", "mean loss", "worst loss", "off by", "aligned")
    return tabulate(rows, headers=headers, disable_numparse=True, tablefmt="github")


def _judge(table: Table, kind: LookupName, truth: dict[LinearShape, float]) -> tuple[str, ...]:
    lookup = Lookup(table, kind)
    decisions = {shape: decide(shape, lookup, min_speedup=DEFAULT_MIN_SPEEDUP) for shape in truth}
    right, mean_loss, worst_loss, _ = score(lambda shape: decisions[shape].convert, truth)
    off_by = {shape: abs((decisions[shape].speedup or 0.0) / speedup - 1) for shape, speedup in truth.items()}
    aligned = [off_by[shape] for shape in truth if shape.is_aligned]
    return str(len(table.points)), right, mean_loss, worst_loss, _p95(off_by.values()), _p95(aligned)


def _thin(table: Table, axes: str) -> Table:
    """The table with every other size of these axes, beginning with the smallest."""
    sizes = {axis: getattr(table.grid, axis)[:: 2 if axis in axes else 1] for axis in ("m", "k", "n")}
    points = tuple(p for p in table.points if p.m in sizes["m"] and p.k in sizes["k"] and p.n in sizes["n"])
    return msgspec.structs.replace(table, grid=Grid(**sizes), points=points)


def _refined(tables: Sequence[Table]) -> set[LinearShape]:
    """The points that a refined sweep would have measured."""
    speedups: dict[LinearShape, dict[Recipe, float]] = {}
    for table in tables:
        for point in table.points:
            speedups.setdefault(point.shape, {}).update({table.recipe: point.speedup} if point.speedup else {})
    refinement = Refinement(tables[0].grid, list(speedups))
    return {*refinement.first, *refinement.due(speedups)}


def _p95(values: Iterable[float]) -> str:
    return f"{np.quantile(list(values), 0.95):.1%}"


if __name__ == "__main__":
    main()
