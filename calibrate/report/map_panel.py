"""One speedup map on one panel of a picture: its colours, lines, marks and layers.

In: a matplotlib panel (`Axes`), a `SpeedupMap`. Out: what is drawn on the panel. Colour never stands alone: lines carry
their speedup, and points their number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, ListedColormap, Normalize
from matplotlib.patheffects import withStroke
from matplotlib.transforms import offset_copy

from fp8gate.calibrate.comparison.usual_models import PlacedLayer
from fp8gate.calibrate.report.speedup_map import SpeedupMap

COLOUR_LIMIT = 2.0  # the speedup of the last colour, either way: what is slower than half is far from any decision
SHADES = 32  # steps of colour, each 4.4 % of speedup
DARKEST = 0.2  # how much of the colormap is left out at each end, so that black text reads on every colour
ISOLINES = (0.3, 0.5, 0.7, 0.85, 1.2, 1.4, 1.6)
INK, HALO, RULE_COLOUR = "#111111", "#ffffff", "#0b5d1e"  # on the maps, which look the same in both themes
HATCH = "///"
SYMBOLS = "oD"  # for a picture's two groups of layers


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerGroup:
    """Layers that share one symbol on the maps. named: whether their roles stand beside the symbols."""

    name: str
    layers: Sequence[PlacedLayer]
    named: bool


def colour_of(speedup: float) -> tuple[float, float, float]:
    """The red, green and blue (0 to 1) that the maps show a speedup with."""
    red, green, blue, _ = colours()(colour_norm()(math.log2(speedup)))
    return red, green, blue


def colours() -> Colormap:
    """Red where bf16 is faster, blue where float8 is. Colour-blind readers can tell the two apart."""
    return ListedColormap(colormaps["RdBu"](np.linspace(DARKEST, 1 - DARKEST, SHADES)))


def colour_norm() -> Normalize:
    """From log2 of a speedup to the scale of colours."""
    limit = math.log2(COLOUR_LIMIT)
    return Normalize(-limit, limit, clip=True)


def draw_map(ax: Axes, map_: SpeedupMap) -> None:
    """Draw the colours, the line of break-even, the line of torchao's rule, and the axes."""
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    levels = np.linspace(-1, 1, SHADES + 1) * math.log2(COLOUR_LIMIT)
    log2_speedup = map_.log2_speedup.clip(levels[0], levels[-1])
    ax.contourf(map_.n, map_.k, log2_speedup, levels, cmap=colours(), norm=colour_norm())
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
    """log2 of the speedup where points were measured on all sides.

    The rest is masked: lines there would follow the points that stand in.
    """
    return np.ma.masked_array(map_.log2_speedup, map_.stands_in)


def _draw_line(
    ax: Axes, map_: SpeedupMap, field: npt.NDArray[Any], level: float, *, color: str, linestyle: str
) -> None:
    if field.min() < level < field.max():
        lines = ax.contour(map_.n, map_.k, field, [level], colors=color, linewidths=2.4, linestyles=linestyle)
        lines.set_path_effects([withStroke(linewidth=4.4, foreground=HALO)])


def draw_isolines(ax: Axes, map_: SpeedupMap) -> None:
    """Draw thin lines, labelled with their speedup."""
    field = 2 ** _measured(map_)
    levels = [level for level in ISOLINES if field.min() < level < field.max()]
    if levels:
        lines = ax.contour(map_.n, map_.k, field, levels, colors=INK, linewidths=0.6)
        ax.clabel(lines, fontsize=7, fmt=lambda value: f"{value:g}")


def draw_marks(ax: Axes, map_: SpeedupMap, *, with_numbers: bool) -> None:
    """Write at each point its number, or only what needs attention."""
    for mark in map_.marks:
        text = mark.text if with_numbers else mark.short
        style = "italic" if mark.speedup is None else "normal"
        weight = "bold" if mark.speedup and mark.speedup >= 1 else "normal"
        if text:
            _write(ax, mark.n, mark.k, text, (0, 0), ha="center", style=style, weight=weight, fontsize=7)


def draw_layers(ax: Axes, map_: SpeedupMap, groups: Sequence[LayerGroup]) -> None:
    """Draw a symbol for each layer.

    A layer beyond the map in one dimension gets its symbol at the border. A layer beyond it in both gets none.
    """
    for symbol, above, group in zip(SYMBOLS, (-10, 10), groups, strict=False):
        for layer in group.layers:
            k, n = np.clip(layer.k, map_.k[0], map_.k[-1]), np.clip(layer.n, map_.n[0], map_.n[-1])
            if k != layer.k and n != layer.n:
                continue
            ax.plot(n, k, symbol, color=HALO, markeredgecolor=INK, markersize=5, clip_on=False, zorder=5)
            if group.named:
                away, ha = ((6, 0), "left") if layer.k > layer.n else ((0, above), "center")
                if n < layer.n:  # the names of its neighbours are on the other side
                    away, ha = (0, -above), "right"
                _write(ax, n, k, ", ".join(layer.roles) + _arrow(layer, k, n), away, ha=ha, fontsize=7)


def _arrow(layer: PlacedLayer, k: float, n: float) -> str:
    """Points from the symbol at (k, n) to where the layer lies."""
    if n != layer.n:
        return "→" if n < layer.n else "←"
    return "" if k == layer.k else "↑" if k < layer.k else "↓"


def _write(ax: Axes, n: float, k: float, text: str, away: tuple[int, int], **style: Any) -> None:
    """Write a text with a halo. away: how far from (n, k), in typographic points."""
    position = offset_copy(ax.transData, ax.get_figure(root=True), *away, units="points")
    halo = [withStroke(linewidth=1.8, foreground=HALO, alpha=0.75)]
    ax.text(n, k, text, transform=position, va="center", color=INK, path_effects=halo, zorder=6, **style)


def short_size(size: int) -> str:
    """1024 as 1K: sizes are mostly powers of two."""
    return f"{size // 1024}K" if size % 1024 == 0 else str(size)
