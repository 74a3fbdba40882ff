"""Two tables: a planted change is found, and what two honest sweeps differ by is not."""

from __future__ import annotations

import math
import random

import pytest
from builders import PROTOCOL, make_point, make_table
from samples import replaced

from fp8gate.calibrate.comparison.compare_tables import (
    FINDABLE_AT_A_POINT,
    MIN_POINTS,
    SHIFT,
    compare_tables,
    shift_of,
)
from fp8gate.calibrate.comparison.point_change import SPREADS
from fp8gate.calibrate.comparison.usual_models import MODEL_TP, usual_models
from fp8gate.calibrate.report.comparison_text import comparison_json, comparison_text
from fp8gate.filter.contract.bounds import Spread
from fp8gate.filter.contract.table import TableError
from fp8gate.filter.model.model_config import BUNDLED, ModelConfig
from fp8gate.filter.model.parallel import Parallel, Shards

P95 = 0.02
SHAPES = [(m, k, n) for m in (1024, 4096) for k in (512, 1024, 2048, 4096) for n in (512, 1024, 2048, 4096)]
STATED = replaced(PROTOCOL, spread=Spread(points=20, median=0.005, p95=P95, worst=0.03))
TINY = ModelConfig(
    model_type="llama",
    hidden_size=1024,
    intermediate_size=2048,
    num_hidden_layers=2,
    num_attention_heads=8,
    vocab_size=4096,
)


def table(speedups, *, bounds=0.002, protocol=STATED, **fields):
    points = [
        make_point(*shape, speedup, spread=math.exp(bounds)) for shape, speedup in zip(SHAPES, speedups, strict=False)
    ]
    return make_table(*points, protocol=protocol, **fields)


def compared(before, after, **options):
    return compare_tables(before, after, min_speedup=1.02, **options)


def speedups(seed=0):
    rng = random.Random(seed)
    return [rng.uniform(0.4, 1.6) for _ in SHAPES]


def noisy(values, seed, by):
    rng = random.Random(seed)
    return [value * math.exp(rng.gauss(0.0, by)) for value in values]


@pytest.mark.parametrize("seed", range(20))
def test_two_honest_sweeps_have_no_findings(seed):
    """A process differs from the next by 2 % at the 95th percentile, so by 0.7 % each (standard deviation)."""
    truth = speedups(seed)
    one, other = (table(noisy(truth, f"{seed} {sweep}", P95 / 1.96 / math.sqrt(2))) for sweep in (1, 2))
    comparison = compared(one, other)
    assert not comparison.has_findings, comparison.changed
    assert comparison.changed == []
    assert comparison.can_tell


@pytest.mark.parametrize("factor", [1.1, 0.9])
def test_a_planted_change_of_one_point_is_found(factor):
    truth = speedups()
    changed = [truth[0], truth[1] * factor, *truth[2:]]
    comparison = compared(table(truth), table(noisy(changed, 1, 0.003)))
    (point,) = comparison.changed
    assert (point.shape.m, point.shape.k, point.shape.n) == SHAPES[1]
    assert point.change == pytest.approx(factor - 1, abs=0.01)
    assert comparison.has_findings
    assert not comparison.has_shifted


@pytest.mark.parametrize("factor", [1.05, 0.95])
def test_a_shift_of_all_is_found_though_no_point_is_beyond_chance(factor):
    truth = speedups()
    wide = replaced(STATED, spread=Spread(points=20, median=0.01, p95=0.05, worst=0.06))
    comparison = compared(
        table(truth, protocol=wide), table([s * factor for s in noisy(truth, 1, 0.01)], protocol=wide)
    )
    assert comparison.changed == []
    assert comparison.has_shifted
    assert comparison.has_findings


def test_a_shift_at_one_number_of_tokens_is_found_though_the_others_have_not_changed():
    shapes = [(m, k, n) for m in (1024, 2048, 4096, 8192) for k in (512, 1024, 2048) for n in (512, 1024, 2048)]
    before = make_table(*(make_point(*shape, 1.0) for shape in shapes), protocol=STATED)
    after = make_table(*(make_point(*s, 1.05 if s[0] == 8192 else 1.0) for s in shapes), protocol=STATED)
    comparison = compared(before, after)
    assert (comparison.changed, comparison.has_shifted) == ([], False)
    assert list(comparison.shifted_tokens) == [8192]
    assert comparison.shifted_tokens[8192].estimate == pytest.approx(1.05)
    assert comparison.has_findings
    assert "8192 tokens: +5.0% (+5.0% to +5.0%), more than 3%" in comparison_text([comparison])
    assert comparison_json(comparison)["shifts"]["1024"]["estimate"] == pytest.approx(1.0)


def test_a_shift_of_what_two_boards_differ_by_is_none():
    truth = speedups()
    comparison = compared(table(truth), table([s * (1 + SHIFT / 2) for s in truth]))
    assert comparison.shift.estimate == pytest.approx(1 + SHIFT / 2)
    assert not comparison.has_shifted


@pytest.mark.parametrize("sign", [1, -1])
def test_a_shift_of_which_chance_may_be_half_is_none(sign):
    """Half of the points are 12 % faster, or slower: 6 % in the middle, but with bounds from 0 to 12 %."""
    wide = replaced(STATED, spread=Spread(points=20, median=0.02, p95=0.04, worst=0.05))
    truth = speedups()[:16]
    changed = [value * math.exp(sign * 0.113 * (i % 2)) for i, value in enumerate(truth)]
    comparison = compared(table(truth, protocol=wide), table(changed, protocol=wide))
    assert sign * (comparison.shift.estimate - 1) > SHIFT
    assert comparison.shift.excludes(1 + sign * SHIFT) is False
    assert (comparison.has_shifted, comparison.shifted_tokens, comparison.changed) == (False, {}, [])


def test_what_chance_allows_is_the_bounds_and_the_spread():
    (point,) = compared(table([1.5], bounds=0.03), table([1.5], bounds=0.04)).points
    assert point.allowed == pytest.approx(0.05 + SPREADS * P95, rel=1e-3)


def test_both_spreads_count_and_none_is_not_zero():
    silent = table([1.5], protocol=PROTOCOL)
    (point,) = compared(silent, table([1.5])).points
    assert point.allowed == pytest.approx(0.02 + SPREADS * (0.05 + P95) / 2, abs=0.02)
    assert point.allowed > SPREADS * 0.05 / 2


def test_flips_are_counted_also_within_chance():
    comparison = compared(table([1.01, 1.5, 0.9]), table([1.03, 1.5, 1.3]))
    assert [p.shape.n for p in comparison.flips] == [512, 2048]
    assert [p.shape.n for p in comparison.changed] == [2048]


def test_points_of_one_table_only_are_counted_and_lost_numbers_are_findings():
    before = make_table(*(make_point(*shape) for shape in SHAPES[:3]))
    after = make_table(make_point(*SHAPES[1]), make_point(*SHAPES[2], status="failed"), make_point(*SHAPES[3]))
    comparison = compared(before, after)
    assert (len(comparison.points), comparison.only_before, comparison.only_after) == (1, 1, 1)
    assert [shape.n for shape in comparison.lost] == [2048]
    assert comparison.has_findings
    assert not compared(after, before).lost


def test_what_cannot_be_compared_is_an_error():
    one = table([1.5])
    with pytest.raises(TableError, match="rowwise and tensorwise"):
        compared(one, table([1.5], recipe="tensorwise"))
    with pytest.raises(TableError, match="no point in common"):
        compared(one, make_table(make_point(16, 16, 16)))


def test_the_shift_is_the_hodges_lehmann_estimate():
    assert shift_of([0.1] * 7) is None
    shift = shift_of([0.0] * 4 + [0.2] * 4)
    assert shift.estimate == pytest.approx(math.exp(0.1))
    assert shift.low <= shift.estimate <= shift.high


def test_a_model_says_what_deciding_by_the_old_table_costs():
    """Everything flips to float8, which is twice as fast now and half as fast before."""
    shards = Shards(Parallel(), 1024)
    before, after = table([0.5] * len(SHAPES)), table([2.0] * len(SHAPES))
    (model,) = compared(before, after, models=[("tiny", TINY, shards)]).models
    assert model.stale_us == pytest.approx(2 * model.after_us)
    assert model.before_us == pytest.approx(model.stale_us)
    assert model.flipped == ("wq", "wk", "wv", "wo", "w1", "w3", "w2", "output")


def test_every_bundled_model_is_compared_as_it_is_usually_trained():
    assert set(MODEL_TP) == set(BUNDLED)
    names = [name for name, _, _ in usual_models()]
    assert "llama3-8b" in names
    assert "llama3-70b, TP 8" in names


@pytest.mark.parametrize("form", ["text", "markdown"])
def test_the_text_says_what_changed(form):
    truth = speedups()
    comparison = compared(
        table(truth), table([truth[0] * 1.5, *truth[1:]]), models=[("tiny", TINY, Shards(Parallel(), 1024))]
    )
    text = comparison_text([comparison], form)
    for expected in ("32 points in both", "1 points changed beyond chance", "+50.0%", "(1024, 512, 512)", "tiny"):
        assert expected in text
    assert ("### rowwise" in text) == ("|" in text) == (form == "markdown")


def test_a_long_list_is_cut_and_says_so():
    comparison = compared(table(speedups()), table([s * 2 for s in speedups()]))
    assert "and 22 more" in comparison_text([comparison])
    assert len(comparison_json(comparison)["changed"]) == len(SHAPES)


def test_the_json_has_everything():
    truth = speedups()
    data = comparison_json(compared(table(truth), table([truth[0] * 1.5, *truth[1:]])))
    assert (data["recipe"], data["findings"], data["points"], data["lost"]) == ("rowwise", True, len(SHAPES), [])
    (changed,) = data["changed"]
    assert (changed["m"], changed["k"], changed["n"], changed["beyond_chance"]) == (*SHAPES[0], True)
    assert set(data["shift"]) == {"estimate", "low", "high"}


# --- what a comparison cannot tell -----------------------------------------------------------------------------


def spread_of(p95, points=20):
    return replaced(STATED, spread=Spread(points=points, median=p95, p95=p95, worst=p95))


def test_one_repeat_that_was_far_off_is_no_proof_that_nothing_changed():
    """The allowance is that of the spread, 2.6: each speedup may have become ten times as large."""
    truth = speedups()
    after = [truth[0] * 5, truth[1] / 5, *noisy(truth[2:], 1, 0.003)]
    comparison = compared(table(truth), table(after, protocol=spread_of(1.75, points=1)))
    assert not comparison.has_findings
    assert (comparison.can_tell, comparison.finds_shift, comparison.finds_single_changes) == (False, True, False)
    assert comparison.allowance == pytest.approx(SPREADS * (P95 + 1.75) / 2, abs=0.01)
    sentence = "cannot tell whether points changed: by chance half may by 1327%, which is more than 25%"
    assert sentence in comparison_text([comparison])
    assert comparison_json(comparison)["can_tell"] is False


@pytest.mark.parametrize(("above", "can_tell"), [(-0.001, True), (0.001, False)])
def test_the_median_point_must_show_a_quarter(above, can_tell):
    bounds = 0.003
    p95 = (math.log(1 + FINDABLE_AT_A_POINT) + above - math.hypot(bounds, bounds)) / SPREADS
    stated = {"bounds": bounds, "protocol": spread_of(p95)}
    assert compared(table(speedups(), **stated), table(speedups(), **stated)).can_tell is can_tell


def test_it_is_the_median_point_that_counts():
    """A few wide points are no reason to doubt the others."""
    wide = [make_point(*shape, 1.5, spread=3.0) for shape in SHAPES[:15]]
    narrow = [make_point(*shape, 1.5, spread=1.001) for shape in SHAPES[15:]]
    most_narrow = make_table(*wide, *narrow, protocol=STATED)
    assert compared(most_narrow, most_narrow).can_tell
    most_wide = make_table(*wide, *narrow[:14], protocol=STATED)
    assert not compared(most_wide, most_wide).can_tell


@pytest.mark.parametrize(
    ("points", "p95", "finds_shift"),
    [(MIN_POINTS, 0.05, True), (MIN_POINTS - 1, 0.05, False), (MIN_POINTS - 1, 0.03, True)],
)
def test_a_shift_shows_in_enough_points_or_at_each(points, p95, finds_shift):
    one = table(speedups()[:points], protocol=spread_of(p95))
    comparison = compared(one, one)
    assert (comparison.finds_shift, comparison.can_tell) == (finds_shift, finds_shift)
    sentence = "cannot tell whether all have shifted: a change of 10% would not show"
    assert (sentence in comparison_text([comparison])) is not finds_shift


@pytest.mark.parametrize(("factor", "finds_shift"), [(1.12, True), (1.16, False)])
def test_a_shift_does_not_show_where_points_scatter_too_much(factor, finds_shift):
    """Half of the points up, half down: the bounds are as wide as they are apart."""
    truth = speedups()[:16]
    scattered = [value * (factor ** (i % 2)) for i, value in enumerate(truth)]
    wide = {"protocol": spread_of(0.06)}
    comparison = compared(table(truth, **wide), table(scattered, **wide))
    assert (comparison.changed, comparison.finds_shift) == ([], finds_shift)


def test_without_numbers_in_both_nothing_can_be_told():
    before = make_table(make_point(*SHAPES[0], status="failed"), make_point(*SHAPES[1]))
    comparison = compared(before, before)
    assert comparison.can_tell is False
    nothing = make_table(make_point(*SHAPES[0], status="failed"))
    comparison = compared(nothing, nothing)
    assert (comparison.can_tell, comparison.allowance, comparison.has_findings) == (False, None, False)
    assert "cannot tell whether points changed: none has numbers in both" in comparison_text([comparison])
    assert comparison_json(comparison)["allowance"] is None
