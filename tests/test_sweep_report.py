"""What a report counts and sums over the records of a call, and its text."""

from __future__ import annotations

import dataclasses

import pytest
from samples import NEVER_NOISE, PROTOCOL, PROTOCOLS, again, controlled, measured, point_record, replaced, timed_arm

from fp8gate.calibrate.points.noise import judge
from fp8gate.calibrate.points.point_record import CONTROL, ArmRecord, Stages
from fp8gate.calibrate.sweep.session import SessionResult
from fp8gate.calibrate.sweep.sweep_report import SweepReport, make_sweep_report
from fp8gate.filter.contract.bounds import Spread

FAILED = ArmRecord(status="failed", detail="broken kernel")
AMBIGUOUS = [90.0, 110.0] * 4  # against a bf16 of 100 in each round: as often faster as slower
REPORT = SweepReport(
    measured=12,
    resumed=3,
    retried=2,
    ambiguous=4,
    without_numbers=5,
    capped=6,
    total_s=100.4,
    starting_s=20.6,
    compiling_s=300.0,
    loading_s=10.0,
    settling_s=8.0,
    timing_s=50.0,
    idle_s=11.0,
    controls=2,
    worst_control=0.00312,
    spread={"tensorwise": Spread(points=7, median=0.001, p95=0.0049, worst=0.01234)},
)


def report_of(*records, protocols=PROTOCOLS, **fields):
    part = SessionResult(remaining=0, retried=0, discarded=[], starting_s=0.0, idle_s=0.0, troubles={})
    of_part = {name: fields.pop(name) for name in dataclasses.asdict(part) if name in fields}
    known = {"history": records, "resumed": 0, "capped": 0, "total_s": 0.0}
    rows = {recipe: judge(records, recipe, protocol, NEVER_NOISE) for recipe, protocol in protocols.items()}
    known["rows"] = rows
    return make_sweep_report(records, protocols, dataclasses.replace(part, **of_part), **{**known, **fields})


def test_what_only_the_sweep_knows_is_taken_over():
    known = {"resumed": 1, "retried": 2, "capped": 3, "total_s": 4.0, "starting_s": 5.0, "idle_s": 6.0}
    report = report_of(measured(), **known)
    assert {name: getattr(report, name) for name in known} == known


def test_the_stages_of_all_records_are_summed():
    one = Stages(compiling_s=1.0, loading_s=2.0, settling_s=3.0, timing_s=4.0)
    other = Stages(compiling_s=10.0, loading_s=20.0, settling_s=30.0, timing_s=40.0)
    report = report_of(measured(stages=one), again(2.0, stages=other))
    assert (report.compiling_s, report.loading_s, report.settling_s, report.timing_s) == (11.0, 22.0, 33.0, 44.0)


def test_what_was_measured_again_took_its_time_too():
    thrown_away = Stages(compiling_s=10.0, loading_s=20.0, settling_s=30.0, timing_s=40.0)
    report = report_of(measured(stages=Stages(timing_s=4.0)), discarded=[thrown_away])
    assert (report.measured, report.compiling_s, report.timing_s) == (1, 10.0, 44.0)


def test_the_first_measurement_of_a_repeat_may_be_of_an_earlier_call():
    first, repeat = measured(2.0), again(2.5)
    assert report_of(repeat).spread == {}
    assert report_of(repeat, history=[first, repeat]).spread["tensorwise"].worst == 0.25


def test_ambiguous_and_missing_numbers_are_counted_for_each_recipe():
    ambiguous, won = timed_arm(AMBIGUOUS), timed_arm([50.0] * 8)
    bf16 = timed_arm([100.0] * 8)
    report = report_of(
        point_record(arms={"bf16": bf16, "tensorwise": ambiguous, "rowwise": ambiguous}),
        point_record(
            (64, 64, 16), arms={"bf16": bf16, "tensorwise": won, "rowwise": replaced(FAILED, status="out_of_memory")}
        ),
        point_record(
            (64, 96, 16), arms={"bf16": FAILED, "tensorwise": won, "rowwise": replaced(FAILED, status="unstable")}
        ),
    )
    assert (report.measured, report.ambiguous, report.without_numbers) == (3, 2, 3)


def test_a_recipes_own_protocol_says_what_is_ambiguous():
    lenient = {"tensorwise": replaced(PROTOCOL, tolerance=0.5), "rowwise": PROTOCOL}
    arms = {"bf16": timed_arm([100.0] * 8), **dict.fromkeys(("tensorwise", "rowwise"), timed_arm(AMBIGUOUS))}
    assert report_of(point_record(arms=arms), protocols=lenient).ambiguous == 1


def test_repeats_are_measured_but_are_no_points_of_the_table():
    ambiguous = {"bf16": timed_arm([100.0] * 8), "tensorwise": timed_arm(AMBIGUOUS)}
    missing = {"bf16": timed_arm([100.0] * 8), "tensorwise": FAILED}
    report = report_of(*(point_record(arms=arms, repeat=True) for arms in (ambiguous, missing)))
    assert (report.measured, report.ambiguous, report.without_numbers) == (2, 0, 0)


@pytest.mark.parametrize(("ratios", "worst"), [((1.01, 1.002), 0.01), ((1.01, 0.97), 0.03)])
def test_the_worst_control_is_the_furthest_from_one(ratios, worst):
    report = report_of(measured(), *map(controlled, ratios))
    assert report.controls == 2
    assert report.worst_control == pytest.approx(worst)


def test_a_control_without_numbers_is_none():
    failed = replaced(measured(), arms={**measured().arms, CONTROL: FAILED})
    report = report_of(measured(), failed)
    assert (report.controls, report.worst_control) == (0, None)


def test_an_empty_call_is_all_zeros():
    report = report_of()
    assert (report.measured, report.timing_s, report.controls, report.worst_control) == (0, 0, 0, None)
    assert report.spread == {}


def test_without_repeats_there_is_no_spread():
    assert report_of(measured(2.0), measured(2.5, process=8)).spread == {}


def test_each_recipe_that_was_repeated_has_its_spread():
    report = report_of(measured(2.0), again(2.5), measured(2.0, recipe="rowwise"), again(3.0, recipe="rowwise"))
    assert {recipe: found.worst for recipe, found in report.spread.items()} == {"tensorwise": 0.25, "rowwise": 0.5}


def test_the_text_has_every_number():
    assert REPORT.text().splitlines() == [
        "12 points measured, 3 taken from the journal, 2 retried, 6 left out; 4 speedups ambiguous, 5 without numbers",
        "100 s: starting 21, then on the device loading and tuning 10, settling 8, timing 50, idle 11; "
        "compiling 300 s over all processes",
        "bf16 against itself at 2 points: at most 0.31% apart",
        "tensorwise again at 7 points: 0.10% apart (median), 0.49% (95th percentile), 1.23% (worst)",
    ]


def test_without_controls_or_repeats_there_is_no_line_for_them():
    first_two = REPORT.text().splitlines()[:2]
    assert replaced(REPORT, controls=0, worst_control=None, spread={}).text().splitlines() == first_two


def test_a_perfect_control_has_its_line():
    assert "bf16 against itself at 2 points: at most 0.00% apart" in replaced(REPORT, worst_control=0.0).text()
