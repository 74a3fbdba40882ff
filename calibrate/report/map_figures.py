"""Speedup maps as pictures: recipes side by side, and one recipe with its numbers.

In: `SpeedupMap`s, the models' layers. Out: PNG bytes for each theme, the same for the same maps. Colour is never alone:
lines carry their speedup, points their number.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Colormap, ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from matplotlib.transforms import offset_copy
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fp8gate.calibrate.comparison.usual_models import PlacedLayer
from fp8gate.calibrate.report.speedup_map import SpeedupMap
from fp8gate.filter.contract.recipes import Recipe

DPI = 140
PANEL_IN = (3.4, 2.9)  # side by side; a README shows three of them 1000 pixels wide
NUMBERS_PANEL_IN = (4.6, 3.5)  # nine numbers wide
COLOUR_LIMIT = 2.0  # of speedup, either way: what is slower than half is not close to any decision
SHADES = 32  # steps of colour, 4.4 % of speedup each
DARKEST = 0.2  # of the colormap: its ends are left out, so that black text reads everywhere
COLOURS = 256  # of a picture: a third of the bytes, and no difference to be seen
ISOLINES = (0.3, 0.5, 0.7, 0.85, 1.2, 1.4, 1.6)
BAR_TICKS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0)
INK, HALO, RULE_COLOUR = "#111111", "#ffffff", "#0b5d1e"  # on the maps, which are the same in both themes
HATCH, THIN_HATCHES = "///", rc_context({"hatch.linewidth": 0.4, "hatch.color": INK})  # as marks stand on them
KMEANS = 1000  # pixels that may still change their colour: without, some shades of the scale are off
MIN_WIDTH_IN, LEGEND_COLUMNS = 8.5, 3  # what the title and the legend need
SYMBOLS = "oD"  # of a picture's two groups of layers
NO_RULE = "torchao has no rule for this recipe"
SOURCE = "Source"  # the PNG's text field that says which tables it shows


@dataclass(frozen=True, kw_only=True, slots=True)
class Theme:
    """What surrounds the maps."""

    name: str
    page: str
    ink: str


THEMES = (Theme(name="light", page="#ffffff", ink="#1f2328"), Theme(name="dark", page="#0d1117", ink="#e6edf3"))

Maps = Mapping[Recipe, Mapping[int, SpeedupMap]]
AxesArray = npt.NDArray[np.object_]


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerGroup:
    """Layers that have one symbol on the maps. named: their roles stand beside them."""

    name: str
    layers: Sequence[PlacedLayer]
    named: bool


@THIN_HATCHES
def draw_side_by_side(
    title: str, maps: Maps, tokens: Sequence[int], groups: Sequence[LayerGroup], source: str
) -> dict[str, bytes]:
    """A column for each recipe, a row for each m; lines with their speedups, and where the models' layers lie."""
    figure, grid = _figure(title, (len(tokens), len(maps)), PANEL_IN)
    for row, m in zip(grid, tokens, strict=True):
        for ax, (recipe, of_recipe) in zip(row, maps.items(), strict=True):
            ax.set_title(f"{recipe}, {m} tokens", fontsize=9)
            if m not in of_recipe:
                ax.set_axis_off()
                continue
            _draw_map(ax, of_recipe[m])
            _draw_isolines(ax, of_recipe[m])
            _draw_marks(ax, of_recipe[m], with_numbers=False)
            _draw_layers(ax, of_recipe[m], groups)
            if of_recipe[m].torchao is None:
                style = {"ha": "right", "fontsize": 7, "style": "italic", "color": INK}
                ax.text(0.98, 0.03, NO_RULE, transform=ax.transAxes, **style)
    _finish(figure, grid, [map_ for by_m in maps.values() for map_ in by_m.values()], groups)
    return _pngs(figure, source)


@THIN_HATCHES
def draw_numbers(title: str, maps: Mapping[int, SpeedupMap], source: str) -> dict[str, bytes]:
    """One recipe, a map for each m: the number at each point measured, and why others have none."""
    columns = min(len(maps), 3)
    figure, grid = _figure(title, (-(-len(maps) // columns), columns), NUMBERS_PANEL_IN)
    for ax in grid.flat[len(maps) :]:
        ax.set_axis_off()
    for ax, map_ in zip(grid.flat, maps.values(), strict=False):
        ax.set_title(f"{map_.m} tokens", fontsize=9)
        _draw_map(ax, map_)
        _draw_marks(ax, map_, with_numbers=True)
    _finish(figure, grid, list(maps.values()), [])
    return _pngs(figure, source)


def colour_of(speedup: float) -> tuple[float, float, float]:
    """Red, green and blue, 0 to 1, of a speedup on the maps."""
    red, green, blue, _ = _colours()(_norm()(math.log2(speedup)))
    return red, green, blue


def _colours() -> Colormap:
    """Red where bf16 is faster, blue where float8 is: colour-blind readers can tell them apart."""
    return ListedColormap(colormaps["RdBu"](np.linspace(DARKEST, 1 - DARKEST, SHADES)))


def _norm() -> Normalize:
    limit = math.log2(COLOUR_LIMIT)
    return Normalize(-limit, limit, clip=True)


def _figure(title: str, shape: tuple[int, int], panel_in: tuple[float, float]) -> tuple[Figure, AxesArray]:
    rows, columns = shape
    size = (max(MIN_WIDTH_IN, panel_in[0] * columns + 0.5), panel_in[1] * rows + 1.6)
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    figure.suptitle(title, fontsize=11, fontweight="bold", parse_math=False)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _draw_map(ax: Axes, map_: SpeedupMap) -> None:
    """Colours, the break-even line and torchao's, and the axes."""
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    levels = np.linspace(-1, 1, SHADES + 1) * math.log2(COLOUR_LIMIT)
    ax.contourf(map_.n, map_.k, map_.log2_speedup.clip(levels[0], levels[-1]), levels, cmap=_colours(), norm=_norm())
    if map_.stands_in.any():
        ax.contourf(map_.n, map_.k, map_.stands_in, [0.5, 1], colors="none", hatches=[HATCH])
    if map_.torchao is not None:
        _draw_line(ax, map_, map_.torchao, 0.5, color=RULE_COLOUR, linestyle="dashed")
    _draw_line(ax, map_, _measured(map_), 0.0, color=INK, linestyle="solid")
    ax.set_xticks(map_.n_ticks, map(short_size, map_.n_ticks))
    ax.set_yticks(map_.k_ticks, map(short_size, map_.k_ticks))
    ax.minorticks_off()
    ax.tick_params(labelsize=8)


def _measured(map_: SpeedupMap) -> np.ma.MaskedArray:
    """log2 of the speedup where it was measured around: beyond, lines would follow what stands in."""
    return np.ma.masked_array(map_.log2_speedup, map_.stands_in)


def _draw_line(
    ax: Axes, map_: SpeedupMap, field: npt.NDArray[Any], level: float, *, color: str, linestyle: str
) -> None:
    if field.min() < level < field.max():
        lines = ax.contour(map_.n, map_.k, field, [level], colors=color, linewidths=2.4, linestyles=linestyle)
        lines.set_path_effects([withStroke(linewidth=4.4, foreground=HALO)])


def _draw_isolines(ax: Axes, map_: SpeedupMap) -> None:
    field = 2 ** _measured(map_)
    levels = [level for level in ISOLINES if field.min() < level < field.max()]
    if levels:
        lines = ax.contour(map_.n, map_.k, field, levels, colors=INK, linewidths=0.6)
        ax.clabel(lines, fontsize=7, fmt=lambda value: f"{value:g}")


def _draw_marks(ax: Axes, map_: SpeedupMap, *, with_numbers: bool) -> None:
    for mark in map_.marks:
        text = mark.text if with_numbers else mark.short
        style = "italic" if mark.speedup is None else "normal"
        weight = "bold" if mark.speedup and mark.speedup >= 1 else "normal"
        if text:
            _write(ax, mark.n, mark.k, text, (0, 0), ha="center", style=style, weight=weight, fontsize=7)


def _draw_layers(ax: Axes, map_: SpeedupMap, groups: Sequence[LayerGroup]) -> None:
    """A symbol for each layer, at the border if it lies beyond in one dimension, nowhere if in both."""
    for symbol, above, group in zip(SYMBOLS, (-10, 10), groups, strict=False):
        for layer in group.layers:
            k, n = np.clip(layer.k, map_.k[0], map_.k[-1]), np.clip(layer.n, map_.n[0], map_.n[-1])
            if k != layer.k and n != layer.n:
                continue
            ax.plot(n, k, symbol, color=HALO, markeredgecolor=INK, markersize=5, clip_on=False, zorder=5)
            if group.named:
                away, ha = ((6, 0), "left") if layer.k > layer.n else ((0, above), "center")
                if n < layer.n:  # on the other side than its neighbours' names
                    away, ha = (0, -above), "right"
                _write(ax, n, k, ", ".join(layer.roles) + _arrow(layer, k, n), away, ha=ha, fontsize=7)


def _arrow(layer: PlacedLayer, k: float, n: float) -> str:
    """Where a layer lies from its symbol at (k, n)."""
    if n != layer.n:
        return "→" if n < layer.n else "←"
    return "" if k == layer.k else "↑" if k < layer.k else "↓"


def _write(ax: Axes, n: float, k: float, text: str, away: tuple[int, int], **style: Any) -> None:
    """away: from (n, k), in points."""
    place = offset_copy(ax.transData, ax.get_figure(root=True), *away, units="points")
    halo = [withStroke(linewidth=1.8, foreground=HALO, alpha=0.75)]
    ax.text(n, k, text, transform=place, va="center", color=INK, path_effects=halo, zorder=6, **style)


def _finish(figure: Figure, grid: AxesArray, maps: Sequence[SpeedupMap], groups: Sequence[LayerGroup]) -> None:
    """Axis names, the scale of colours, and what lines and symbols mean."""
    rows = len(grid)
    for ax in grid[:, 0]:
        ax.set_ylabel("k = in_features", fontsize=8)
    for ax in grid[-1]:
        ax.set_xlabel("n = out_features", fontsize=8)
    bar = figure.colorbar(
        ScalarMappable(_norm(), _colours()),
        ax=grid,
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
    """Of what the maps have, on a light ground in both themes, as the maps are."""
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
    """The figure in each theme. Its layout is made once, without what lies inside of the maps."""
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


def short_size(size: int) -> str:
    """1024 as 1K: sizes are mostly powers of two."""
    return f"{size // 1024}K" if size % 1024 == 0 else str(size)
