"""The colours of speedups: neutral at break-even, opposite around it, and as far as the data needs."""

from __future__ import annotations

import numpy as np
import pytest
from contrast import AA, contrast
from matplotlib.colors import to_rgb

from fp8gate.calibrate.report.colour_scale import SHADES, USUAL_LIMIT, USUAL_TICKS, ColourScale, colour_scale
from fp8gate.calibrate.report.map_panel import INK


@pytest.mark.parametrize("limit", [USUAL_LIMIT, 20.0])
def test_colours_are_neutral_at_break_even_and_opposite_around_it(limit):
    scale = ColourScale(limit=limit)
    red, _, blue = scale.colour_of(limit**-0.8)
    assert red > blue + 0.2
    red, _, blue = scale.colour_of(limit**0.8)
    assert blue > red + 0.2
    assert np.ptp(scale.colour_of(1.0)) < 0.03
    assert scale.colour_of(limit**-3) == scale.colour_of(1 / limit)


def test_text_reads_on_every_colour_of_a_map():
    speedups = np.geomspace(1 / USUAL_LIMIT, USUAL_LIMIT, 4 * SHADES)
    assert min(contrast(ColourScale().colour_of(speedup), to_rgb(INK)) for speedup in speedups) > AA


def test_where_float8_wins_the_scale_is_the_usual_one():
    assert colour_scale([0.01, 0.02, 1.3]) == ColourScale()
    assert ColourScale().ticks == list(USUAL_TICKS)


def test_where_it_never_wins_the_scale_follows_the_data_and_tells_its_points_apart():
    speedups = [0.05 * 1.03**i for i in range(60)]  # up to 0.29
    scale = colour_scale(speedups)
    assert 1 / scale.limit == pytest.approx(np.quantile(speedups, 0.05))
    assert len({scale.css_colour(speedup) for speedup in speedups}) >= 8
    assert len({ColourScale().css_colour(speedup) for speedup in speedups}) == 1
    assert scale.ticks == pytest.approx([0.1, 0.2, 0.5, 1, 2, 5, 10])


def test_a_single_odd_win_does_not_hide_all_else():
    assert colour_scale([*[0.1] * 99, 1.5]).limit == pytest.approx(10)


def test_small_losses_keep_the_usual_scale():
    assert colour_scale([0.7, 0.8, 0.9]) == ColourScale()
