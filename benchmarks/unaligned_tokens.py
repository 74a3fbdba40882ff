"""How far off is a predicted speedup where the tokens are no multiple of 128, and does one factor mend it?

The tables predict the shapes off the grid, as in benchmarks/against_torchao_rule.py. These rows are printed for each
recipe: the shapes whose tokens are a multiple of 128; the others; the others with a factor, which is the median of
measured over predicted speedup of all others but the shape itself, and of those with other tokens only; and the others
with the factor that the table states, if it does (calibrate/grid/unaligned.py).

too high: the median of predicted over measured speedup, minus 1. off by: how far the two are apart, in the median and
leaving out the worst 5 % of the shapes. near: the same for measured speedups from 0.8 to 1.25. right: how many of the
shapes are decided as the measurement says, from 1.0 on.

Run it: python benchmarks/unaligned_tokens.py [--device "NVIDIA H100 80GB HBM3"] [--tables FOLDER]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import msgspec
import numpy as np
from against_torchao_rule import DATA, measured_speedups
from tabulate import tabulate

from fp8gate.calibrate.grid.refinement import HIGHEST, LOWEST
from fp8gate.filter.contract.devices import device_slug
from fp8gate.filter.contract.recipes import RECIPES
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.contract.table import Table
from fp8gate.filter.decision.lookup import Lookup
from fp8gate.filter.locate.find_table import find_table


@dataclass(frozen=True, slots=True)
class Prediction:
    shape: LinearShape
    measured: float
    predicted: float

    @property
    def factor(self) -> float:
        return self.measured / self.predicted

    @property
    def off_by(self) -> float:
        return abs(self.predicted / self.measured - 1)

    @property
    def is_near(self) -> bool:
        return LOWEST <= self.measured <= HIGHEST

    @property
    def is_right(self) -> bool:
        return (self.predicted >= 1) == (self.measured >= 1)

    def times(self, factor: float) -> Prediction:
        return Prediction(self.shape, self.measured, self.predicted * factor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="NVIDIA H100 80GB HBM3", help="a device with tables and off-grid data")
    parser.add_argument("--tables", default=None, help="a folder of tables instead of the packaged ones")
    arguments = parser.parse_args()
    print(compare(arguments.device, arguments.tables))


def compare(device: str, tables: str | None = None) -> str:
    """The rows of every recipe, as a Markdown table."""
    rows: list[tuple[str, ...]] = []
    for recipe in RECIPES:
        table, _ = find_table(recipe, device=device, tables=tables)
        truth = measured_speedups(DATA / device_slug(device) / f"{recipe}.yaml")
        plain = msgspec.structs.replace(table, protocol=msgspec.structs.replace(table.protocol, unaligned=None))
        found = _predict(plain, truth)
        others = [one for one in found if not one.shape.is_aligned]
        rows.append((recipe, "a multiple of 128", *_judge([one for one in found if one.shape.is_aligned])))
        rows.append((recipe, "others", *_judge(others)))
        rows.append((recipe, "others, factor of the others", *_judge(_without_itself(others))))
        rows.append((recipe, "others, factor of other tokens", *_judge(_without_its_tokens(others))))
        if table.protocol.unaligned:
            stated = [one for one in _predict(table, truth) if not one.shape.is_aligned]
            rows.append((recipe, f"others, times {table.protocol.unaligned.factor}", *_judge(stated)))
    headers = ("recipe", "tokens", "shapes", "too high", "off by", "95 %", "near", "off by", "95 %", "right")
    return tabulate(rows, headers=headers, disable_numparse=True, tablefmt="github")


def _predict(table: Table, truth: dict[LinearShape, float]) -> list[Prediction]:
    lookup = Lookup(table)
    found = ((shape, measured, lookup(shape)) for shape, measured in truth.items())
    return [Prediction(shape, measured, estimate.speedup) for shape, measured, estimate in found if estimate]


def _without_itself(predictions: Sequence[Prediction]) -> list[Prediction]:
    return [one.times(median(other.factor for other in predictions if other is not one)) for one in predictions]


def _without_its_tokens(predictions: Sequence[Prediction]) -> list[Prediction]:
    return [
        one.times(median(other.factor for other in predictions if other.shape.m != one.shape.m)) for one in predictions
    ]


def _judge(predictions: Sequence[Prediction]) -> tuple[str, ...]:
    near = [one for one in predictions if one.is_near]
    return (
        str(len(predictions)),
        f"{1 / median(one.factor for one in predictions) - 1:.1%}",
        *_off_by(predictions),
        str(len(near)),
        *_off_by(near),
        f"{sum(one.is_right for one in predictions)} of {len(predictions)}",
    )


def _off_by(predictions: Sequence[Prediction]) -> tuple[str, str]:
    middle, most = np.quantile([one.off_by for one in predictions], (0.5, 0.95))
    return f"{middle:.1%}", f"{most:.1%}"


if __name__ == "__main__":
    main()
