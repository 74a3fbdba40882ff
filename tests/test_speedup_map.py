"""Maps of small tables, counted by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from builders import make_point, make_table

from fp8gate.calibrate.report.speedup_map import (
    MARGIN,
    SAMPLES,
    Mark,
    map_tokens,
    samples,
    short_status,
    speedup_maps,
    without_row,
)
from fp8gate.filter.contract.table import Grid, TableError

SIZES = (1024, 2048, 4096, 8192)


def square(speedup=lambda m, k, n: 1.5, *, without=(), **fields):
    points = itertools.product((1024, 8192), SIZES, SIZES)
    return make_table(*(make_point(*at, speedup(*at)) for at in points if at not in without), **fields)


def at(map_, field, k, n):
    i, j = (int(np.abs(np.log2(axis) - math.log2(size)).argmin()) for axis, size in ((map_.k, k), (map_.n, n)))
    return field[i, j]


def test_samples_reach_half_an_octave_beyond_and_meet_the_sizes():
    sizes = samples([1024, 4096])
    assert len(sizes) == (2 + 2 * MARGIN) * SAMPLES + 1
    assert sizes[[0, 4, -5, -1]] == pytest.approx([1024 * 2**-0.5, 1024, 4096, 4096 * 2**0.5])


def test_the_field_is_what_the_default_lookup_answers():
    map_ = speedup_maps(square(lambda m, k, n: 2.0 if n > 2048 else 0.5))[8192]
    assert 2 ** at(map_, map_.log2_speedup, 1024, 1024) == pytest.approx(0.5)
    assert 2 ** at(map_, map_.log2_speedup, 1024, 2048 * 2**0.5) == pytest.approx(1.0, abs=0.002)  # halfway in log2
    assert not map_.stands_in.any()


def test_each_m_has_its_own_map_over_the_same_sizes():
    maps = speedup_maps(square(lambda m, k, n: m / 4096))
    assert {m: round(2 ** float(map_.log2_speedup.max()), 3) for m, map_ in maps.items()} == {1024: 0.25, 8192: 2.0}
    assert maps[1024].k is maps[8192].k


def test_where_a_point_has_no_row_others_stand_in():
    table = square(without=[(8192, 8192, 8192)])
    map_ = speedup_maps(table)[8192]
    assert at(map_, map_.stands_in, 8192, 8192)
    assert not at(map_, map_.stands_in, 4096, 4096)
    hole = Mark(k=8192, n=8192, text="-")
    assert hole in map_.marks
    assert hole.short == ""  # the hatching says it


def test_a_point_without_a_row_was_too_large_or_not_asked_for():
    grid = Grid(m=(65536,), k=(1024, 32768), n=(1024, 32768))
    table = make_table(make_point(65536, 1024, 1024), make_point(65536, 1024, 32768), grid=grid)
    assert without_row(table, 65536) == {(32768, 1024): "-", (32768, 32768): "cap"}
    assert without_row(table, 1024) == {}


@pytest.mark.parametrize(
    ("point", "text", "short"),
    [
        (make_point(1024, 2048, 2048, 1.314), "1.31", ""),
        (make_point(1024, 2048, 2048, 0.997, status="ambiguous"), "1.00?", "?"),
        (make_point(1024, 2048, 2048, status="out_of_memory"), "oom", "oom"),
        (make_point(1024, 2048, 2048, status="unstable"), "unst", "unst"),
        (make_point(1024, 2048, 2048, status="failed"), "fail", "fail"),
    ],
)
def test_every_status_has_its_mark(point, text, short):
    mark = speedup_maps(make_table(point, make_point(1024, 1024, 1024)))[1024].marks[0]
    assert (mark.text, mark.short, mark.speedup) == (text, short, point.speedup)


def test_a_status_without_a_short_form_is_written_as_it_is():
    assert short_status("noisy_host") == "noisy host"


def test_torchaos_line_runs_just_beyond_the_last_size_it_refuses():
    map_ = speedup_maps(square(recipe="tensorwise"))[8192]
    assert not at(map_, map_.torchao, 4096, 1024)
    assert at(map_, map_.torchao, 4096, 1024 * 2 ** (1 / SAMPLES))
    assert at(map_, map_.torchao, 8192, 1024)
    assert speedup_maps(square(recipe="rowwise_with_gw_hp"))[8192].torchao is None


def test_without_a_grid_the_points_own_sizes_are_the_map():
    table = make_table(make_point(1024, 512, 2048), make_point(4096, 512, 1024), grid=Grid())
    assert map_tokens(table) == (1024, 4096)
    map_ = speedup_maps(table)[4096]
    assert (map_.k_ticks, map_.n_ticks, len(map_.marks)) == ((512,), (1024, 2048), 1)
    assert map_.stands_in.any()


def test_a_table_without_any_number_cannot_be_drawn():
    with pytest.raises(TableError, match=r"rowwise on NVIDIA H200: .*expected a measured point, found none"):
        speedup_maps(make_table(make_point(1024, 512, 2048, status="failed")))
