"""Tables as a page for people: maps of the speedups, the models' layers, provenance, and how far to trust the numbers.

In: table files or folders. Out: a folder with index.html, which needs nothing else, and its pictures.
Try it: fp8gate report thresholds/nvidia-h200 --out report
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import msgspec

from fp8gate.calibrate.comparison.table_paths import by_recipe, read_tables
from fp8gate.calibrate.comparison.usual_models import MODEL_TOKENS, PlacedLayer, placed_models
from fp8gate.calibrate.report.map_figures import NO_RULE, Maps, draw_numbers, draw_side_by_side
from fp8gate.calibrate.report.map_panel import LayerGroup, colour_of
from fp8gate.calibrate.report.speedup_map import CAPPED, UNMEASURED, map_tokens, speedup_maps, without_row
from fp8gate.filter.contract.devices import device_slug
from fp8gate.filter.contract.recipes import RECIPES, Recipe
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.contract.table import WITH_NUMBERS, Spread, Table, format_table
from fp8gate.filter.decision.decide import DEFAULT_MIN_SPEEDUP, decide
from fp8gate.filter.decision.lookup import Lookup

PAGE, TEMPLATE = "index.html", "page.html.jinja"
OVERVIEW_MODELS = ("llama3-8b", "llama3-70b, TP 8")  # one whole and one divided: the names of more would not fit

TablesByRecipe = Mapping[Recipe, tuple[Path, Table]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """A picture in every theme. name: the name of its files, without theme and suffix. png: the bytes by theme."""

    name: str
    heading: str
    alt: str
    png: dict[str, bytes]

    def file(self, theme: str) -> str:
        return f"{self.name}-{theme}.png"

    def data_uri(self, theme: str) -> str:
        return f"data:image/png;base64,{base64.b64encode(self.png[theme]).decode()}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """What the filter answers by default for a layer at one m: the speedup, its colour on the maps, and the reason."""

    text: str
    colour: str
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerRow:
    """The roles of a model that have the same sizes, with a cell for each recipe and m."""

    roles: str
    k: int
    n: int
    cells: tuple[Cell, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceSection:
    """Everything about one device."""

    name: str
    pictures: tuple[Picture, ...]
    quality: dict[Recipe, dict[str, str]]
    provenance: dict[str, tuple[str, ...]]
    tokens: dict[Recipe, tuple[int, ...]]
    models: dict[str, list[LayerRow]]


def write_report(paths: Iterable[Path], out: Path) -> list[Path]:
    """Write the page and its pictures. Returns the files, the page first.

    Raises TableError for a table that cannot be read or drawn, or for two tables of one device and recipe, and OSError
    if `out` cannot be written.
    """
    devices = by_device(paths)
    out.mkdir(parents=True, exist_ok=True)
    sections = [_section(device, tables) for device, tables in devices.items()]
    files = {out / PAGE: _page(sections).encode()}
    for picture in (picture for section in sections for picture in section.pictures):
        files |= {out / picture.file(theme): png for theme, png in picture.png.items()}
    for path, content in files.items():
        path.write_bytes(content)
    return list(files)


def by_device(paths: Iterable[Path]) -> dict[str, TablesByRecipe]:
    """The tables of each device, in the order of the recipes. Raises TableError for two of one device and recipe."""
    found: dict[str, dict[Path, Table]] = {}
    for file, table in ((file, table) for path in paths for file, table in read_tables(path).items()):
        found.setdefault(table.device.name, {})[file] = table
    return {device: by_recipe(files) for device, files in found.items()}


def tables_hash(tables: Iterable[Table]) -> str:
    """SHA-256 of the tables' text. A picture carries it, so that a test can tell whether the tables have changed."""
    texts = sorted(format_table(table) for table in tables)
    return hashlib.sha256("".join(texts).encode()).hexdigest()


def _section(device: str, files: TablesByRecipe) -> DeviceSection:
    tables = {recipe: table for recipe, (_, table) in files.items()}
    return DeviceSection(
        name=device,
        pictures=tuple(_pictures(device, tables)),
        quality={recipe: quality(table) for recipe, table in tables.items()},
        provenance=_provenance(files),
        tokens={recipe: map_tokens(table) for recipe, table in tables.items()},
        models={model: _layer_rows(layers, tables) for model, layers in placed_models().items()},
    )


def _pictures(device: str, tables: Mapping[Recipe, Table]) -> Iterable[Picture]:
    maps = {recipe: speedup_maps(table) for recipe, table in tables.items()}
    tokens = sorted({m for by_m in maps.values() for m in by_m})
    usual = min(tokens, key=lambda m: abs(math.log2(m / MODEL_TOKENS)))
    slug, source = device_slug(device), tables_hash(tables.values())
    names = ", ".join(tables)
    title = f"{device}: where float8 trains a linear faster than bf16 (blue), and where not (red)"
    yield Picture(
        name=f"{slug}-overview",
        heading=f"{usual} tokens, recipes side by side",
        alt=f"Maps of the float8 speedup over k and n on {device} at {usual} tokens for {names}, with the break-even "
        f"line, the line of torchao's rule, and the layers of {' and '.join(OVERVIEW_MODELS)}",
        png=draw_side_by_side(title, maps, [usual], _named_groups(), source),
    )
    yield Picture(
        name=f"{slug}-tokens",
        heading="All tokens, recipes side by side",
        alt=f"The same maps for {', '.join(map(str, tokens))} tokens, with the layers of all bundled models",
        png=draw_side_by_side(title, maps, tokens, _all_groups(), source),
    )
    yield from (_numbers_picture(device, recipe, maps, source) for recipe in tables)


def _numbers_picture(device: str, recipe: Recipe, maps: Maps, source: str) -> Picture:
    has_rule = all(map_.torchao is not None for map_ in maps[recipe].values())
    title = f"{device}, {recipe}: speedup at every point measured{'' if has_rule else f'; {NO_RULE}'}"
    return Picture(
        name=f"{device_slug(device)}-{recipe}",
        heading=f"{recipe}: every point",
        alt=f"The measured speedup of {recipe} on {device} at every k and n, a map for each number of tokens",
        png=draw_numbers(title, maps[recipe], source),
    )


def _named_groups() -> list[LayerGroup]:
    models = placed_models()
    return [LayerGroup(name=model, layers=models[model], named=True) for model in OVERVIEW_MODELS]


def _all_groups() -> list[LayerGroup]:
    layers = [layer for of_model in placed_models().values() for layer in of_model]
    whole, divided = ([layer for layer in layers if (layer.tp > 1) == split] for split in (False, True))
    return [
        LayerGroup(name="layers of the bundled models", layers=whole, named=False),
        LayerGroup(name="divided by TP 8", layers=divided, named=False),
    ]


def quality(table: Table) -> dict[str, str]:
    """How far the numbers can be trusted, as the table states it."""
    statuses = Counter(point.status for point in table.points)
    missing = [f"{count} {status}" for status, count in sorted(statuses.items()) if status not in WITH_NUMBERS]
    on_maps = set(map_tokens(table))
    holes = Counter(why for m in on_maps for why in without_row(table, m).values())
    protocol = table.protocol
    return {
        "points": str(len(table.points)),
        "ambiguous (?): its own run could not tell it from 1.0": str(statuses["ambiguous"]),
        "within the spread (95th percentile) of 1.0: another sweep may differ": _count_near(table),
        "without a number (oom, unst, fail)": ", ".join(missing) or "0",
        "left out as too large (cap), not asked for (-)": f"{holes[CAPPED]}, {holes[UNMEASURED]}",
        "on no map: their tokens are not the grid's": str(sum(point.m not in on_maps for point in table.points)),
        "again by another process": _spread(protocol.spread),
        "on several devices": _spread(protocol.between) if protocol.devices > 1 else "one device",
        "bf16 against itself": f"{_spread(protocol.controls)}; measured again beyond {protocol.control:.1%} and chance",
    }


def _count_near(table: Table) -> str:
    spread = table.protocol.spread
    if spread is None:
        return "not known"
    return str(sum(point.speedup is not None and abs(point.speedup - 1) <= spread.p95 for point in table.points))


def _spread(spread: Spread | None) -> str:
    if spread is None:
        return "not measured"
    return (
        f"{spread.points} points, {spread.median:.1%} apart (median), {spread.p95:.1%} (95th percentile), "
        f"{spread.worst:.1%} (worst)"
    )


def _provenance(files: TablesByRecipe) -> dict[str, tuple[str, ...]]:
    """For each field, its value in the table of each recipe, or a single value if all tables have the same."""
    facts = [_facts(path, table) for path, table in files.values()]
    values = {name: tuple(fact.get(name, "") for fact in facts) for name in dict.fromkeys(n for f in facts for n in f)}
    return {name: each[:1] if len(set(each)) == 1 else each for name, each in values.items()}


def _facts(path: Path, table: Table) -> dict[str, str]:
    facts = {"file": path.name, "measured at": f"{table.measured_at:%Y-%m-%d %H:%M %Z}"}
    for part in (table.device, table.software, table.protocol):
        fields: dict[str, Any] = msgspec.to_builtins(part)
        facts |= {name: str(value) for name, value in fields.items() if name not in ("spread", "controls", "between")}
    return facts


def _layer_rows(layers: Sequence[PlacedLayer], tables: Mapping[Recipe, Table]) -> list[LayerRow]:
    lookups = [(Lookup(table), m) for table in tables.values() for m in map_tokens(table)]
    return [
        LayerRow(
            roles=", ".join(layer.roles),
            k=layer.k,
            n=layer.n,
            cells=tuple(_cell(LinearShape(m, layer.k, layer.n), lookup) for lookup, m in lookups),
        )
        for layer in layers
    ]


def _cell(shape: LinearShape, lookup: Lookup) -> Cell:
    decision = decide(shape, lookup, min_speedup=DEFAULT_MIN_SPEEDUP)
    if decision.speedup is None:
        return Cell(text="-", colour="#ffffff", reason=decision.reason)
    red, green, blue = (round(255 * part) for part in colour_of(decision.speedup))
    text = f"{decision.speedup:.2f}{' ✓' if decision.convert else ''}"
    return Cell(text=text, colour=f"rgb({red}, {green}, {blue})", reason=decision.reason)


def _page(sections: Sequence[DeviceSection]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fp8gate.calibrate.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    without_rule = [recipe for recipe, facts in RECIPES.items() if facts.torchao_skips is None]
    return environment.get_template(TEMPLATE).render(
        sections=sections, min_speedup=DEFAULT_MIN_SPEEDUP, without_rule=without_rule
    )
