"""The page's pictures: the maps of one device, each in every theme. The same tables give the same bytes.

In: the maps of each recipe. Out: `Picture`s, which know their files' names and their data for the page.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass

from fp8gate.calibrate.comparison.usual_models import MODEL_TOKENS, placed_models
from fp8gate.calibrate.report.colour_scale import ColourScale
from fp8gate.calibrate.report.map_figures import NO_RULE, Maps, draw_numbers, draw_side_by_side
from fp8gate.calibrate.report.map_panel import LayerGroup
from fp8gate.filter.contract.devices import device_slug
from fp8gate.filter.contract.recipes import Variant
from fp8gate.filter.contract.table import Table, format_table

OVERVIEW_MODELS = ("llama3-8b", "llama3-70b, TP 8")  # one whole and one divided: the names of more would not fit
NARROW = "narrow"  # ends the names of pictures for narrow screens


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """A picture in every theme. name: the name of its files, without theme and suffix. png: the bytes by theme.

    narrow: the same for narrow screens. None if there is no other, so that the picture scrolls in a box of its own.
    """

    name: str
    heading: str
    alt: str
    png: dict[str, bytes]
    narrow: dict[str, bytes] | None = None

    def files(self) -> dict[str, bytes]:
        """The files' contents by their names."""
        files = {f"{self.name}-{theme}.png": png for theme, png in self.png.items()}
        return files | {f"{self.name}-{NARROW}-{theme}.png": png for theme, png in (self.narrow or {}).items()}

    def data_uri(self, theme: str) -> str:
        return _data_uri(self.png[theme])

    def narrow_data_uri(self, theme: str) -> str:
        assert self.narrow
        return _data_uri(self.narrow[theme])


class DevicePictures:
    """Draws the pictures of one device. source: what they carry to say which tables they show."""

    def __init__(self, device: str, maps: Maps, scale: ColourScale, source: str) -> None:
        self._device, self._maps, self._scale, self._source = device, maps, scale, source
        self._slug = device_slug(device)
        self._tokens = sorted({m for by_m in maps.values() for m in by_m})
        self._title = f"{device}: where float8 trains a linear faster than bf16 (blue), and where not (red)"

    def overview(self) -> Picture:
        """All recipes at the tokens of a usual run, with the names of two models' layers."""
        usual = usual_tokens(self._tokens)
        names = ", ".join(map(str, self._maps))
        wide, narrow = (
            draw_side_by_side(
                *(self._title, self._maps, [usual], _named_groups(), self._source, self._scale), stacked=stacked
            )
            for stacked in (False, True)
        )
        return Picture(
            name=f"{self._slug}-overview",
            heading=f"{usual} tokens, recipes side by side",
            alt=f"Maps of the float8 speedup over k and n on {self._device} at {usual} tokens for {names}, with the "
            "lines where the filter and torchao's rule begin to convert, and the layers of "
            f"{' and '.join(OVERVIEW_MODELS)}",
            png=wide,
            narrow=narrow,
        )

    def all_tokens(self) -> Picture:
        """All recipes at all tokens, with the layers of all bundled models."""
        return Picture(
            name=f"{self._slug}-tokens",
            heading="All tokens, recipes side by side",
            alt=f"The same maps for {', '.join(map(str, self._tokens))} tokens, with the layers of all bundled models",
            png=draw_side_by_side(self._title, self._maps, self._tokens, _all_groups(), self._source, self._scale),
        )

    def numbers(self, variant: Variant) -> Picture:
        """One table at all tokens, with the number of every point."""
        maps = self._maps[variant]
        has_rule = all(map_.torchao is not None for map_ in maps.values())
        title = f"{self._device}, {variant}: speedup at every point measured{'' if has_rule else f'; {NO_RULE}'}"
        return Picture(
            name=f"{self._slug}-{variant.name}",
            heading=f"{variant}: every point",
            alt=f"The measured speedup of {variant} on {self._device} at every k and n, "
            "a map for each number of tokens",
            png=draw_numbers(title, maps, self._source, self._scale),
        )


def usual_tokens(tokens: Iterable[int]) -> int:
    """The one that is nearest to a usual run's."""
    return min(tokens, key=lambda m: abs(math.log2(m / MODEL_TOKENS)))


def tables_hash(tables: Iterable[Table]) -> str:
    """SHA-256 of the tables' text. A picture carries it, so that a test can tell whether the tables have changed."""
    texts = sorted(format_table(table) for table in tables)
    return hashlib.sha256("".join(texts).encode()).hexdigest()


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


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
