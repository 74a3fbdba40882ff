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
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke
from matplotlib.transforms import offset_copy

from fp8gate.calibrate.comparison.usual_models import PlacedLayer
from fp8gate.calibrate.report.colour_scale import ColourScale, colours
from fp8gate.calibrate.report.speedup_map import SpeedupMap
from fp8gate.filter.decision.decide import DEFAULT_MIN_SPEEDUP

ISOLINES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.85, 1.2, 1.4, 1.6)
CONVERTS, BREAK_EVEN = DEFAULT_MIN_SPEEDUP, 1.0  # the speedups that have a line of their own
INK, HALO, RULE_COLOUR = "#111111", "#ffffff", "#0b5d1e"  # on the maps, which look the same in both themes
HALO_WIDTH = 2.0  # what a line's halo adds to its width, in points
HATCH = "///"
SYMBOLS = "oD"  # for a picture's two groups of layers


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerGroup:
    """Layers that share one symbol on the maps. named: whether their roles stand beside the symbols."""

    name: str
    layers: Sequence[PlacedLayer]
    named: bool


def draw_map(ax: Axes, map_: SpeedupMap, scale: ColourScale) -> None:
    """Draw the colours, where the filter begins to convert, break-even, where torchao's rule begins, and the axes."""
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    levels = scale.levels
    log2_speedup = map_.log2_speedup.clip(levels[0], levels[-1])
    ax.contourf(map_.n, map_.k, log2_speedup, levels, cmap=colours(), norm=scale.norm)
    if map_.stands_in.any():
        ax.contourf(map_.n, map_.k, map_.stands_in, [0.5, 1], colors="none", hatches=[HATCH])
    if map_.torchao is not None:
        _draw_line(ax, map_, map_.torchao, 0.5, width=2.4, color=RULE_COLOUR, linestyle="dashed")
    _draw_line(ax, map_, _measured(map_), math.log2(BREAK_EVEN), width=1.4, color=INK, linestyle="dotted")
    _draw_line(ax, map_, _measured(map_), math.log2(CONVERTS), width=2.4, color=INK, linestyle="solid")
    ax.set_xticks(map_.n_ticks, map(short_size, map_.n_ticks))
    ax.set_yticks(map_.k_ticks, map(short_size, map_.k_ticks))
    ax.minorticks_off()
    ax.tick_params(labelsize=8)


def has_line(map_: SpeedupMap, speedup: float) -> bool:
    """Whether the line of this speedup crosses the map."""
    field = _measured(map_)
    return bool(field.count()) and bool(field.min() < math.log2(speedup) < field.max())


def _measured(map_: SpeedupMap) -> np.ma.MaskedArray:
    """log2 of the speedup where points were measured on all sides.

    The rest is masked: lines there would follow the points that stand in.
    """
    return np.ma.masked_array(map_.log2_speedup, map_.stands_in)


def _draw_line(
    ax: Axes, map_: SpeedupMap, field: npt.NDArray[Any], level: float, *, width: float, color: str, linestyle: str
) -> None:
    if field.min() < level < field.max():
        lines = ax.contour(map_.n, map_.k, field, [level], colors=color, linewidths=width, linestyles=linestyle)
        lines.set_path_effects([withStroke(linewidth=width + HALO_WIDTH, foreground=HALO)])


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
        weight = "bold" if mark.speedup and mark.speedup >= CONVERTS else "normal"
        if text:
            _write(ax, mark.n, mark.k, text, (0, 0), ha="center", style=style, weight=weight, fontsize=7)


def draw_layers(ax: Axes, map_: SpeedupMap, groups: Sequence[LayerGroup]) -> None:
    """Draw a symbol for each layer.

    A layer beyond the map in one dimension gets its symbol at the border. A layer beyond it in both gets none.
    """
    for symbol, above, inside, group in zip(SYMBOLS, (-10, 10), (15, 5), groups, strict=False):
        for layer in group.layers:
            k, n = np.clip(layer.k, map_.k[0], map_.k[-1]), np.clip(layer.n, map_.n[0], map_.n[-1])
            if k != layer.k and n != layer.n:
                continue
            ax.plot(n, k, symbol, color=HALO, markeredgecolor=INK, markersize=5, clip_on=False, zorder=5)
            if group.named:
                away, ha = ((6, 0), "left") if layer.k > layer.n else ((0, above), "center")
                if k != layer.k:  # inside the border, where both groups may have a layer at the same place
                    away, ha = (6, -inside if k < layer.k else inside), "left"
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
