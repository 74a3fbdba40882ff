"""How far do two sweeps of the same device agree?

The tables of two folders are compared, recipe by recipe, at the shapes that both sweeps measured. The output says how
far the logarithms of the speedups differ (0.01 is 1 %), by the time that bf16 takes, how often a speedup of one sweep
lies within the bounds of the other, and which decisions flip.

A second table has the coverage, for each recipe and class of bf16 time: the share of one sweep's speedups that lie
within the other's bounds, both ways, and the median half width of the bounds. First come the bounds that the tables
state, then a simulation of what `calibrate` does now: it takes some points of the other sweep as repeats, computes the
bounds from them, adds what boards of the kind differ by, and judges the points that are left. Its shares are means over
many draws of repeats; the next column is the share of draws that cover 95 % of the points or more. These repeats are of
the other sweep's board, so what the boards differ by goes into `between` too, as it does not in a sweep.

Run it: python benchmarks/two_sweeps.py [FIRST SECOND]
"""

from __future__ import annotations

import argparse
import itertools
import random
from pathlib import Path

import numpy as np
from tabulate import tabulate

from fp8gate.calibrate.device.registry import KINDS
from fp8gate.calibrate.points.bounds import RepeatedPoint, half_widths, narrowed, run_bounds, widened
from fp8gate.calibrate.timing.statistics import Interval
from fp8gate.filter.contract.bounds import COVERAGE, SMALL_US, Bounds, is_small
from fp8gate.filter.contract.recipes import RECIPES
from fp8gate.filter.contract.table import WITH_NUMBERS, Point, SweepProtocol, read_table
from fp8gate.filter.decision.decide import DEFAULT_MIN_SPEEDUP

ROOT = Path(__file__).parents[1]
FIRST, SECOND = ROOT / "thresholds" / "nvidia-h200", ROOT / "benchmarks/data/nvidia-h200-second-sweep"
BF16_US = (0.0, 30.0, 60.0, 120.0, 300.0, 1000.0, 4000.0, float("inf"))
QUANTILES = (0.5, 0.9, 0.95, 1.0)
REPEATS = 40  # of a class, as on the default grid of a GPU
DRAWS = 200

Pair = tuple[Point, Point]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", nargs="?", type=Path, default=FIRST)
    parser.add_argument("second", nargs="?", type=Path, default=SECOND)
    parser.add_argument("--min-speedup", type=float, default=DEFAULT_MIN_SPEEDUP, help="convert from this speedup on")
    arguments = parser.parse_args()
    print(compare(arguments.first, arguments.second, arguments.min_speedup))
    print()
    print(coverage(arguments.first, arguments.second))


def compare(first: Path, second: Path, min_speedup: float = DEFAULT_MIN_SPEEDUP) -> str:
    """How far the sweeps agree, by recipe and by bf16 time, then the decisions that flip, as Markdown."""
    by_recipe = {recipe: _pairs(first / f"{recipe}.yaml", second / f"{recipe}.yaml") for recipe in RECIPES}
    everything = [pair for pairs in by_recipe.values() for pair in pairs]
    rows = [_row(recipe, pairs) for recipe, pairs in by_recipe.items()]
    for low, high in itertools.pairwise(BF16_US):
        rows.append(_row(f"bf16 {low:g} to {high:g} us", [p for p in everything if low <= p[0].total_us[0] < high]))
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


def coverage(first: Path, second: Path) -> str:
    """How much of either sweep the bounds of the other cover, by recipe and class, as Markdown."""
    rows = []
    for recipe in RECIPES:
        files = first / f"{recipe}.yaml", second / f"{recipe}.yaml"
        pairs = _pairs(*files)
        tables = [read_table(file) for file in files]
        board_us = KINDS[tables[0].device.kind].defaults.noise.board_us
        for small, name in ((True, f"below {SMALL_US:g} us"), (False, f"from {SMALL_US:g} us")):
            of_class = [pair for pair in pairs if is_small(pair[0].total_us[0]) is small]
            stated = [[(_bounds(pair[i]), _speedup(pair[1 - i])) for pair in of_class] for i in (0, 1)]
            runs = [[_one_run(pair[i], tables[i].protocol) for pair in of_class] for i in (0, 1)]
            boards = [
                [Bounds(board_us=board_us).between_boards(*pair[i].total_us) for pair in of_class] for i in (0, 1)
            ]
            simulated = [_simulated(runs[i], runs[1 - i], boards[i]) for i in (0, 1)]
            rows.append(
                (
                    recipe,
                    name,
                    str(len(of_class)),
                    ", ".join(f"{_covered(way):.0%}" for way in stated),
                    ", ".join(f"{_median_half([bounds for bounds, _ in way]):.1%}" for way in stated),
                    ", ".join(f"{share:.1%}" for share, _, _ in simulated),
                    ", ".join(f"{enough:.0%}" for _, enough, _ in simulated),
                    ", ".join(f"{half:.1%}" for _, _, half in simulated),
                )
            )
    headers = (
        "recipe",
        "bf16",
        "points",
        "stated: cover",
        "half width",
        f"{REPEATS} repeats: cover",
        f"cover {COVERAGE:.0%}",
        "half width",
    )
    return tabulate(rows, headers=headers, disable_numparse=True, tablefmt="github")


def _simulated(
    stated: list[Interval], other: list[Interval], boards: list[tuple[float, float]]
) -> tuple[float, float, float]:
    """The mean share of points within, the share of draws in which 95 % are, and the mean of the median half widths.

    stated: what varies within one run. boards: the half widths of what boards differ by, at the same points.
    """
    count = min(REPEATS, len(stated) // 3)
    shares, halves = [], []
    for seed in range(DRAWS):
        repeated = set(random.Random(seed).sample(range(len(stated)), count))
        repeats = [RepeatedPoint(stated[i], other[i].estimate) for i in sorted(repeated)]
        between = run_bounds(repeats, stated, known=0.0).between
        judged = [
            (widened(widened(stated[i], (between, between)), boards[i]), other[i].estimate)
            for i in range(len(stated))
            if i not in repeated
        ]
        shares.append(_covered(judged))
        halves.append(_median_half([bounds for bounds, _ in judged]))
    return float(np.mean(shares)), float(np.mean(np.array(shares) >= COVERAGE)), float(np.mean(halves))


def _covered(judged: list[tuple[Interval, float]]) -> float:
    return float(np.mean([bounds.low <= speedup <= bounds.high for bounds, speedup in judged]))


def _median_half(bounds: list[Interval]) -> float:
    return float(np.median([sum(half_widths(one)) / 2 for one in bounds]))


def _bounds(point: Point) -> Interval:
    assert point.speedup_low, point
    assert point.speedup_high, point
    return Interval(_speedup(point), point.speedup_low, point.speedup_high)


def _one_run(point: Point, protocol: SweepProtocol) -> Interval:
    """The bounds of what varies within one run."""
    return narrowed(_bounds(point), (protocol.bounds or Bounds()).between_runs(*point.total_us))


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


def _speedup(point: Point) -> float:
    assert point.speedup, point
    return point.speedup


def _converts(point: Point, min_speedup: float) -> bool:
    return _speedup(point) >= min_speedup


if __name__ == "__main__":
    main()
