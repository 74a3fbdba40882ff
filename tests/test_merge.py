"""Several tables of one set-up become one, whatever their order."""

from __future__ import annotations

import hashlib
import itertools
import math
from datetime import timedelta
from pathlib import Path
from statistics import NormalDist

import pytest
from builders import DEVICE, MEASURED_AT, PROTOCOL, SOFTWARE_HERE, make_table
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import replaced

from fp8gate.calibrate.comparison.merge import combine_points, merge_tables
from fp8gate.filter.contract.bounds import Spread, Unaligned
from fp8gate.filter.contract.merged_sweep import MergedSweep
from fp8gate.filter.contract.recipes import RECIPES
from fp8gate.filter.contract.table import Grid, Point, TableError, format_table, parse_table, read_table


def point(speedup=1.5, half=0.01, *, n=48, status="measured", bf16_us=90.0):
    """Bounds `half` away on the scale of ln(speedup); bf16 takes a third of its time forward."""
    fp8_us = bf16_us / speedup
    low, high = speedup * math.exp(-half), speedup * math.exp(half)
    return Point(16, 32, n, bf16_us / 3, bf16_us * 2 / 3, fp8_us / 3, fp8_us * 2 / 3, speedup, low, high, status)


def missing(status, n=48):
    return Point(16, 32, n, *[None] * 7, status)


WIDTH = 1.25  # of bounds; wider ones are noise
QUOTIENTS = replaced(PROTOCOL, estimate="quotient_of_times")


def combined(*points, protocol=PROTOCOL):
    return combine_points(points, protocol, WIDTH)


def quotient(point):
    return (point.bf16_fwd_us + point.bf16_bwd_us) / (point.fp8_fwd_us + point.fp8_bwd_us)


def test_points_that_agree_are_averaged_and_their_bounds_shrink():
    both = combined(point(1.5, 0.02), point(1.5, 0.02))
    assert both.speedup == 1.5
    assert math.log(both.speedup_high / both.speedup) == pytest.approx(0.02 / math.sqrt(2), rel=0.03)


def test_the_more_exact_point_counts_more():
    """Weights 4 to 1 on the logarithms."""
    both = combined(point(1.50, 0.01), point(1.51, 0.02))
    assert both.speedup == pytest.approx(math.exp((4 * math.log(1.50) + math.log(1.51)) / 5), rel=1e-3)


def test_where_points_differ_by_more_than_their_bounds_those_cover_all():
    both = combined(point(1.4, 0.01), point(1.6, 0.01))
    assert both.speedup == pytest.approx(math.sqrt(1.4 * 1.6), rel=1e-3)
    assert both.speedup_low == pytest.approx(1.4 * math.exp(-0.01), rel=1e-3)
    assert both.speedup_high == pytest.approx(1.6 * math.exp(0.01), rel=1e-3)


@pytest.mark.parametrize(("chi_squared", "covers_all"), [(0.7, False), (1.4, True)])
def test_two_points_cover_each_other_from_a_chi_squared_of_one_on(chi_squared, covers_all):
    """One degree of freedom: the deviation from the mean, in units of the points' own, that is expected by chance."""
    half, z = 0.02, NormalDist().inv_cdf((1 + PROTOCOL.confidence) / 2)
    apart = math.sqrt(2 * chi_squared) * half / z
    both = combined(point(1.5, half), point(1.5 * math.exp(apart), half))
    mean = math.log(1.5) + apart / 2
    low = math.log(1.5) - half if covers_all else mean - half / math.sqrt(2)
    assert math.log(both.speedup_low) == pytest.approx(low, abs=5e-4)


def test_times_are_averaged_with_the_same_weights_so_that_they_fit_the_speedup():
    both = combined(point(1.5, 0.01, bf16_us=90.0), point(1.52, 0.02, bf16_us=99.0))
    assert quotient(both) == pytest.approx(both.speedup, rel=1e-3)
    assert 90.0 < both.bf16_fwd_us + both.bf16_bwd_us < 94.5


MOSTLY_FORWARD = Point(16, 32, 48, 90.0, 10.0, 25.0, 25.0, 2.0, 1.98, 2.02, "measured")
MOSTLY_BACKWARD = Point(16, 32, 48, 10.0, 90.0, 25.0, 25.0, 2.0, 1.98, 2.02, "measured")


def test_a_merged_quotient_is_that_of_its_own_times():
    """The geometric mean of each direction would be 30 us, and the quotient 1.2."""
    both = combined(MOSTLY_FORWARD, MOSTLY_BACKWARD, protocol=QUOTIENTS)
    assert both.numbers[:5] == (50.0, 50.0, 25.0, 25.0, 2.0)
    alike = combined(MOSTLY_FORWARD, MOSTLY_FORWARD, protocol=QUOTIENTS)
    assert alike.numbers[:5] == MOSTLY_FORWARD.numbers[:5]


def test_merged_paired_rounds_keep_the_mean_of_each_column():
    both = combined(MOSTLY_FORWARD, MOSTLY_BACKWARD)
    assert both.numbers[:5] == (30.0, 30.0, 25.0, 25.0, 2.0)


def test_a_merged_quotient_is_the_mean_of_the_rows_quotients_in_ln():
    """Not of their speedups, which are rounded: here all 0.3 % too large. The weights are 4 to 1."""
    one, other = (
        replaced(row, speedup=row.speedup * 1.003) for row in (point(1.50, 0.01), point(1.51, 0.02, bf16_us=120.0))
    )
    both = combined(one, other, protocol=QUOTIENTS)
    assert both.speedup == pytest.approx(1.50**0.8 * 1.51**0.2, rel=4e-4)
    assert both.bf16_fwd_us + both.bf16_bwd_us == pytest.approx(90**0.8 * 120**0.2, rel=4e-4)
    assert quotient(both) == pytest.approx(both.speedup, rel=1.5e-3)


def test_merged_bounds_contain_the_quotient_of_rows_whose_bounds_do_not():
    """A row that was rounded may have its quotient just outside its bounds."""
    low, high = (
        replaced(point(s, 0.0), speedup=s * 1.001, speedup_low=s * 1.001, speedup_high=s * 1.001) for s in (1, 1.0003)
    )
    both = combined(low, high, protocol=QUOTIENTS)
    assert both.speedup_low <= both.speedup <= both.speedup_high


def test_whether_it_is_ambiguous_is_decided_anew():
    tie = point(1.01, 0.02, status="ambiguous")
    assert combined(tie, tie).status == "ambiguous"
    assert combined(*[tie] * 9).status == "measured"
    assert combined(point(1.1, 0.001), point(0.95, 0.001)).status == "ambiguous"


def test_points_that_disagree_too_far_are_noise():
    assert combined(point(1.2, 0.001), point(0.8, 0.001)) == missing("noisy")
    assert combined(point(1.2, 0.001), point(1.0, 0.001)).speedup == pytest.approx(math.sqrt(1.2), rel=1e-3)
    assert combined(missing("noisy"), point()) == point()


def test_a_point_with_numbers_beats_those_without():
    known = point()
    assert combined(missing("failed"), known, missing("out_of_memory")) == known
    assert combined(missing("out_of_memory"), missing("failed"), missing("unstable")) == missing("failed")


def test_bounds_of_no_width_are_no_infinite_weight():
    assert combined(point(1.5, 0.0), point(1.5, 0.0)).speedup == 1.5
    assert combined(point(1.4, 0.0), point(1.6, 0.0)).speedup == pytest.approx(math.sqrt(1.4 * 1.6), rel=1e-3)


def table(*points, **fields):
    return make_table(*sorted(points, key=lambda p: p.shape), **fields)


def test_every_point_of_every_table_is_there():
    merged = merge_tables({"a": table(point(n=48), point(n=64)), "b": table(point(n=16), point(n=64))})
    assert [p.n for p in merged.points] == [16, 48, 64]


def test_axes_are_united_and_the_newest_date_counts():
    one = table(point(), grid=Grid(m=(16,), k=(32,), n=(16, 48)))
    later = MEASURED_AT + timedelta(days=1)
    other = table(point(), grid=Grid(m=(16, 64), k=(32,), n=(48, 64)), measured_at=later)
    merged = merge_tables({"a": one, "b": other})
    assert merged.grid == Grid(m=(16, 64), k=(32,), n=(16, 48, 64))
    assert merged.measured_at == later


def test_spreads_are_pooled():
    spreads = (
        Spread(points=10, median=0.01, p95=0.02, worst=0.05),
        None,
        Spread(points=30, median=0.02, p95=0.04, worst=0.04),
    )
    tables = {str(i): table(point(), protocol=replaced(PROTOCOL, spread=s)) for i, s in enumerate(spreads)}
    assert merge_tables(tables).protocol.spread == Spread(points=40, median=0.0175, p95=0.04, worst=0.05)


def test_factors_for_unaligned_tokens_are_averaged():
    """A factor of 0.9 from 5 points and of 1.0 from 15: 0.9 ** (1 / 4)."""
    found = (Unaligned(points=5, factor=0.9), None, Unaligned(points=15, factor=1.0))
    tables = {str(i): table(point(), protocol=replaced(PROTOCOL, unaligned=one)) for i, one in enumerate(found)}
    assert merge_tables(tables).protocol.unaligned == Unaligned(points=20, factor=0.974)
    assert merge_tables({"a": tables["1"], "b": table(point(1.4))}).protocol.unaligned is None


def test_not_even_rounding_depends_on_the_order():
    """The mean of these medians is 0.029125; the order of the sum decides whether that becomes 0.02912 or 0.02913."""
    medians = ((1, 0.041), (3, 0.052), (4, 0.009))
    spreads = [Spread(points=points, median=median, p95=0.1, worst=0.1) for points, median in medians]
    tables = [table(point(), protocol=replaced(PROTOCOL, spread=spread)) for spread in spreads]
    merged = [merge_tables(dict(zip("abc", order, strict=True))) for order in itertools.permutations(tables)]
    assert len({format_table(each) for each in merged}) == 1


def some_tables(protocol):
    """Tables that share shapes, and differ in everything that may differ."""
    numbers = st.builds(point, st.floats(0.3, 3.0), st.floats(0.0, 0.2), n=st.just(16))
    gaps = st.sampled_from([missing(status, 16) for status in ("failed", "out_of_memory", "unstable", "noisy")])
    elsewhere = st.builds(point, st.floats(0.3, 3.0), st.floats(0.001, 0.2), n=st.sampled_from([32, 48]))
    shares = st.floats(0, 1)
    spreads = st.none() | st.builds(Spread, points=st.integers(1, 9), median=shares, p95=shares, worst=shares)
    return st.builds(
        lambda shared, others, spread, days: table(
            shared,
            *others,
            protocol=replaced(protocol, spread=spread),
            measured_at=MEASURED_AT + timedelta(days),
        ),
        numbers | gaps,
        st.lists(elsewhere, max_size=1),
        spreads,
        st.integers(0, 3),
    )


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([PROTOCOL, QUOTIENTS]).flatmap(
        lambda p: st.lists(some_tables(p), min_size=2, max_size=3, unique_by=format_table)
    )
)
def test_any_order_gives_the_same_bytes_and_a_table_that_can_be_read(tables):
    texts = {
        format_table(merge_tables({str(i): t for i, t in enumerate(order)})) for order in itertools.permutations(tables)
    }
    assert len(texts) == 1
    parse_table(texts.pop(), source="merged")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"recipe": "tensorwise"}, r"b\.yaml: recipe is tensorwise, but rowwise in a\.yaml"),
        ({"device": replaced(DEVICE, name="NVIDIA H100")}, r"device\.name is NVIDIA H100, but"),
        ({"software": replaced(SOFTWARE_HERE, torch="2.14.0")}, r"software\.torch is 2\.14\.0, but"),
        ({"protocol": replaced(PROTOCOL, settle_s=9.0)}, r"protocol\.settle_s is 9\.0, but 0\.5 in a\.yaml"),
        ({"protocol": QUOTIENTS}, r"protocol\.estimate is quotient_of_times, but paired_rounds in a\.yaml"),
    ],
)
def test_tables_of_different_kinds_are_refused(fields, message):
    with pytest.raises(TableError, match=message):
        merge_tables({"a.yaml": table(point()), "b.yaml": table(point(), **fields)})


# The sweeps that a merged table names.

TABLES = {
    name: table(point(speedup), measured_at=MEASURED_AT + timedelta(days))
    for days, (name, speedup) in enumerate({"a": 1.49, "b": 1.5, "c": 1.51}.items())
}


def digest(table):
    return f"sha256 {hashlib.sha256(format_table(table).encode()).hexdigest()[:12]}"


def test_a_merged_table_names_its_sweeps_the_oldest_first():
    own = {name: MergedSweep(measured_at=t.measured_at, digest=digest(t)) for name, t in TABLES.items()}
    two = merge_tables({"b": TABLES["b"], "a": TABLES["a"]})
    assert two.merged_from == (own["a"], own["b"])
    assert TABLES["a"].merged_from is None


def test_a_table_that_is_merged_again_brings_all_its_sweeps():
    two = merge_tables({name: TABLES[name] for name in "bc"})
    three = merge_tables({"two": two, "a": TABLES["a"]})
    assert three.merged_from == merge_tables(TABLES).merged_from
    assert len(three.merged_from) == 3
    text = format_table(three)
    assert parse_table(text, source="three").merged_from == three.merged_from
    assert text.count("measured_at: '2026-11-2") == 3


@pytest.mark.parametrize("others", [{"c": TABLES["a"]}, {"ab": merge_tables({k: TABLES[k] for k in "ab"})}])
def test_no_sweep_is_merged_twice(others):
    """Not by a copy of its table, nor by a table that it was merged into."""
    (other,) = others
    message = rf"{other}: expected each sweep once; that of 2026-11-24 10:00 UTC \(sha256 [0-9a-f]{{12}}\) is in a too"
    with pytest.raises(TableError, match=message):
        merge_tables({"a": TABLES["a"], **others})


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_packaged_h100_tables_are_two_sweeps_merged(recipe):
    root = Path(__file__).parents[1]
    data = [root / "benchmarks/data" / f"nvidia-h100-80gb-hbm3-{which}-sweep" for which in ("first", "second")]
    merged = merge_tables({str(folder): read_table(folder / f"{recipe}.yaml") for folder in data})
    assert format_table(merged) == (root / f"thresholds/nvidia-h100-80gb-hbm3/{recipe}.yaml").read_text()
    assert len(merged.merged_from) == 2


def test_one_table_is_nothing_to_merge():
    with pytest.raises(TableError, match="two tables"):
        merge_tables({"a": table(point())})
