"""Which rule decides better: torchao's fixed one, or the measured tables?

Both are judged by shapes of real models that neither was fitted to. These shapes were measured apart from the tables
(benchmarks/data/<device>/<recipe>.yaml, made with benchmarks/data/offgrid.yaml). torchao's rule is torchao's own
function `_auto_filter_for_recipe`, called on real `nn.Linear` layers. The tables are asked through `auto_filter`.

right: the share of shapes that are decided as the measurement says, among those whose speedup is more than 2 % away
from 1.0.
loss: the time of the choice over the time of the better of bf16 and float8, minus 1, over all shapes.

Run it: python benchmarks/against_torchao_rule.py [--device "NVIDIA H200"]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from tabulate import tabulate
from torch import nn
from torchao.float8.float8_linear_utils import _auto_filter_for_recipe

from fp8gate import AutoFilter, auto_filter, read_table
from fp8gate.filter.contract.devices import device_slug
from fp8gate.filter.contract.recipes import RECIPES, Recipe
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.contract.table import WITH_NUMBERS
from fp8gate.filter.decision.decide import DEFAULT_MIN_SPEEDUP
from fp8gate.filter.decision.lookup import LOOKUPS, LookupName

DATA = Path(__file__).parent / "data"
NEUTRAL = 0.02  # a speedup within this of 1.0 has no wrong answer

Choice = Callable[[LinearShape], bool]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="NVIDIA H200", help="a device with tables and off-grid data")
    parser.add_argument("--tables", default=None, help="a folder of tables instead of the packaged ones")
    parser.add_argument("--min-speedup", type=float, default=DEFAULT_MIN_SPEEDUP, help="convert from this speedup on")
    arguments = parser.parse_args()
    print(compare(arguments.device, arguments.tables, arguments.min_speedup))


def compare(device: str, tables: str | None = None, min_speedup: float = DEFAULT_MIN_SPEEDUP) -> str:
    """The scores of every rule for every recipe, as a Markdown table."""
    rows = []
    for recipe in RECIPES:
        truth = measured_speedups(DATA / device_slug(device) / f"{recipe}.yaml")
        for name, choose in choices(recipe, device, tables, min_speedup):
            rows.append((recipe, name, *score(choose, truth)))
    headers = ("recipe", "decided by", "right", "mean loss", "worst loss", "worst shape (m, k, n)")
    return tabulate(rows, headers=headers, disable_numparse=True, tablefmt="github")


def measured_speedups(path: Path) -> dict[LinearShape, float]:
    """The speedup that was measured at each shape off the grid."""
    return {p.shape: p.speedup for p in read_table(path).points if p.status in WITH_NUMBERS and p.speedup}


def choices(recipe: Recipe, device: str, tables: str | None, min_speedup: float) -> list[tuple[str, Choice]]:
    """Everything that can decide for a recipe. torchao's rule is left out where torchao has none."""
    rules: list[tuple[str, Choice]] = [
        ("never float8", lambda shape: False),
        ("always float8", lambda shape: True),
    ]
    try:
        rule = _auto_filter_for_recipe(recipe, filter_fqns=[])
        rules.append(("torchao's rule", lambda shape: rule(_linear(shape), "layer")))
    except NotImplementedError:
        pass
    for lookup in LOOKUPS:
        rules.append((f"fp8gate, {lookup}", table_choice(recipe, device, tables, lookup, min_speedup)))
    return rules


def table_choice(recipe: Recipe, device: str, tables: str | None, lookup: LookupName, min_speedup: float) -> Choice:
    @cache
    def filter_for(tokens: int) -> AutoFilter:
        return auto_filter(
            recipe,
            tokens=tokens,
            device=device,
            tables=tables,
            lookup=lookup,
            min_speedup=min_speedup,
            on_outside="ignore",
            on_ambiguous="ignore",
        )

    return lambda shape: filter_for(shape.m)(_linear(shape), "layer")


def score(choose: Choice, truth: dict[LinearShape, float]) -> tuple[str, str, str, str]:
    """The share of right decisions, the mean loss, the worst loss, and the shape that has it."""
    chosen = {shape: choose(shape) for shape in truth}
    clear = [shape for shape, speedup in truth.items() if abs(speedup - 1) > NEUTRAL]
    right = sum(chosen[shape] == (truth[shape] > 1) for shape in clear) / len(clear)
    losses = {shape: loss(chosen[shape], speedup) for shape, speedup in truth.items()}
    worst = max(losses, key=lambda shape: losses[shape])
    where = str(worst) if losses[worst] > 0 else ""
    return f"{right:.0%} of {len(clear)}", f"{statistics.mean(losses.values()):.2%}", f"{losses[worst]:.1%}", where


def loss(converted: bool, speedup: float) -> float:
    """The time of the choice over that of the better one, minus 1. bf16 takes 1, float8 takes 1 / speedup."""
    time = 1 / speedup if converted else 1.0
    return time / min(1.0, 1 / speedup) - 1


def _linear(shape: LinearShape) -> nn.Linear:
    with torch.device("meta"):
        return nn.Linear(shape.k, shape.n, bias=False)


if __name__ == "__main__":
    main()
