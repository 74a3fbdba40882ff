"""Estimates for shapes that were measured and for shapes that were not."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path

import msgspec
import pytest
from builders import make_point, make_table
from hypothesis import given
from hypothesis import strategies as st

import fp8gate
from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.contract.table import Grid, Point, read_table
from fp8gate.filter.decision import nearest as nearest_module
from fp8gate.filter.decision.axis import DISTANCE_DIGITS
from fp8gate.filter.decision.estimate import Estimate
from fp8gate.filter.decision.lookup import Lookup


def look_up(shape: tuple[int, int, int], *points: Point, kind: str = "nearest", **fields: object) -> Estimate:
    estimate = Lookup(make_table(*points, **fields), kind)(LinearShape(*shape))
    assert estimate is not None
    return estimate


# --- nearest ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["nearest", "interpolate"])
def test_measured_shape_gives_its_own_numbers(kind):
    point = make_point(32, 64, 128, 1.25, bf16_us=(10.0, 30.0), spread=1.01)
    others = [make_point(m, 64, n, 3.0) for m, n in [(16, 128), (64, 128), (32, 64), (32, 256)]]
    assert look_up((32, 64, 128), point, *others, kind=kind) == Estimate(
        speedup=1.25,
        speedup_low=1.25 / 1.01,
        speedup_high=1.25 * 1.01,
        bf16_fwd_us=10.0,
        bf16_bwd_us=30.0,
        fp8_fwd_us=8.0,
        fp8_bwd_us=24.0,
        point=point,
        distance=0.0,
        outside=False,
        gap=None,
        interpolated=False,
    )


def test_total_float8_time_follows_from_the_paired_speedup():
    """The total is not the sum of the float8 medians."""
    point = msgspec.structs.replace(make_point(16, 16, 16, 2.0, bf16_us=(10.0, 30.0)), fp8_bwd_us=99.0)
    estimate = look_up((16, 16, 16), point)
    assert (estimate.bf16_us, estimate.fp8_us, estimate.fp8_bwd_us) == (40.0, 20.0, 99.0)


@pytest.mark.parametrize(
    ("n", "nearest_n"),
    [(33, 32), (63, 32), (65, 128), (72, 128), (127, 128)],  # in octaves the middle of 32 and 128 is 64, not 80
)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_nearest_is_nearest_in_octaves_on_every_axis(n, nearest_n, axis):
    def shape(size):
        sizes = [64, 64, 64]
        sizes[axis] = size
        return tuple(sizes)

    estimate = look_up(shape(n), make_point(*shape(32)), make_point(*shape(128)))
    assert estimate.point.shape == LinearShape(*shape(nearest_n))


@pytest.mark.parametrize(
    ("shape", "distance"),
    [((128, 64, 64), 1.0), ((64, 16, 64), 2.0), ((128, 32, 64), math.sqrt(2)), ((128, 128, 32), math.sqrt(3))],
)
def test_distance_is_in_octaves(shape, distance):
    assert look_up(shape, make_point(64, 64, 64)).distance == pytest.approx(distance, abs=1e-9)


@pytest.mark.parametrize(("at_32", "at_128"), [(0.9, 1.5), (1.5, 0.9)])
def test_tie_goes_to_the_lower_speedup(at_32, at_128):
    estimate = look_up((16, 16, 64), make_point(16, 16, 32, at_32), make_point(16, 16, 128, at_128))
    assert (estimate.speedup, estimate.distance) == (0.9, 1.0)


@pytest.mark.parametrize(("more_m", "more_n"), [(0.9, 1.5), (1.5, 0.9)])
def test_tie_holds_where_rounding_makes_one_distance_smaller(more_m, more_n):
    """log2(416) - log2(208) is 1 + 9e-16 in floating point, log2(32) - log2(16) is 1."""
    estimate = look_up((16, 16, 208), make_point(32, 16, 208, more_m), make_point(16, 16, 416, more_n))
    assert estimate.speedup == 0.9


def test_closer_point_beats_the_lower_speedup():
    estimate = look_up((16, 16, 80), make_point(16, 16, 32, 0.9), make_point(16, 16, 128, 1.5))
    assert estimate.speedup == 1.5


def test_times_scale_with_the_work_and_the_speedup_does_not():
    estimate = look_up((32, 16, 48), make_point(32, 16, 32, 2.0, bf16_us=(10.0, 20.0), spread=1.25))
    assert (estimate.speedup, estimate.speedup_low, estimate.speedup_high) == (2.0, 1.6, 2.5)
    times = (estimate.bf16_fwd_us, estimate.bf16_bwd_us, estimate.fp8_fwd_us, estimate.fp8_bwd_us)
    assert times == pytest.approx((15.0, 30.0, 7.5, 15.0))


@pytest.mark.parametrize("status", ["out_of_memory", "unstable", "failed", "noisy"])
@pytest.mark.parametrize("kind", ["nearest", "interpolate"])
def test_point_without_numbers_is_a_gap_and_never_a_value(status, kind):
    gap, measured = make_point(16, 16, 64, status=status), make_point(16, 16, 256, 1.25)
    for n in (64, 96):  # the gap itself, and a shape nearer to it than to the measured point
        estimate = look_up((16, 16, n), gap, measured, kind=kind)
        assert (estimate.point, estimate.speedup, estimate.gap) == (measured, 1.25, status)


@pytest.mark.parametrize("n", [128, 160, 256])
def test_point_without_numbers_that_is_no_nearer_is_no_gap(n):
    estimate = look_up((16, 16, n), make_point(16, 16, 64, status="failed"), make_point(16, 16, 256, 1.25))
    assert (estimate.speedup, estimate.gap) == (1.25, None)


def test_nearest_of_several_gaps_is_reported():
    points = [make_point(16, 16, 32, status="failed"), make_point(16, 16, 64, status="unstable")]
    assert look_up((16, 16, 80), *points, make_point(16, 16, 256)).gap == "unstable"


def test_ambiguous_point_has_a_value():
    assert look_up((16, 16, 16), make_point(16, 16, 16, 1.01, status="ambiguous")).speedup == 1.01


@pytest.mark.parametrize("kind", ["nearest", "interpolate"])
@pytest.mark.parametrize(
    ("shape", "outside"),
    [
        ((16, 32, 64), False),
        ((64, 128, 256), False),
        ((48, 48, 100), False),
        ((15, 32, 64), True),
        ((65, 32, 64), True),
        ((16, 31, 64), True),
        ((16, 129, 64), True),
        ((16, 32, 63), True),
        ((16, 32, 257), True),
    ],
)
def test_shape_outside_the_measured_range_is_flagged(shape, outside, kind):
    corners = [make_point(*sizes) for sizes in itertools.product((16, 64), (32, 128), (64, 256))]
    assert look_up(shape, *corners, kind=kind).outside is outside


@pytest.mark.parametrize(("status", "outside"), [("out_of_memory", True), ("measured", False)])
def test_point_without_numbers_does_not_widen_the_range(status, outside):
    points = [make_point(16, 16, 16), make_point(16, 16, 64, status=status)]
    assert look_up((16, 16, 48), *points).outside is outside


@pytest.mark.parametrize("kind", ["nearest", "interpolate"])
@pytest.mark.parametrize(("n", "outside"), [(48, False), (64, False), (65, True), (512, True)])
def test_a_point_off_the_grid_does_not_widen_the_range(n, outside, kind):
    """A single point far away, measured for one model, says nothing of the shapes between it and the grid."""
    points = [make_point(16, 16, n) for n in (16, 32, 64, 1024)]
    assert look_up((16, 16, n), *points, kind=kind, grid=Grid(m=(16,), k=(16,), n=(16, 32, 64))).outside is outside


@pytest.mark.parametrize("kind", ["nearest", "interpolate"])
def test_table_without_numbers_says_nothing(kind):
    table = make_table(make_point(16, 16, 16, status="failed"), make_point(16, 16, 32, status="out_of_memory"))
    assert Lookup(table, kind)(LinearShape(16, 16, 16)) is None


def test_unknown_lookup_is_refused():
    with pytest.raises(InputError, match="lookup: expected one of nearest, interpolate; got 'linear'"):
        Lookup(make_table(make_point(16, 16, 16)), "linear")


# --- interpolate -----------------------------------------------------------------------------------------------


def test_interpolation_is_of_logarithms_between_octaves():
    points = [
        make_point(16, 16, 16, 0.5, bf16_us=(1.0, 10.0), spread=1.25),
        make_point(16, 16, 64, 2.0, bf16_us=(4.0, 1000.0), spread=1.25),
    ]
    estimate = look_up((16, 16, 32), *points, kind="interpolate")
    assert estimate.interpolated
    numbers = (estimate.speedup, estimate.speedup_low, estimate.speedup_high)
    times = (estimate.bf16_fwd_us, estimate.bf16_bwd_us, estimate.fp8_fwd_us, estimate.fp8_bwd_us)
    assert numbers == pytest.approx((1.0, 0.8, 1.25))
    assert times == pytest.approx((2.0, 100.0, 2.0, 100.0))
    assert (estimate.point.speedup, estimate.distance, estimate.outside) == (0.5, 1.0, False)


def test_interpolation_weighs_all_eight_corners():
    """A quarter of the way along each axis the weights are 27/64, 9/64, 3/64 and 1/64, from near to far."""
    corners = list(itertools.product((16, 256), repeat=3))
    for corner in corners:
        points = [make_point(*sizes, math.e if sizes == corner else 1.0) for sizes in corners]
        estimate = look_up((32, 32, 32), *points, kind="interpolate")
        assert math.log(estimate.speedup) == pytest.approx(math.prod({16: 0.75, 256: 0.25}[s] for s in corner))


@pytest.mark.parametrize("missing", ["absent", "failed", "out_of_memory"])
def test_interpolation_needs_every_corner(missing):
    points = [make_point(16, 16, n, speedup) for n, speedup in [(16, 0.5), (64, 1.5), (256, 2.5)]]
    if missing == "absent":
        points.pop()
    else:
        points[-1] = make_point(16, 16, 256, status=missing)
    grid = Grid(m=(16,), k=(16,), n=(16, 64, 256))
    without = look_up((16, 16, 96), *points, kind="interpolate", grid=grid)
    assert (without.interpolated, without.speedup) == (False, 1.5)
    elsewhere = look_up((16, 16, 32), *points, kind="interpolate", grid=grid)
    assert (elsewhere.interpolated, elsewhere.speedup) == (True, pytest.approx(math.sqrt(0.5 * 1.5)))


def test_where_a_corner_was_not_measured_fewer_tokens_stand_in():
    """The largest shapes of a grid are left out, and a large product's speedup depends little on the tokens."""
    grid = Grid(m=(16, 64, 256), k=(16,), n=(16, 64))
    measured = [(16, 16, 1.0), (16, 64, 1.0), (64, 16, 2.0), (64, 64, 0.5), (256, 16, 3.0)]
    points = [make_point(m, 16, n, speedup, bf16_us=(m * n, 2.0 * m * n)) for m, n, speedup in measured]
    estimate = look_up((128, 16, 32), *points, kind="interpolate", grid=grid)
    assert (estimate.interpolated, estimate.speedup) == (True, pytest.approx(1.0))  # of 2.0 and 0.5, at 64 tokens
    assert estimate.bf16_us == pytest.approx(3 * 128 * 32)  # the time is that of all tokens
    assert (estimate.outside, estimate.from_tokens) == (True, 64)


def test_the_nearest_point_is_nearer_than_much_fewer_tokens():
    grid = Grid(m=(16, 64, 256), k=(16,), n=(16, 64))
    points = [make_point(m, 16, n, speedup) for m, n, speedup in [(16, 16, 0.5), (16, 64, 0.5), (256, 16, 3.0)]]
    estimate = look_up((256, 16, 32), *points, kind="interpolate", grid=grid)
    assert (estimate.interpolated, estimate.speedup, estimate.distance) == (False, 3.0, 1.0)
    assert (estimate.outside, estimate.from_tokens) == (True, None)


def test_interpolation_is_the_default():
    points = [make_point(16, 16, 16, 0.5), make_point(16, 16, 64, 2.0)]
    assert Lookup(make_table(*points))(LinearShape(16, 16, 32)).speedup == pytest.approx(1.0)


def test_interpolation_without_a_grid_is_nearest():
    points = [make_point(16, 16, 16, 0.5), make_point(16, 16, 64, 2.0)]
    estimate = look_up((16, 16, 48), *points, kind="interpolate", grid=Grid())
    assert (estimate.interpolated, estimate.speedup) == (False, 2.0)


def test_measured_point_off_the_grid_is_not_interpolated_over():
    grid_points = [make_point(16, 16, 16, 0.5), make_point(16, 16, 64, 2.0)]
    off_grid = make_point(16, 16, 32, 3.0)
    grid = Grid(m=(16,), k=(16,), n=(16, 64))
    assert look_up((16, 16, 32), *grid_points, off_grid, kind="interpolate", grid=grid).speedup == 3.0
    assert look_up((16, 16, 32), *grid_points, kind="interpolate", grid=grid).speedup == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("n", "speedup", "trend", "bf16_us"), [(8, 0.25, 0.5, 15.0), (4, 0.125, 0.25, 7.5), (128, 2.0, 1.0, 240.0)]
)
def test_outside_the_speedup_goes_on_falling_and_never_rises(n, speedup, trend, bf16_us):
    """It falls by half per octave towards 16 columns, and rises towards 64."""
    points = [
        make_point(16, 16, 16, 0.5, bf16_us=(10.0, 20.0)),
        make_point(16, 16, 64, 2.0, bf16_us=(40.0, 80.0)),
    ]
    estimate = look_up((16, 16, n), *points, kind="interpolate")
    assert (estimate.outside, estimate.interpolated) == (True, True)
    assert (estimate.speedup, estimate.trend) == (pytest.approx(speedup), pytest.approx(trend))
    assert estimate.bf16_us == pytest.approx(bf16_us)
    assert estimate.fp8_us == pytest.approx(bf16_us / speedup)


@pytest.mark.parametrize("kind", ["nearest", "interpolate"])
def test_fewer_rows_than_were_measured_are_never_said_to_win(kind):
    """The measured trend of an H200's w1 of Llama 3 8B: 1.34 at 2048 tokens, 1.10 at 1024."""
    points = [make_point(m, 4096, 14336, speedup) for m, speedup in ((1024, 1.10), (2048, 1.34), (4096, 1.45))]
    below = [look_up((m, 4096, 14336), *points, kind=kind) for m in (512, 256, 128)]
    assert [one.speedup for one in below] == pytest.approx([1.10 * (1.10 / 1.34) ** octaves for octaves in (1, 2, 3)])
    assert all(one.is_unsure(1.05) and one.outside for one in below)
    assert look_up((64, 4096, 14336), *points, kind=kind).is_far_outside


def test_the_answer_outside_is_sure_where_border_and_trend_agree():
    falling = [make_point(16, 16, 16, 1.5), make_point(16, 16, 32, 2.0)]
    outside = look_up((16, 16, 8), *falling, kind="interpolate")
    assert outside.speedup == pytest.approx(1.125)
    assert (outside.is_unsure(1.05), outside.is_unsure(1.2), outside.is_unsure(1.6)) == (False, True, False)


def test_without_a_second_size_there_is_no_trend():
    outside = look_up((16, 16, 8), make_point(16, 16, 16, 1.5), kind="interpolate")
    assert (outside.speedup, outside.trend, outside.is_unsure(1.05)) == (1.5, None, True)


def test_where_the_largest_were_not_measured_fewer_tokens_tell_the_trend():
    points = [make_point(m, 16, n, 2.0 - n / 64) for m in (16, 32) for n in (16, 32, 64) if (m, n) != (32, 64)]
    outside = look_up((32, 16, 128), *points, kind="interpolate")
    assert outside.trend == pytest.approx(1.0 / 1.5)


def test_interpolation_outside_on_one_axis_still_interpolates_on_the_others():
    points = [make_point(16, 16, 16, 0.5), make_point(16, 16, 64, 2.0)]
    assert look_up((16, 1024, 32), *points, kind="interpolate").speedup == pytest.approx(1.0)


# --- properties ------------------------------------------------------------------------------------------------

AXIS = (16, 64, 256)
axis_sizes = st.sampled_from([16, 24, 32, 48, 64, 96, 128, 192, 256])
"""Powers of two and their products with 1.5: many shapes are equally far apart, none nearly so."""
shapes = st.builds(LinearShape, axis_sizes, axis_sizes, axis_sizes)
speedups = st.floats(0.25, 4.0)
any_size = st.integers(1, 4096)
inside_size = st.integers(AXIS[0], AXIS[-1])


@st.composite
def sparse_points(draw):
    """Up to 12 points, some without numbers, at least one with."""
    chosen = draw(st.lists(shapes, min_size=1, max_size=12, unique=True))
    statuses = st.sampled_from(["measured", "measured", "ambiguous", "failed", "out_of_memory"])
    made = [make_point(s.m, s.k, s.n, draw(speedups), status=draw(statuses)) for s in chosen[1:]]
    return [make_point(chosen[0].m, chosen[0].k, chosen[0].n, draw(speedups)), *made]


def octaves(a: LinearShape, b: LinearShape) -> float:
    return math.sqrt(math.log2(a.m / b.m) ** 2 + math.log2(a.k / b.k) ** 2 + math.log2(a.n / b.n) ** 2)


@given(sparse_points(), shapes)
def test_nearest_agrees_with_brute_force(points, shape):
    measured = [p for p in points if p.speedup is not None]
    best = min(octaves(shape, p.shape) for p in measured)
    lowest = min(p.speedup for p in measured if octaves(shape, p.shape) < best + 1e-6)
    nearer = [p for p in points if p.speedup is None and octaves(shape, p.shape) < best - 1e-6]
    gap_at = min((octaves(shape, p.shape) for p in nearer), default=None)
    gaps = {p.status for p in nearer if octaves(shape, p.shape) < gap_at + 1e-6}
    estimate = look_up((shape.m, shape.k, shape.n), *points)
    assert estimate.speedup == estimate.point.speedup == lowest
    assert estimate.distance == pytest.approx(best, abs=1e-8)
    assert estimate.gap in gaps if gaps else estimate.gap is None


irregular_shapes = st.builds(LinearShape, any_size, any_size, any_size)
few_speedups = st.sampled_from([0.5, 1.0, 2.0])


@given(
    st.lists(st.one_of(shapes, irregular_shapes), min_size=1, max_size=30, unique=True),
    st.lists(few_speedups, min_size=30, max_size=30),
    st.one_of(shapes, irregular_shapes),
)
def test_nearest_is_exactly_that_of_a_search_over_all_points(places, values, shape):
    """Also of points on no common axes, and of ties: the lower speedup counts, then the smaller sizes."""
    points = [make_point(p.m, p.k, p.n, speedup) for p, speedup in zip(places, values, strict=False)]
    logs = [[math.log2(size) for size in (s.m, s.k, s.n)] for s in (shape, *places)]
    squares = [sum((a - b) ** 2 for a, b in zip(place, logs[0], strict=True)) for place in logs[1:]]
    expected = min(zip((round(x, DISTANCE_DIGITS) for x in squares), values, places, points, strict=False))
    estimate = look_up((shape.m, shape.k, shape.n), *points)
    assert estimate.point == expected[-1]
    assert estimate.distance == pytest.approx(math.sqrt(expected[0]), abs=1e-6)


@pytest.mark.parametrize("spread", ["everywhere", "equally far"])
def test_a_search_computes_each_distance_at_most_once(monkeypatch, spread):
    """Points on no common axes: a search by axes would look at 40^3 combinations of their sizes."""
    count = 40
    if spread == "everywhere":
        places = [(1000 + 7 * i, 1000 + 11 * i * i % 997, 1000 + 13 * i * i % 991) for i in range(count)]
    else:
        angles = [math.pi / 2 * (i + 0.5) / count for i in range(count)]
        places = [(4096, round(4096 * 2 ** math.cos(a)), round(4096 * 2 ** math.sin(a))) for a in angles]
    lookup = Lookup(make_table(*(make_point(*place) for place in places), grid=Grid()))
    rounded = []
    monkeypatch.setattr(nearest_module, "round", lambda *args: rounded.append(args) or round(*args), raising=False)
    most = 0
    for shape in [(4096, 4096, 4096), (1, 1, 1), (1100, 1450, 1560)]:
        rounded.clear()
        lookup(LinearShape(*shape))
        most = max(most, len(rounded))
    assert count < most <= 3 * count + 3  # of m, of m and k, of all three; and of the nearest sizes on each axis


@given(sparse_points(), st.sampled_from(["nearest", "interpolate"]))
def test_every_measured_point_is_its_own_answer(points, kind):
    lookup = Lookup(make_table(*points), kind)
    for point in points:
        estimate = lookup(point.shape)
        if point.speedup is None:
            assert estimate.point != point
        else:
            assert (estimate.point, estimate.speedup) == (point, point.speedup)
            assert (estimate.distance, estimate.outside, estimate.gap) == (0.0, False, None)


slopes = st.floats(-0.25, 0.25)


@given(st.tuples(slopes, slopes, slopes, slopes), inside_size, inside_size, inside_size)
def test_interpolation_of_a_linear_table_is_exact(terms, m, k, n):
    def speedup(*sizes):
        return math.exp(terms[0] + sum(t * math.log2(size) for t, size in zip(terms[1:], sizes, strict=True)))

    table = make_table(*(make_point(*sizes, speedup(*sizes)) for sizes in itertools.product(AXIS, repeat=3)))
    estimate = Lookup(table, "interpolate")(LinearShape(m, k, n))
    assert estimate.speedup == pytest.approx(speedup(m, k, n), rel=1e-9)


def around(size: int) -> list[int]:
    """The axis values on both sides of a size moved into the grid."""
    size = min(max(size, AXIS[0]), AXIS[-1])
    return [max(a for a in AXIS if a <= size), min(a for a in AXIS if a >= size)]


@given(st.lists(speedups, min_size=27, max_size=27), any_size, any_size, any_size)
def test_interpolation_stays_between_its_corners(values, m, k, n):
    grid = list(itertools.product(AXIS, repeat=3))
    by_shape = dict(zip(grid, values, strict=True))
    lookup = Lookup(make_table(*(make_point(*sizes, by_shape[sizes]) for sizes in grid)), "interpolate")
    corners = [by_shape[sizes] for sizes in itertools.product(around(m), around(k), around(n))]
    estimate = lookup(LinearShape(m, k, n))
    assert 0 < estimate.trend <= 1
    assert min(corners) * (1 - 1e-9) <= estimate.speedup / estimate.trend <= max(corners) * (1 + 1e-9)
    assert estimate.speedup_low <= estimate.speedup <= estimate.speedup_high


def test_farther_outside_the_answer_does_not_jump():
    """The fallback to fewer tokens counts distances from the border, not from a shape far beyond it."""
    slow, fast = 0.5, 2.0
    points = [make_point(16, 16, 16, fast), make_point(16, 64, 16, fast), make_point(4096, 16, 16, slow)]
    speedups = [look_up((4096, k, 16), *points, kind="interpolate").speedup for k in (64, 256, 1024, 2**12, 2**14)]
    assert all(speedup < 1 for speedup in speedups)


# --- committed tables ------------------------------------------------------------------------------------------

TABLES = sorted((Path(fp8gate.__file__).parent / "thresholds").glob("*/*.yaml"))


class SearchingLookup(Lookup):
    """Looks for the smallest measured box anew for each shape, among the sizes around it and those two steps apart."""

    def _blend_wider(self, shape: LinearShape) -> list[float] | None:
        sides = []
        for axis, size in zip(self._grid, (shape.m, shape.k, shape.n), strict=True):
            around = axis.bracket(size)[1]
            sides.append([(math.log2(around[-1][0] / around[0][0]), around)] if around else [])
            for low, high in zip(axis.sizes, axis.sizes[2:], strict=False):
                if low < size < high:
                    width = math.log2(high) - math.log2(low)
                    share = (math.log2(size) - math.log2(low)) / width
                    sides[-1].append((width, [(low, 1.0 - share), (high, share)]))
        boxes = sorted(itertools.product(*sides), key=lambda box: sum(width for width, _ in box))
        return next((found for box in boxes if (found := self._blend(*(around for _, around in box)))), None)


@pytest.mark.parametrize("path", TABLES, ids=[f"{path.parent.name}-{path.stem}" for path in TABLES])
def test_shapes_that_share_a_box_are_answered_as_by_a_search_for_each(path):
    table, rng = read_table(path), random.Random(0)
    lookup, searching = Lookup(table), SearchingLookup(table)
    on_grid = [LinearShape(m, k, n) for m in table.grid.m for k in table.grid.k for n in table.grid.n]
    off_grid = [LinearShape(*(round(2 ** rng.uniform(6, 17)) for _ in range(3))) for _ in range(1000)]
    for shape in [*on_grid, *off_grid]:
        assert lookup(shape) == searching(shape)
