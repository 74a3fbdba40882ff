"""The pictures: the same bytes for the same maps, both themes, and colours that do not mislead."""

from __future__ import annotations

import io

import pytest
from builders import make_point, make_table
from contrast import contrast
from matplotlib.colors import to_rgb
from PIL import Image

from fp8gate.calibrate.comparison.usual_models import PlacedLayer
from fp8gate.calibrate.report.colour_scale import ColourScale
from fp8gate.calibrate.report.map_figures import SOURCE, THEMES, draw_numbers, draw_side_by_side, legend_entries
from fp8gate.calibrate.report.map_panel import LayerGroup, has_line, short_size
from fp8gate.calibrate.report.speedup_map import speedup_maps
from fp8gate.filter.contract.table import Grid

SHAPES = [(m, k, n) for m in (1024, 8192) for k in (1024, 4096) for n in (1024, 4096)]
LAYERS = [
    PlacedLayer(roles=("wq", "wo"), k=4096, n=2048, tp=1),
    PlacedLayer(roles=("output",), k=2048, n=10**6, tp=1),
    PlacedLayer(roles=("w2",), k=10**6, n=10**6, tp=1),
]


SCALE = ColourScale()


def maps(recipe="rowwise", speedup=1.5, shapes=SHAPES):
    return speedup_maps(make_table(*(make_point(*at, speedup * at[2] / 4096) for at in shapes), recipe=recipe))


def opened(png):
    return Image.open(io.BytesIO(png))


@pytest.fixture(scope="module")
def numbers():
    """The pictures of `maps()`, by theme."""
    return draw_numbers("t", maps(), "abc", SCALE)


def test_the_same_maps_give_the_same_bytes_and_other_maps_do_not(numbers):
    assert draw_numbers("t", maps(), "abc", SCALE) == numbers
    assert draw_numbers("t", maps(speedup=1.6), "abc", SCALE) != numbers


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
    pngs = draw_side_by_side("t", by_recipe, [1024, 8192], groups, "s", SCALE)
    assert set(pngs) == {"light", "dark"}
    assert pngs != draw_side_by_side("t", by_recipe, [1024, 8192], [], "s", SCALE)


def test_stacked_maps_are_narrow_and_long():
    by_recipe = {"rowwise": maps(), "rowwise_with_gw_hp": maps("rowwise_with_gw_hp")}
    wide, narrow = (
        opened(draw_side_by_side("t", by_recipe, [8192], [], "s", SCALE, stacked=stacked)["light"])
        for stacked in (False, True)
    )
    assert narrow.width < 0.6 * wide.width
    assert narrow.height > 1.3 * wide.height


def test_the_scale_of_colours_counts():
    narrow, wide = (draw_numbers("t", maps(speedup=0.2), "s", scale) for scale in (SCALE, ColourScale(limit=20.0)))
    assert narrow != wide


@pytest.mark.parametrize(
    ("speedup", "lines"),
    [
        (1.5, ["filter converts (1.05)", "break-even (1.0)"]),
        (1.02, ["break-even (1.0)"]),  # of the larger n; the smaller has a quarter of it
        (0.9, []),
        (9.0, []),
    ],
)
def test_the_legend_names_the_lines_that_a_map_has(speedup, lines):
    map_ = maps(speedup=speedup, shapes=SHAPES[:4])[1024]
    named = list(legend_entries([map_], [], with_numbers=False))
    assert [name for name in named if "1.0" in name] == [name for name in named if any(line in name for line in lines)]
    assert len([name for name in named if "1.0" in name]) == len(lines)


LEFT_OUT = "not measured: the points around it answer"


def test_the_legend_explains_points_that_a_sweep_left_out_where_they_are_marked():
    grid = Grid(m=(1024,), k=(1024,), n=(1024, 2048, 4096))
    points = [make_point(1024, 1024, n, 3.0) for n in (1024, 4096)]
    (map_,) = speedup_maps(make_table(*points, grid=grid)).values()
    assert [mark.text for mark in map_.marks] == ["3.00", "3.00", "-"]
    assert LEFT_OUT in legend_entries([map_], [], with_numbers=True)
    assert LEFT_OUT not in legend_entries([map_], [], with_numbers=False)
    assert LEFT_OUT not in legend_entries([maps()[1024]], [], with_numbers=True)


def test_a_map_without_any_measured_part_has_no_line():
    assert not has_line(maps(shapes=[(16, 32, 48)])[16], 1.0)


def test_a_single_point_can_be_drawn():
    assert opened(draw_numbers("t", maps(shapes=[(16, 32, 48)]), "s", SCALE)["dark"]).width > 100


@pytest.mark.parametrize(("size", "text"), [(512, "512"), (1024, "1K"), (32768, "32K"), (1536, "1536")])
def test_sizes_are_short_where_they_can_be(size, text):
    assert short_size(size) == text
