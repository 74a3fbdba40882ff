"""Tokens that are no multiple of 128: what a sweep measures of them, what a table states, what the filter answers."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import msgspec
import pytest
from builders import PROTOCOL, make_point, make_table
from test_sweep import (  # noqa: F401  # fixtures
    _calm_host,
    _own_device_lock,
    _quick_points,
    record_of,
    repeats_wanted,
    run,
    script,
    stopped_after,
    tables_in,
)
from typer.testing import CliRunner

from fp8gate import auto_filter
from fp8gate.calibrate.device.cpu import Cpu
from fp8gate.calibrate.grid.grid import grid_shapes
from fp8gate.calibrate.grid.unaligned import unaligned_factor, unaligned_shapes, with_fewer_tokens
from fp8gate.calibrate.points.point_record import CONTROL
from fp8gate.cli import app
from fp8gate.filter.contract.bounds import Unaligned
from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.contract.table import Grid, Incomplete, read_table, write_tables
from fp8gate.filter.decision.decide import decide
from fp8gate.filter.decision.lookup import Lookup

SIZES = tuple(range(16, 176, 16))
GRID = Grid(m=(128,), k=SIZES, n=SIZES)
SHAPES = grid_shapes(GRID)
FEWER = {LinearShape(112, shape.k, shape.n) for shape in SHAPES}


def unaligned(factor=0.9):
    return msgspec.structs.replace(PROTOCOL, unaligned=Unaligned(points=8, factor=factor))


# Which points.


def chosen(speedups, measured=(), count=8, seed=0):
    return unaligned_shapes(speedups, measured, count=count, seed=seed)


def test_points_near_break_even_are_measured_with_16_tokens_fewer():
    near = SHAPES[:20]
    found = chosen({"rowwise": {shape: 1.1 if shape in near else 2.0 for shape in SHAPES}})
    assert len(set(found)) == len(found) == 8
    assert set(found) < {with_fewer_tokens(shape) for shape in near}
    assert chosen({"rowwise": dict.fromkeys(SHAPES, 1.3)}) == chosen({"rowwise": dict.fromkeys(SHAPES, 0.75)}) == []


def test_recipes_share_points_and_each_has_its_own_where_it_must():
    shared = dict.fromkeys(SHAPES, 1.0)
    assert len(chosen({"rowwise": shared, "tensorwise": shared})) == 8
    apart = {"rowwise": dict.fromkeys(SHAPES[:50], 1.0), "tensorwise": dict.fromkeys(SHAPES[50:], 1.0)}
    assert len(chosen(apart)) == 16


def test_what_was_measured_counts_and_the_seed_decides_the_rest():
    speedups = {"rowwise": dict.fromkeys(SHAPES, 1.0)}
    some = chosen(speedups, count=5)
    rest = chosen(speedups, measured=some)
    assert (len(rest), set(some) & set(rest)) == (3, set())
    assert chosen(speedups, measured=[*some, *rest]) == []
    assert chosen(speedups) == [*some, *rest] != chosen(speedups, seed=1)


def test_points_whose_tokens_are_no_multiple_of_128_are_not_asked_again():
    assert chosen({"rowwise": dict.fromkeys(FEWER, 1.0)}) == []


# The factor.


def test_the_factor_is_the_median_of_what_points_near_break_even_lose():
    speedups = dict.fromkeys(SHAPES[:5], 1.0) | {SHAPES[5]: 2.0, SHAPES[6]: 1.1}
    with_fewer = dict(zip(map(with_fewer_tokens, SHAPES[:6]), (0.98, 0.9, 0.8, 0.93, 0.95, 0.2), strict=True))
    assert unaligned_factor(speedups, with_fewer) == Unaligned(points=5, factor=0.93)
    del with_fewer[with_fewer_tokens(SHAPES[0])]
    assert unaligned_factor(speedups, with_fewer) is None


# A sweep.


@pytest.fixture
def measure(run, script, monkeypatch):  # noqa: F811
    """Sweeps as a GPU does: so many points with fewer tokens, at which rowwise is a tenth slower."""

    def answer(task, recipes):
        record = record_of(task, ["tensorwise"], speedup=1.0, process=8 if task.repeat else 7)
        slower = record_of(task, ["rowwise"], speedup=1.0 if task.shape.is_aligned else 0.9)
        arms = {**record.arms, **slower.arms}
        asked = {name: arm for name, arm in arms.items() if name in ("bf16", CONTROL, *recipes)}
        return msgspec.structs.replace(record, arms=asked)

    script.answer = answer
    repeats_wanted(monkeypatch, 4)
    monkeypatch.setattr(Cpu, "defaults", dataclasses.replace(Cpu.defaults, unaligned_points=5))
    return lambda shapes=SHAPES, **options: run(
        shapes, **{"recipes": ["tensorwise", "rowwise"], "grid": GRID, "workers": 2, **options}
    )


def fewer_measured(script):  # noqa: F811
    return [shape for shape in script.repeats if not shape.is_aligned]


def test_a_sweep_states_a_factor_for_each_recipe_and_no_rows_for_it(measure, script, tmp_path, capsys):  # noqa: F811
    result = measure()
    assert len(fewer_measured(script)) == 5
    assert set(fewer_measured(script)) < FEWER
    assert "5 points are to be measured with 16 tokens fewer" in capsys.readouterr().err
    found = {table.recipe: table.protocol.unaligned for table in result.tables.values()}
    assert found == {"tensorwise": Unaligned(points=5, factor=1.0), "rowwise": Unaligned(points=5, factor=0.9)}
    assert all({point.shape for point in table.points} == set(SHAPES) for table in result.tables.values())
    before, asked = tables_in(tmp_path), len(script.asked)
    measure()
    assert (tables_in(tmp_path), len(script.asked)) == (before, asked)


def test_a_stopped_sweep_measures_as_many_as_one_that_is_not(measure, script, stopped_after):  # noqa: F811
    repeats = 5 + 4  # a twentieth of the points comes before them
    stopped = measure(stop_after_s=stopped_after(len(SHAPES) + repeats - 2))
    assert 0 < len(fewer_measured(script)) < 5
    assert all(table.protocol.unaligned is None for table in stopped.incomplete.values())
    assert {table.protocol.unaligned.points for table in measure().tables.values()} == {5}
    assert len(set(fewer_measured(script))) == len(fewer_measured(script)) == 5


def test_a_recipe_of_a_later_call_has_points_of_its_own(measure, script):  # noqa: F811
    measure(recipes=["rowwise"])
    (table,) = measure(recipes=["tensorwise"]).tables.values()
    assert table.protocol.unaligned == Unaligned(points=5, factor=1.0)
    for table in measure().tables.values():  # both, of which nothing is missing
        assert table.protocol.unaligned.points == 5
    assert len(fewer_measured(script)) == 5 + 5


def test_a_row_is_lost_though_its_shape_was_measured_with_fewer_tokens(measure, script):  # noqa: F811
    """Such measurements give no row."""
    (path, *_) = measure().tables
    table, shape = read_table(path), fewer_measured(script)[0]
    with_row = sorted([*table.points, make_point(shape.m, shape.k, shape.n, 0.9)], key=lambda point: point.shape)
    write_tables({path: msgspec.structs.replace(table, points=tuple(with_row))})
    with pytest.raises(InputError, match="1 of its points are not in this sweep and would be lost"):
        measure()


def test_repeats_of_another_recipe_are_not_counted_as_taken(measure, stopped_after):  # noqa: F811
    measure(recipes=["rowwise"])
    for table in measure(stop_after_s=stopped_after(3)).incomplete.values():
        assert table.incomplete == Incomplete(measured=3, of=len(SHAPES) + 5)  # and a twentieth of the points again


@pytest.mark.parametrize("options", [{"shapes": SHAPES[:99]}, {"grid": Grid()}, {"workers": 0}])
def test_small_grids_single_shapes_and_a_process_alone_measure_none(measure, script, options):  # noqa: F811
    (table, _) = measure(**options).tables.values()
    assert fewer_measured(script) == []
    assert table.protocol.unaligned is None


# The filter.

POINTS = [make_point(128, k, n, n / 128) for k in (64, 256) for n in (64, 256)]
POINTS += [make_point(256, k, n, n / 128) for k in (64, 256) for n in (64, 256)]


@pytest.mark.parametrize("kind", ["interpolate", "nearest"])
@pytest.mark.parametrize("tokens", [144, 192, 208, 320, 112])
def test_a_speedup_between_multiples_of_128_is_multiplied_with_its_bounds(kind, tokens):
    shape = LinearShape(tokens, 128, 250)
    plain = Lookup(make_table(*POINTS), kind)(shape)
    slower = Lookup(make_table(*POINTS, protocol=unaligned(0.9)), kind)(shape)
    for field in ("speedup", "speedup_low", "speedup_high"):
        assert getattr(slower, field) == pytest.approx(0.9 * getattr(plain, field))
    assert (plain.unaligned, slower.unaligned) == (None, 0.9)
    assert (slower.bf16_us, slower.fp8_us) == pytest.approx((plain.bf16_us, plain.fp8_us / 0.9))
    again = plain.recomputed().speedup / plain.speedup
    assert slower.recomputed().speedup / slower.speedup == pytest.approx(again)


def test_multiples_of_128_and_measured_shapes_are_left_as_they_are():
    measured = make_point(144, 64, 64, 0.7)
    grid = Grid(m=(128, 256), k=(64, 256), n=(64, 256))
    with_factor, without = (
        Lookup(make_table(*POINTS[:4], measured, *POINTS[4:], grid=grid, protocol=protocol))
        for protocol in (unaligned(), PROTOCOL)
    )
    for shape in (LinearShape(128, 100, 100), LinearShape(384, 128, 128), measured.shape):
        assert with_factor(shape) == without(shape)


@pytest.mark.parametrize(("kind", "factor"), [("interpolate", 0.9), ("nearest", 1.0)])
def test_a_point_off_the_grid_has_it_in_itself_and_not_in_what_is_interpolated_beside_it(kind, factor):
    grid = Grid(m=(128, 256), k=(64, 256), n=(64, 256))
    points = [*POINTS[:4], make_point(144, 128, 128, 0.7), *POINTS[4:]]
    lookup = Lookup(make_table(*points, grid=grid, protocol=unaligned(0.9)), kind)
    assert lookup(LinearShape(144, 128, 144)).unaligned == factor
    assert lookup(LinearShape(144, 128, 128)).unaligned == 1.0


def test_points_that_were_measured_with_such_tokens_have_it_in_them():
    points = [make_point(m, 64, n, 1.2) for m in (144, 208) for n in (64, 256)]
    assert Lookup(make_table(*points, protocol=unaligned()))(LinearShape(176, 64, 128)).speedup == pytest.approx(1.2)


@pytest.mark.parametrize("kind", ["interpolate", "nearest"])
@pytest.mark.parametrize("changed", [{}, {"recomputed": True}, {"is_frozen": True}])
@pytest.mark.parametrize("tokens", [144, 112, 320])
def test_without_a_factor_every_such_answer_says_that_it_is_of_other_tokens(kind, changed, tokens):
    for protocol, expected in ((PROTOCOL, None), (unaligned(0.9), 0.9)):
        lookup = Lookup(make_table(*POINTS, protocol=protocol), kind)
        found = decide(LinearShape(tokens, 128, 256), lookup, min_speedup=1.05, **changed)
        assert found.unaligned == expected
        assert ("from multiples of 128 tokens" in found.reason) is (expected is None)
        assert ("times 0.90" in found.reason) is (expected is not None)


def test_the_decision_is_taken_with_it_and_the_reason_says_so():
    points = [make_point(m, 64, 64, 1.1) for m in (128, 256)]
    for protocol, convert, reason in (
        (PROTOCOL, True, "interpolated, from multiples of 128 tokens"),
        (unaligned(0.931), False, "below 1.05x, interpolated, times 0.93"),
    ):
        lookup = Lookup(make_table(*points, protocol=protocol))
        found = decide(LinearShape(176, 64, 64), lookup, min_speedup=1.05)
        assert (found.convert, found.reason) == (convert, reason)
        assert decide(LinearShape(256, 64, 64), lookup, min_speedup=1.05).convert


LAYERS = [("w1", 4096, 14336), ("w2", 14336, 4096)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("device", "says_so"), [("H200", True), ("H100", False)])
def test_explain_and_the_summary_say_once_where_the_packaged_tables_have_no_factor(device, says_so):
    said = "nswered from multiples of 128 tokens, with which float8 is 1 to 9 % faster: "
    for recipe in ("rowwise", "all"):
        asked = ["explain", "llama3-8b", "--recipe", recipe, "--tokens", "8000", "--device", device]
        stdout = CliRunner().invoke(app, asked).stdout
        assert stdout.count(f"A{said}wq, wk, wv, wo, w1, w3, w2, output. To") == says_so
    wants_float8 = auto_filter("rowwise", tokens=8000, device=device)
    wants_float8.check([(name, SimpleNamespace(in_features=k, out_features=n)) for name, k, n in LAYERS])
    assert wants_float8.summary().count(f"a{said}w1, w2") == says_so


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("recipe", "factors"),
    [("rowwise", "rowwise 0.92"), ("all", "rowwise_with_gw_hp 0.98, rowwise 0.92, tensorwise 0.93")],
)
def test_explain_says_once_what_a_factor_is_for(recipe, factors):
    asked = ["explain", "llama3-8b", "--recipe", recipe, "--tokens", "8000", "--device", "H100"]
    stdout = CliRunner().invoke(app, asked).stdout
    assert stdout.count("multiple of 128") == 1
    slower = "Float8 is slower with 8000 tokens, no multiple of 128, than with 8064."
    assert f"\n\n{slower} Speedups are multiplied by a factor for that: {factors}.\n\n" in stdout


@pytest.mark.filterwarnings("ignore")
def test_a_report_says_once_what_a_factor_is_for():
    for tokens, expected in ((8000, 1), (8064, 0)):
        wants_float8 = auto_filter("rowwise", tokens=tokens, device="H100")
        wants_float8.check([(name, SimpleNamespace(in_features=k, out_features=n)) for name, k, n in LAYERS])
        assert wants_float8.report().count("multiple of 128") == expected
        assert ("times 0.92, as the tokens are no multiple of 128: w1, w2" in wants_float8.summary()) is bool(expected)
