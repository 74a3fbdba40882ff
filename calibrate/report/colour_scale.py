"""The colours of speedups, on the maps and on the page: red where bf16 is faster, blue where float8 is. Pure.

In: the speedups that one device's pictures show. Out: a `ColourScale` for all of them, so that their colours compare.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.colors import Colormap, ListedColormap, Normalize

USUAL_LIMIT = 2.0
"""The speedup of the last colour, either way, where float8 wins somewhere: half as fast is far from any decision."""
FEW_WINS = 0.05
"""A share of the points. Where fewer win, how much float8 loses is all that a map can show, and the page says so."""
SLOWEST = 0.05  # quantile of the speedups that gets the last red then: a single odd point does not set the scale
SHADES = 32  # steps of colour, each 4.4 % of speedup at the usual limit
DARKEST = 0.2  # how much of the colormap is left out at each end, so that black text reads on every colour
USUAL_TICKS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0)
WIDE_TICKS = (1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0)  # and their reciprocals


@dataclass(frozen=True, kw_only=True, slots=True)
class ColourScale:
    """Diverging about 1.0, even in log2. limit: the speedup of the last blue; 1 / limit has the last red."""

    limit: float = USUAL_LIMIT

    @property
    def norm(self) -> Normalize:
        """From log2 of a speedup to the scale of colours."""
        return Normalize(-math.log2(self.limit), math.log2(self.limit), clip=True)

    @property
    def levels(self) -> npt.NDArray[np.float64]:
        """The borders of the shades, in log2 of the speedup."""
        return np.asarray(np.linspace(-1, 1, SHADES + 1) * math.log2(self.limit), dtype=np.float64)

    @property
    def ticks(self) -> list[float]:
        """Speedups that the bar of colours names."""
        if self.limit == USUAL_LIMIT:
            return list(USUAL_TICKS)
        wins = [tick for tick in WIDE_TICKS if tick <= self.limit]
        return [*(1 / tick for tick in reversed(wins[1:])), *wins]

    def colour_of(self, speedup: float) -> tuple[float, float, float]:
        """The red, green and blue (0 to 1) of a speedup."""
        red, green, blue, _ = colours()(self.norm(math.log2(speedup)))
        return red, green, blue

    def css_colour(self, speedup: float) -> str:
        """The same for a style sheet."""
        return f"rgb({', '.join(str(round(255 * part)) for part in self.colour_of(speedup))})"


def colours() -> Colormap:
    """Red where bf16 is faster, blue where float8 is. Colour-blind readers can tell the two apart."""
    return ListedColormap(colormaps["RdBu"](np.linspace(DARKEST, 1 - DARKEST, SHADES)))


def colour_scale(speedups: Collection[float]) -> ColourScale:
    """The scale for these speedups: the usual one, or a wider one where float8 loses nearly everywhere.

    With the usual one such maps would be the darkest red all over, and show nothing.
    """
    wins = sum(speedup >= 1 for speedup in speedups)
    if wins >= FEW_WINS * len(speedups):
        return ColourScale()
    slowest = float(np.quantile(list(speedups), SLOWEST))
    return ColourScale(limit=max(USUAL_LIMIT, 1 / slowest))
