"""The models layer by layer: what the filter answers by default for each, at every number of tokens. Pure.

In: the layers of a model, the tables of one device. Out: a `LayerRow` for each layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fp8gate.calibrate.comparison.usual_models import PlacedLayer
from fp8gate.calibrate.report.colour_scale import ColourScale
from fp8gate.calibrate.report.speedup_map import map_tokens
from fp8gate.filter.contract.recipes import Recipe
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.contract.table import Table
from fp8gate.filter.decision.decide import DEFAULT_MIN_SPEEDUP, decide
from fp8gate.filter.decision.lookup import Lookup


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerCell:
    """What the filter answers for a layer at one m: the speedup, its colour on the maps (or None), and the reason."""

    text: str
    colour: str | None
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerRow:
    """The roles of a model that have the same sizes, with a cell for each recipe and m."""

    roles: str
    k: int
    n: int
    cells: tuple[LayerCell, ...]


def layer_rows(
    layers: Sequence[PlacedLayer], tables: Mapping[Recipe, Table], lookups: Mapping[Recipe, Lookup], scale: ColourScale
) -> list[LayerRow]:
    """A row for each layer, with the cells of every recipe and, for each, of the tokens that have a map."""
    columns = [(lookups[recipe], m) for recipe, table in tables.items() for m in map_tokens(table)]
    return [
        LayerRow(
            roles=", ".join(layer.roles),
            k=layer.k,
            n=layer.n,
            cells=tuple(_cell(LinearShape(m, layer.k, layer.n), lookup, scale) for lookup, m in columns),
        )
        for layer in layers
    ]


def _cell(shape: LinearShape, lookup: Lookup, scale: ColourScale) -> LayerCell:
    decision = decide(shape, lookup, min_speedup=DEFAULT_MIN_SPEEDUP)
    if decision.speedup is None:
        return LayerCell(text="-", colour=None, reason=decision.reason)
    text = f"{decision.speedup:.2f}{' ✓' if decision.convert else ''}"
    return LayerCell(text=text, colour=scale.css_colour(decision.speedup), reason=decision.reason)
