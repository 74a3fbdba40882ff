"""How far do two sweeps of the same device agree?

The tables of two folders are compared, recipe by recipe, at the shapes that both sweeps measured. The output says how
far the logarithms of the speedups differ (0.01 is 1 %), by the time that bf16 takes, how often a speedup of one sweep
lies within the bounds of the other, and which decisions flip.

Run it: python benchmarks/two_sweeps.py [FIRST SECOND]
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

import numpy as np
from tabulate import tabulate

from fp8gate.filter.contract.recipes import RECIPES
from fp8gate.filter.contract.table import WITH_NUMBERS, Point, read_table
from fp8gate.filter.decision.decide import DEFAULT_MIN_SPEEDUP

ROOT = Path(__file__).parents[1]
BF16_US = (0.0, 30.0, 60.0, 120.0, 300.0, 1000.0, 4000.0, float("inf"))
QUANTILES = (0.5, 0.9, 0.95, 1.0)

Pair = tuple[Point, Point]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", nargs="?", type=Path, default=ROOT / "thresholds" / "nvidia-h200")
    parser.add_argument("second", nargs="?", type=Path, default=ROOT / "benchmarks/data/nvidia-h200-second-sweep")
    parser.add_argument("--min-speedup", type=float, default=DEFAULT_MIN_SPEEDUP, help="convert from this speedup on")
    arguments = parser.parse_args()
    print(compare(arguments.first, arguments.second, arguments.min_speedup))


def compare(first: Path, second: Path, min_speedup: float = DEFAULT_MIN_SPEEDUP) -> str:
    """How far the sweeps agree, by recipe and by bf16 time, then the decisions that flip, as Markdown."""
    by_recipe = {recipe: _pairs(first / f"{recipe}.yaml", second / f"{recipe}.yaml") for recipe in RECIPES}
    everything = [pair for pairs in by_recipe.values() for pair in pairs]
    rows = [_row(recipe, pairs) for recipe, pairs in by_recipe.items()]
    for low, high in itertools.pairwise(BF16_US):
        rows.append(_row(f"bf16 {low:g} to {high:g} us", [p for p in everything if low <= _bf16_us(p[0]) < high]))
    rows.append(_row("all", everything))
    headers = ("", "speedups", "median", "90 %", "95 %", "worst", "within 0.5 %", "within 1 %", "in the other's bounds")
    flips = [
        f"- {recipe} {a.shape}: {a.speedup} and {b.speedup}"
        for recipe, pairs in by_recipe.items()
        for a, b in pairs
        if _converts(a, min_speedup) != _converts(b, min_speedup)
    ]
    table = tabulate(rows, headers=headers, disable_numparse=True, tablefmt="github")
    return "\n".join([table, "", f"{len(flips)} decisions at {min_speedup} flip:", *flips])


def _pairs(first: Path, second: Path) -> list[Pair]:
    """The points that have numbers in both files."""
    a, b = ({p.shape: p for p in read_table(path).points if p.status in WITH_NUMBERS} for path in (first, second))
    return [(a[shape], b[shape]) for shape in sorted(a.keys() & b.keys())]


def _row(name: str, pairs: list[Pair]) -> tuple[str, ...]:
    apart = np.array([abs(np.log(_speedup(b) / _speedup(a))) for a, b in pairs])
    inside = np.mean([(b.speedup_low or 0) <= _speedup(a) <= (b.speedup_high or 0) for a, b in pairs])
    shares = [np.mean(apart <= limit) for limit in (0.005, 0.01)]
    return (
        name,
        str(len(pairs)),
        *(f"{value:.2%}" for value in np.quantile(apart, QUANTILES)),
        *(f"{share:.0%}" for share in shares),
        f"{inside:.0%}",
    )


def _bf16_us(point: Point) -> float:
    return (point.bf16_fwd_us or 0.0) + (point.bf16_bwd_us or 0.0)


def _speedup(point: Point) -> float:
    assert point.speedup, point
    return point.speedup


def _converts(point: Point, min_speedup: float) -> bool:
    return _speedup(point) >= min_speedup


if __name__ == "__main__":
    main()
