"""The pictures: the same bytes for the same maps, both themes, and colours that do not mislead."""

from __future__ import annotations

import io

import numpy as np
import pytest
from builders import make_point, make_table
from matplotlib.colors import to_rgb
from PIL import Image

from fp8gate.calibrate.comparison.usual_models import PlacedLayer
from fp8gate.calibrate.report.map_figures import SOURCE, THEMES, draw_numbers, draw_side_by_side
from fp8gate.calibrate.report.map_panel import COLOUR_LIMIT, INK, SHADES, LayerGroup, colour_of, short_size
from fp8gate.calibrate.report.speedup_map import speedup_maps

SHAPES = [(m, k, n) for m in (1024, 8192) for k in (1024, 4096) for n in (1024, 4096)]
LAYERS = [
    PlacedLayer(roles=("wq", "wo"), k=4096, n=2048, tp=1),
    PlacedLayer(roles=("output",), k=2048, n=10**6, tp=1),
    PlacedLayer(roles=("w2",), k=10**6, n=10**6, tp=1),
]


def maps(recipe="rowwise", speedup=1.5, shapes=SHAPES):
    return speedup_maps(make_table(*(make_point(*at, speedup * at[2] / 4096) for at in shapes), recipe=recipe))


def opened(png):
    return Image.open(io.BytesIO(png))


def luminance(colour):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    dark, light = sorted(map(luminance, (one, other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.fixture(scope="module")
def numbers():
    """The pictures of `maps()`, by theme."""
    return draw_numbers("t", maps(), "abc")


def test_the_same_maps_give_the_same_bytes_and_other_maps_do_not(numbers):
    assert draw_numbers("t", maps(), "abc") == numbers
    assert draw_numbers("t", maps(speedup=1.6), "abc") != numbers


def test_a_picture_says_which_tables_it_shows_and_nothing_of_when(numbers):
    assert len(numbers) == len(THEMES)
    for png in numbers.values():
        assert opened(png).text == {SOURCE: "abc"}


def test_both_themes_show_the_same_maps_on_their_own_ground(numbers):
    drawn = {name: opened(png).convert("RGB") for name, png in numbers.items()}
    assert drawn["light"].size == drawn["dark"].size
    for theme in THEMES:
        assert drawn[theme.name].getpixel((0, 0)) == tuple(round(255 * part) for part in to_rgb(theme.page))
        assert contrast(to_rgb(theme.ink), to_rgb(theme.page)) > 7


def test_recipes_with_other_tokens_and_layers_beyond_the_border_can_be_drawn():
    groups = [LayerGroup(name="a model", layers=LAYERS, named=True), LayerGroup(name="b", layers=LAYERS, named=False)]
    by_recipe = {"rowwise": maps(), "rowwise_with_gw_hp": maps("rowwise_with_gw_hp", shapes=SHAPES[4:])}
    pngs = draw_side_by_side("t", by_recipe, [1024, 8192], groups, "s")
    assert set(pngs) == {"light", "dark"}
    assert pngs != draw_side_by_side("t", by_recipe, [1024, 8192], [], "s")


def test_a_single_point_can_be_drawn():
    assert opened(draw_numbers("t", maps(shapes=[(16, 32, 48)]), "s")["dark"]).width > 100


def test_colours_are_neutral_at_break_even_and_opposite_around_it():
    red, _, blue = colour_of(0.6)
    assert red > blue + 0.2
    red, _, blue = colour_of(1 / 0.6)
    assert blue > red + 0.2
    assert np.ptp(colour_of(1.0)) < 0.03
    assert colour_of(0.1) == colour_of(1 / COLOUR_LIMIT)


def test_text_reads_on_every_colour_of_a_map():
    speedups = np.geomspace(1 / COLOUR_LIMIT, COLOUR_LIMIT, 4 * SHADES)
    assert min(contrast(colour_of(speedup), to_rgb(INK)) for speedup in speedups) > 4.5  # WCAG 2, AA


@pytest.mark.parametrize(("size", "text"), [(512, "512"), (1024, "1K"), (32768, "32K"), (1536, "1536")])
def test_sizes_are_short_where_they_can_be(size, text):
    assert short_size(size) == text
