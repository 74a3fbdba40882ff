"""Write the page: index.html, which needs nothing else, and its pictures as files.

In: table files or folders. Out: a folder.
Try it: fp8gate report thresholds/nvidia-h200 --out report
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from fp8gate.calibrate.comparison.usual_models import placed_models
from fp8gate.calibrate.report.colour_scale import USUAL_LIMIT, colour_scale
from fp8gate.calibrate.report.page.layer_rows import LayerRow, layer_rows
from fp8gate.calibrate.report.page.number_tables import NumberTable, number_table
from fp8gate.calibrate.report.page.pictures import DevicePictures, Picture, tables_hash, usual_tokens
from fp8gate.calibrate.report.page.table_facts import TablesByVariant, provenance, quality, status_legend
from fp8gate.calibrate.report.page.verdict import DeviceVerdict, Verdict
from fp8gate.calibrate.report.speedup_map import map_tokens, speedup_maps
from fp8gate.filter.contract.recipes import RECIPES, VARIANTS, Variant
from fp8gate.filter.contract.table import Incomplete, Table, TableError, read_table
from fp8gate.filter.decision.decide import DEFAULT_MIN_SPEEDUP
from fp8gate.filter.decision.lookup import Lookup
from fp8gate.filter.decision.shared_input import least_text
from fp8gate.filter.locate.find_table import table_files

PAGE, TEMPLATE = "index.html", "page.html.jinja"


@dataclass(frozen=True, kw_only=True, slots=True)
class RecipeSection:
    """One recipe of a device: the picture with the number of every point, and the same numbers as text."""

    picture: Picture
    numbers: tuple[NumberTable, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceSection:
    """Everything about one device. limit: the speedup of the last colour, if it is not the usual one.

    incomplete: how far the sweeps came that were stopped.
    """

    name: str
    verdict: Verdict
    limit: float | None
    incomplete: dict[Variant, Incomplete]
    overview: Picture
    all_tokens: Picture
    recipes: dict[Variant, RecipeSection]
    quality: dict[Variant, dict[str, str]]
    provenance: dict[str, tuple[str, ...]]
    tokens: dict[Variant, tuple[int, ...]]
    models: dict[str, list[LayerRow]]

    @property
    def pictures(self) -> list[Picture]:
        return [self.overview, self.all_tokens, *(recipe.picture for recipe in self.recipes.values())]


def write_report(paths: Iterable[Path], out: Path) -> list[Path]:
    """Write the page and its pictures. Returns the files, the page first.

    Raises TableError for a table that cannot be read or drawn, or for two tables of one device, recipe and casts, and
    OSError if `out` cannot be written.
    """
    devices = by_device(paths)
    out.mkdir(parents=True, exist_ok=True)
    sections = [_section(device, tables) for device, tables in devices.items()]
    files = {PAGE: render(sections).encode()}
    for picture in (picture for section in sections for picture in section.pictures):
        files |= picture.files()
    for name, content in files.items():
        (out / name).write_bytes(content)
    return [out / name for name in files]


def by_device(paths: Iterable[Path]) -> dict[str, TablesByVariant]:
    """The tables of each device, in the order of the recipes.

    Raises TableError for two of one device, recipe and casts.
    """
    found: dict[str, dict[Variant, tuple[Path, Table]]] = {}
    for file in (file for path in paths for file in table_files(path)):
        table = read_table(file)
        of_device = found.setdefault(table.device.name, {})
        if table.variant in of_device:
            other = of_device[table.variant][0]
            raise TableError(
                f"{file}: $.recipe: expected one table of {table.variant} on {table.device.name}; {other} is another: "
                "fp8gate diff compares two"
            )
        of_device[table.variant] = file, table
    return {
        device: {variant: tables[variant] for variant in VARIANTS if variant in tables}
        for device, tables in found.items()
    }


def _section(device: str, files: TablesByVariant) -> DeviceSection:
    tables = {variant: table for variant, (_, table) in files.items()}
    lookups = {variant: Lookup(table) for variant, table in tables.items()}
    maps = {variant: speedup_maps(table) for variant, table in tables.items()}
    scale = colour_scale([p.speedup for table in tables.values() for p in table.points if p.speedup is not None])
    tokens = {variant: map_tokens(table) for variant, table in tables.items()}
    usual = usual_tokens(m for of_variant in tokens.values() for m in of_variant)
    draw = DevicePictures(device, maps, scale, tables_hash(tables.values()))
    return DeviceSection(
        name=device,
        verdict=DeviceVerdict(device, files, lookups, usual).make(),
        limit=None if scale.limit == USUAL_LIMIT else scale.limit,
        incomplete={variant: table.incomplete for variant, table in tables.items() if table.incomplete},
        overview=draw.overview(),
        all_tokens=draw.all_tokens(),
        recipes={
            variant: RecipeSection(picture=draw.numbers(variant), numbers=tuple(map(number_table, of_variant.values())))
            for variant, of_variant in maps.items()
        },
        quality={variant: quality(table) for variant, table in tables.items()},
        provenance=provenance(files),
        tokens=tokens,
        models={model: layer_rows(layers, tables, lookups, scale) for model, layers in placed_models().items()},
    )


def render(sections: Sequence[DeviceSection]) -> str:
    """The page's HTML."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fp8gate.calibrate.report.page", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE).render(
        sections=sections,
        min_speedup=DEFAULT_MIN_SPEEDUP,
        least=least_text(None),
        without_rule=[recipe for recipe, facts in RECIPES.items() if facts.torchao_skips is None],
        statuses=status_legend(),
    )
