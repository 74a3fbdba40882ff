"""The models layer by layer: what the filter answers by default for each, at every number of tokens. Pure.

In: the layers of a model, the tables of one device. Out: a `LayerRow` for each layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fp8gate.calibrate.comparison.usual_models import PlacedLayer
from fp8gate.calibrate.report.colour_scale import ColourScale
from fp8gate.calibrate.report.speedup_map import map_tokens
from fp8gate.filter.contract.recipes import Variant
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.contract.table import Table
from fp8gate.filter.decision.lookup import Lookup
from fp8gate.filter.decision.shared_input import decide_linear, input_kind


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerCell:
    """What the filter answers for a layer at one m: the speedup, its colour on the maps (or None), and the reason."""

    text: str
    colour: str | None
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerRow:
    """The roles of a model that have the same sizes, with a cell for each table and m."""

    roles: str
    k: int
    n: int
    cells: tuple[LayerCell, ...]


def layer_rows(
    layers: Sequence[PlacedLayer],
    tables: Mapping[Variant, Table],
    lookups: Mapping[Variant, Lookup],
    scale: ColourScale,
) -> list[LayerRow]:
    """A row for each layer, with the cells of every table and, for each, of the tokens that have a map."""
    columns = [(lookups[variant], m) for variant, table in tables.items() for m in map_tokens(table)]
    return [
        LayerRow(
            roles=", ".join(layer.roles),
            k=layer.k,
            n=layer.n,
            cells=tuple(_cell(layer.roles, LinearShape(m, layer.k, layer.n), lookup, scale) for lookup, m in columns),
        )
        for layer in layers
    ]


def _cell(roles: Sequence[str], shape: LinearShape, lookup: Lookup, scale: ColourScale) -> LayerCell:
    decisions = {role: decide_linear(input_kind(role), shape, lookup) for role in roles}
    speedup = decisions[roles[0]].speedup
    reason = "; ".join(dict.fromkeys(decision.reason for decision in decisions.values()))
    if speedup is None:
        return LayerCell(text="-", colour=None, reason=reason)
    converted = [role for role, decision in decisions.items() if decision.convert]
    which = "" if len(converted) == len(roles) else f" {', '.join(converted)}"
    text = f"{speedup:.2f}{f' ✓{which}' if converted else ''}"
    return LayerCell(text=text, colour=scale.css_colour(speedup), reason=reason)
