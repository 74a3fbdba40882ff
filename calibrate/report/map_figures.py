"""Speedup maps as pictures: recipes side by side, and one recipe with its numbers.

In: `SpeedupMap`s, the models' layers. Out: PNG bytes for each theme. The same maps give the same bytes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fp8gate.calibrate.report.map_panel import (
    HALO,
    HATCH,
    INK,
    RULE_COLOUR,
    SYMBOLS,
    LayerGroup,
    colour_norm,
    colours,
    draw_isolines,
    draw_layers,
    draw_map,
    draw_marks,
)
from fp8gate.calibrate.report.speedup_map import SpeedupMap
from fp8gate.filter.contract.recipes import Recipe

DPI = 140
PANEL_IN = (3.4, 2.9)  # side by side; a README shows three of them 1000 pixels wide
NUMBERS_PANEL_IN = (4.6, 3.5)  # wide enough for nine numbers in a row
COLOURS = 256  # in a picture: this takes a third of the bytes, and the eye sees no difference
BAR_TICKS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0)
THIN_HATCHES = rc_context({"hatch.linewidth": 0.4, "hatch.color": INK})  # thin, because numbers stand on them
KMEANS = 1000  # how many pixels may still change colour when it ends: without it, some shades of the scale are off
MIN_WIDTH_IN, LEGEND_COLUMNS = 8.5, 3  # what the title and the legend need
NO_RULE = "torchao has no rule for this recipe"
SOURCE = "Source"  # the text field of a PNG that says which tables it shows


@dataclass(frozen=True, kw_only=True, slots=True)
class Theme:
    """The colours of what surrounds the maps."""

    name: str
    page: str
    ink: str


THEMES = (Theme(name="light", page="#ffffff", ink="#1f2328"), Theme(name="dark", page="#0d1117", ink="#e6edf3"))

Maps = Mapping[Recipe, Mapping[int, SpeedupMap]]
Panels = npt.NDArray[np.object_]
"""The panels of a picture (matplotlib's `Axes`) by row and column."""


@THIN_HATCHES
def draw_side_by_side(
    title: str, maps: Maps, tokens: Sequence[int], groups: Sequence[LayerGroup], source: str
) -> dict[str, bytes]:
    """Draw a column for each recipe and a row for each m, with labelled lines and with the models' layers."""
    figure, panels = _figure(title, (len(tokens), len(maps)), PANEL_IN)
    for row, m in zip(panels, tokens, strict=True):
        for ax, (recipe, of_recipe) in zip(row, maps.items(), strict=True):
            ax.set_title(f"{recipe}, {m} tokens", fontsize=9)
            if m not in of_recipe:
                ax.set_axis_off()
                continue
            draw_map(ax, of_recipe[m])
            draw_isolines(ax, of_recipe[m])
            draw_marks(ax, of_recipe[m], with_numbers=False)
            draw_layers(ax, of_recipe[m], groups)
            if of_recipe[m].torchao is None:
                style = {"ha": "right", "fontsize": 7, "style": "italic", "color": INK}
                ax.text(0.98, 0.03, NO_RULE, transform=ax.transAxes, **style)
    _finish(figure, panels, [map_ for by_m in maps.values() for map_ in by_m.values()], groups)
    return _pngs(figure, source)


@THIN_HATCHES
def draw_numbers(title: str, maps: Mapping[int, SpeedupMap], source: str) -> dict[str, bytes]:
    """Draw one recipe with a map for each m. Each point shows its number, or why it has none."""
    columns = min(len(maps), 3)
    figure, panels = _figure(title, (-(-len(maps) // columns), columns), NUMBERS_PANEL_IN)
    for ax in panels.flat[len(maps) :]:
        ax.set_axis_off()
    for ax, map_ in zip(panels.flat, maps.values(), strict=False):
        ax.set_title(f"{map_.m} tokens", fontsize=9)
        draw_map(ax, map_)
        draw_marks(ax, map_, with_numbers=True)
    _finish(figure, panels, list(maps.values()), [])
    return _pngs(figure, source)


def _figure(title: str, shape: tuple[int, int], panel_in: tuple[float, float]) -> tuple[Figure, Panels]:
    rows, columns = shape
    size = (max(MIN_WIDTH_IN, panel_in[0] * columns + 0.5), panel_in[1] * rows + 1.6)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    figure.suptitle(title, fontsize=11, fontweight="bold", parse_math=False)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _finish(figure: Figure, panels: Panels, maps: Sequence[SpeedupMap], groups: Sequence[LayerGroup]) -> None:
    """Add the names of the axes, the scale of colours, and the legend."""
    rows = len(panels)
    for ax in panels[:, 0]:
        ax.set_ylabel("k = in_features", fontsize=8)
    for ax in panels[-1]:
        ax.set_xlabel("n = out_features", fontsize=8)
    bar = figure.colorbar(
        ScalarMappable(colour_norm(), colours()),
        ax=panels,
        location="bottom",
        aspect=60,
        shrink=0.7,
        fraction=0.12 / rows,
        pad=0.04 / rows,
        extend="both",
    )
    bar.set_ticks([math.log2(tick) for tick in BAR_TICKS], labels=[f"{tick:g}" for tick in BAR_TICKS])
    bar.set_label(
        "bf16 is faster  ←   speedup: bf16 time / float8 time, forward + backward   →  float8 is faster",
        fontsize=9,
    )
    bar.ax.tick_params(labelsize=8)
    _add_legend(figure, maps, groups)


def _add_legend(figure: Figure, maps: Sequence[SpeedupMap], groups: Sequence[LayerGroup]) -> None:
    """Explain the lines, hatches and symbols that the maps have. The ground is light in both themes, like the maps'."""
    halo = [withStroke(linewidth=4.4, foreground=HALO)]
    entries: dict[str, Line2D | Patch] = {
        "break-even (1.0)": Line2D([], [], color=INK, linewidth=2.4, path_effects=halo),
    }
    if any(map_.torchao is not None for map_ in maps):
        rule = Line2D([], [], color=RULE_COLOUR, linewidth=2.4, linestyle="dashed", path_effects=halo)
        entries["torchao's rule: float8 above and to the right"] = rule
    if any(map_.stands_in.any() for map_ in maps):
        entries["not measured here (cap: too large): others stand in"] = Patch(
            facecolor="none", hatch=HATCH, linewidth=0
        )
    for symbol, group in zip(SYMBOLS, groups, strict=False):
        entries[group.name] = Line2D([], [], color=HALO, marker=symbol, markeredgecolor=INK, linestyle="none")
    figure.legend(
        entries.values(),
        entries.keys(),
        loc="outside lower center",
        ncols=LEGEND_COLUMNS,
        fontsize=8,
        facecolor="#f2f2f2",
        framealpha=1.0,
        labelcolor=INK,
    )


def _pngs(figure: Figure, source: str) -> dict[str, bytes]:
    """The figure in each theme. The layout is computed once, and what is drawn on the maps does not count for it."""
    for ax in figure.axes:
        for artist in (*ax.collections, *ax.lines, *ax.texts):
            artist.set_in_layout(False)
    canvas = FigureCanvasAgg(figure)
    engine = figure.get_layout_engine()
    assert engine
    engine.execute(figure)
    figure.set_layout_engine("none")
    return {theme.name: _png(canvas, theme, source) for theme in THEMES}


def _png(canvas: FigureCanvasAgg, theme: Theme, source: str) -> bytes:
    _paint(canvas.figure, theme)
    canvas.draw()  # type: ignore[no-untyped-call]
    pixels = np.asarray(canvas.buffer_rgba())  # type: ignore[no-untyped-call]
    drawn = Image.fromarray(pixels).convert("RGB")
    info, file = PngInfo(), io.BytesIO()
    info.add_text(SOURCE, source)
    few = drawn.quantize(COLOURS, kmeans=KMEANS, dither=Image.Dither.NONE)
    few.save(file, "PNG", optimize=True, pnginfo=info)
    return file.getvalue()


def _paint(figure: Figure, theme: Theme) -> None:
    figure.set_facecolor(theme.page)
    for text in figure.texts:
        text.set_color(theme.ink)
    for ax in figure.axes:
        ax.tick_params(colors=theme.ink)
        for text in (ax.title, ax.xaxis.label, ax.yaxis.label):
            text.set_color(theme.ink)
        for spine in ax.spines.values():
            spine.set_color(theme.ink)
