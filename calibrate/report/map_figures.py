"""Speedup maps as pictures: recipes side by side, and one recipe with its numbers.

In: `SpeedupMap`s, the models' layers. Out: PNG bytes for each theme. The same maps give the same bytes.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fp8gate.calibrate.report.colour_scale import ColourScale, colours
from fp8gate.calibrate.report.map_panel import (
    BREAK_EVEN,
    CONVERTS,
    HALO,
    HALO_WIDTH,
    HATCH,
    INK,
    RULE_COLOUR,
    SYMBOLS,
    LayerGroup,
    draw_isolines,
    draw_layers,
    draw_map,
    draw_marks,
    has_line,
)
from fp8gate.calibrate.report.speedup_map import UNMEASURED, SpeedupMap
from fp8gate.filter.contract.recipes import Variant

DPI = 140
PANEL_IN = (3.4, 2.9)  # side by side; a README shows three of them 1000 pixels wide
NUMBERS_PANEL_IN = (4.6, 3.5)  # wide enough for nine numbers in a row
COLOURS = 256  # in a picture: this takes a third of the bytes, and the eye sees no difference
THIN_HATCHES = rc_context({"hatch.linewidth": 0.4, "hatch.color": INK})  # thin, because numbers stand on them
KMEANS = 1000  # how many pixels may still change colour when it ends: without it, some shades of the scale are off
WIDE_IN, LEGEND_COLUMNS = 8.5, 3  # what as many columns in the legend and the bar's long label need
TITLE_SIZE, TITLE_SIZE_NARROW = 11.0, 9.5
TITLE_CHARACTERS = 120.0  # bold letters of size 1 in an inch
BAR_LABEL = "bf16 is faster  ←   speedup: bf16 time / float8 time, forward + backward   →  float8 is faster"
BAR_LABEL_NARROW = "bf16 is faster  ←   speedup   →  float8 is faster"
NO_RULE = "torchao has no rule for this recipe"
SOURCE = "Source"  # the text field of a PNG that says which tables it shows


@dataclass(frozen=True, kw_only=True, slots=True)
class Theme:
    """The colours of what surrounds the maps."""

    name: str
    page: str
    ink: str


THEMES = (Theme(name="light", page="#ffffff", ink="#1f2328"), Theme(name="dark", page="#0d1117", ink="#e6edf3"))

Maps = Mapping[Variant, Mapping[int, SpeedupMap]]
Panels = npt.NDArray[np.object_]
"""The panels of a picture (matplotlib's `Axes`) by row and column."""


@THIN_HATCHES
def draw_side_by_side(
    title: str,
    maps: Maps,
    tokens: Sequence[int],
    groups: Sequence[LayerGroup],
    source: str,
    scale: ColourScale,
    *,
    stacked: bool = False,
) -> dict[str, bytes]:
    """Draw a column for each table and a row for each m, with labelled lines and with the models' layers.

    stacked: one column for all, for narrow screens.
    """
    shape = (len(tokens) * len(maps), 1) if stacked else (len(tokens), len(maps))
    figure, panels = _figure(title, shape, PANEL_IN)
    for row, m in zip(panels.reshape(len(tokens), len(maps)), tokens, strict=True):
        for ax, (variant, of_variant) in zip(row, maps.items(), strict=True):
            ax.set_title(f"{variant}, {m} tokens", fontsize=9)
            _draw_panel(ax, of_variant.get(m), groups, scale)
    _finish(figure, panels, [map_ for by_m in maps.values() for map_ in by_m.values()], groups, scale)
    return _pngs(figure, source)


def _draw_panel(ax: Axes, map_: SpeedupMap | None, groups: Sequence[LayerGroup], scale: ColourScale) -> None:
    if map_ is None:
        ax.set_axis_off()
        return
    draw_map(ax, map_, scale)
    draw_isolines(ax, map_)
    draw_marks(ax, map_, with_numbers=False)
    draw_layers(ax, map_, groups)
    if map_.torchao is None:
        ax.text(0.98, 0.03, NO_RULE, transform=ax.transAxes, ha="right", fontsize=7, style="italic", color=INK)


@THIN_HATCHES
def draw_numbers(title: str, maps: Mapping[int, SpeedupMap], source: str, scale: ColourScale) -> dict[str, bytes]:
    """Draw one recipe with a map for each m. Each point shows its number, or why it has none."""
    columns = min(len(maps), 3)
    figure, panels = _figure(title, (-(-len(maps) // columns), columns), NUMBERS_PANEL_IN)
    for ax in panels.flat[len(maps) :]:
        ax.set_axis_off()
    for ax, map_ in zip(panels.flat, maps.values(), strict=False):
        ax.set_title(f"{map_.m} tokens", fontsize=9)
        draw_map(ax, map_, scale)
        draw_marks(ax, map_, with_numbers=True)
    _finish(figure, panels, list(maps.values()), [], scale, with_numbers=True)
    return _pngs(figure, source)


def _figure(title: str, shape: tuple[int, int], panel_in: tuple[float, float]) -> tuple[Figure, Panels]:
    rows, columns = shape
    width = panel_in[0] * columns + 0.5
    figure = Figure(figsize=(width, panel_in[1] * rows + 1.6), dpi=DPI, layout="constrained")
    size = TITLE_SIZE_NARROW if _is_narrow(figure) else TITLE_SIZE
    lines = textwrap.wrap(title, width=int(width * TITLE_CHARACTERS / size))
    figure.suptitle("\n".join(lines), fontsize=size, fontweight="bold", parse_math=False)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _finish(
    figure: Figure,
    panels: Panels,
    maps: Sequence[SpeedupMap],
    groups: Sequence[LayerGroup],
    scale: ColourScale,
    *,
    with_numbers: bool = False,
) -> None:
    """Add the names of the axes, the bar of colours, and the legend."""
    for ax in panels[:, 0]:
        ax.set_ylabel("k = in_features", fontsize=8)
    for ax in panels[-1]:
        ax.set_xlabel("n = out_features", fontsize=8)
    _add_bar(figure, panels, scale)
    _add_legend(figure, legend_entries(maps, groups, with_numbers=with_numbers))


def _add_bar(figure: Figure, panels: Panels, scale: ColourScale) -> None:
    rows = len(panels)
    narrow = _is_narrow(figure)
    bar = figure.colorbar(
        ScalarMappable(scale.norm, colours()),
        ax=panels,
        location="bottom",
        aspect=30 if narrow else 60,
        shrink=0.95 if narrow else 0.7,
        fraction=0.12 / rows,
        pad=0.04 / rows,
        extend="both",
    )
    bar.set_ticks([math.log2(tick) for tick in scale.ticks], labels=[f"{tick:g}" for tick in scale.ticks])
    bar.set_label(BAR_LABEL_NARROW if narrow else BAR_LABEL, fontsize=8 if narrow else 9)
    bar.ax.tick_params(labelsize=8)


def _is_narrow(figure: Figure) -> bool:
    return float(figure.get_figwidth()) < WIDE_IN


def _add_legend(figure: Figure, entries: Mapping[str, Line2D | Patch]) -> None:
    """Explain the lines, hatches and symbols. The ground is light in both themes, like the maps'."""
    if not entries:
        return
    figure.legend(
        entries.values(),
        entries.keys(),
        loc="outside lower center",
        ncols=1 if _is_narrow(figure) else LEGEND_COLUMNS,
        fontsize=8,
        facecolor="#f2f2f2",
        framealpha=1.0,
        labelcolor=INK,
    )


def legend_entries(
    maps: Sequence[SpeedupMap], groups: Sequence[LayerGroup], *, with_numbers: bool
) -> dict[str, Line2D | Patch]:
    """The lines, hatches and symbols that these maps have, by what they mean.

    with_numbers: the points have their texts. Without, a point that a sweep left out has none.
    """
    entries: dict[str, Line2D | Patch] = {}
    if any(has_line(map_, CONVERTS) for map_ in maps):
        entries[f"float8 from here on: the filter converts ({CONVERTS:g})"] = _line(2.4, INK, "solid")
    if any(has_line(map_, BREAK_EVEN) for map_ in maps):
        entries["break-even (1.0)"] = _line(1.4, INK, "dotted")
    if any(map_.torchao is not None for map_ in maps):
        entries["torchao's rule: float8 above and to the right"] = _line(2.4, RULE_COLOUR, "dashed")
    if any(map_.stands_in.any() for map_ in maps):
        entries["not measured here (cap: too large): others stand in"] = Patch(
            facecolor="none", hatch=HATCH, linewidth=0
        )
    if with_numbers and any(mark.text == UNMEASURED for map_ in maps for mark in map_.marks):
        entries["not measured: the points around it answer"] = _dash()
    for symbol, group in zip(SYMBOLS, groups, strict=False):
        entries[group.name] = Line2D([], [], color=HALO, marker=symbol, markeredgecolor=INK, linestyle="none")
    return entries


def _dash() -> Line2D:
    """As the maps write UNMEASURED."""
    dash = Line2D([], [], color=INK, linestyle="none", marker=f"${UNMEASURED}$", markersize=4, markeredgewidth=0.2)
    dash.set_path_effects([withStroke(linewidth=HALO_WIDTH, foreground=HALO)])
    return dash


def _line(width: float, color: str, style: Literal["solid", "dotted", "dashed"]) -> Line2D:
    halo = [withStroke(linewidth=width + HALO_WIDTH, foreground=HALO)]
    return Line2D([], [], color=color, linewidth=width, linestyle=style, path_effects=halo)


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
