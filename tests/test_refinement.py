"""Which points of a grid a sweep measures: a coarse grid, and where float8 breaks even all of them."""

from __future__ import annotations

import dataclasses
import functools
import math
import random
from collections import Counter
from types import SimpleNamespace

import msgspec
import pytest
from builders import make_point, make_table
from samples import NEVER_NOISE, SETUP
from test_sweep import (  # noqa: F401  # fixtures
    _calm_host,
    _own_device_lock,
    _quick_points,
    record_of,
    run,
    script,
    stopped_after,
)

from fp8gate.calibrate.device.cpu import Cpu
from fp8gate.calibrate.grid.grid import grid_shapes
from fp8gate.calibrate.grid.refinement import Refinement, coarse_sizes
from fp8gate.calibrate.points.task_queue import Task
from fp8gate.calibrate.sweep.agenda import Agenda
from fp8gate.calibrate.sweep.run_sweep import MeasuringAlone
from fp8gate.calibrate.sweep.sweep_tasks import SweepTasks
from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.contract.table import Grid, read_table
from fp8gate.filter.decision.lookup import Lookup

SIZES = (16, 32, 64, 128, 256)
GRID = Grid(m=SIZES, k=SIZES, n=SIZES)
SHAPES = grid_shapes(GRID)
COARSE = grid_shapes(Grid(m=SIZES[::2], k=SIZES[::2], n=SIZES[::2]))


def speedup_at(shape: LinearShape) -> float:
    """From 0.35 at the smallest shape to 2.8 at the largest, by a quarter of an octave for each octave of a size."""
    octaves = math.log2(shape.m * shape.k * shape.n) - 12
    return 0.35 * 2 ** (octaves / 4)


def known(shapes):
    return {shape: {"rowwise": speedup_at(shape)} for shape in shapes}


@pytest.mark.parametrize(
    ("sizes", "coarse"),
    [
        ((16, 32, 64, 128, 256), (16, 64, 256)),
        ((16, 32, 64, 128), (16, 64, 128)),
        ((16, 32), (16, 32)),
        ((16,), (16,)),
        ((), ()),
    ],
)
def test_a_coarse_axis_has_every_other_size_and_both_ends(sizes, coarse):
    assert coarse_sizes(sizes) == coarse


def test_first_come_the_coarse_points_those_beside_the_grid_and_those_of_an_earlier_table():
    beside, of_a_table = LinearShape(48, 48, 48), LinearShape(32, 32, 32)
    refinement = Refinement(GRID, [*SHAPES, beside], always={of_a_table})
    assert set(refinement.first) == {*COARSE, beside, of_a_table}
    assert refinement.undecided == len(SHAPES) - len(COARSE) - 1


def test_the_points_near_which_float8_breaks_even_are_due_and_no_others():
    refinement = Refinement(GRID, SHAPES)
    due = refinement.due(known(refinement.first))
    assert set(due) == {s for s in SHAPES if s not in COARSE and 0.8 < speedup_at(s) < 1.25}
    assert 0 < len(due) < len(SHAPES) - len(COARSE)
    assert (refinement.undecided, refinement.due(known(SHAPES))) == (0, [])


def test_one_recipe_near_one_is_enough():
    refinement = Refinement(GRID, SHAPES)
    far = {shape: {"tensorwise": 2.0, "rowwise": 0.3} for shape in refinement.first}
    assert refinement.due(far) == []
    near = {shape: {**of, "rowwise_with_gw_hp": 1.1} for shape, of in far.items()}
    assert set(Refinement(GRID, SHAPES).due(near)) == set(SHAPES) - set(COARSE)


def test_a_point_is_decided_when_all_coarse_points_around_it_were_tried():
    refinement = Refinement(GRID, SHAPES)
    tried: dict = {}
    found = []
    for shape in random.Random(0).sample(refinement.first, len(refinement.first)):
        tried[shape] = {"rowwise": 1.0}
        due = refinement.due(tried)
        for point in due:
            around = [c for c in COARSE if all(_is_beside(a, b) for a, b in zip(_sizes(c), _sizes(point), strict=True))]
            assert all(corner in tried for corner in around)
        found += due
    assert sorted(found) == sorted(set(SHAPES) - set(COARSE))


def _sizes(shape):
    return shape.m, shape.k, shape.n


def _is_beside(coarse, size):
    return coarse == size or (size not in SIZES[::2] and 0.5 <= coarse / size <= 2)


def test_coarse_points_without_numbers_say_nothing_and_alone_they_let_a_point_be_measured():
    lost = {COARSE[0]: {}}
    refinement = Refinement(GRID, SHAPES)
    assert refinement.due({**{s: {"rowwise": 2.0} for s in COARSE}, **lost}) == []
    refinement = Refinement(GRID, SHAPES)
    assert set(refinement.due({s: {} for s in COARSE})) == set(SHAPES) - set(COARSE)


def test_beside_a_coarse_point_that_is_too_large_all_are_measured():
    affordable = [shape for shape in SHAPES if shape.m * shape.k * shape.n < 2**22]
    refinement = Refinement(GRID, affordable)
    assert LinearShape(128, 128, 128) in refinement.first  # beside (256, 256, 256)
    assert LinearShape(32, 32, 32) not in refinement.first
    assert refinement.due({shape: {"rowwise": 0.5} for shape in refinement.first}) == []
    assert refinement.undecided == 0


# In a sweep.


@pytest.fixture
def refined(run, script):  # noqa: F811
    """Sweeps the grid, refined, with `speedup_at`."""
    script.answer = lambda task, recipes: record_of(task, recipes, speedup=speedup_at(task.shape))
    return functools.partial(run, SHAPES, recipes=["rowwise"], grid=GRID, refines=True)


DUE = {*COARSE, *(s for s in SHAPES if 0.8 < speedup_at(s) < 1.25)}


def test_a_refined_sweep_measures_what_decides_and_states_the_whole_grid(refined, script):  # noqa: F811
    result = refined()
    assert set(script.shapes) == DUE
    assert set(script.shapes[: len(COARSE)]) == set(COARSE)
    (table,) = result.tables.values()
    assert {point.shape for point in table.points} == DUE
    assert (table.grid, table.incomplete, result.remaining) == (GRID, None, 0)


def test_what_was_left_out_is_answered_from_the_coarse_points(refined):
    (table,) = refined().tables.values()
    lookup = Lookup(table)
    for shape in SHAPES:
        estimate = lookup(shape)
        assert estimate.speedup == pytest.approx(speedup_at(shape), rel=0.01)
        assert not estimate.outside
        assert estimate.interpolated == (shape not in DUE)


def test_between_sizes_of_which_some_were_left_out_it_interpolates_too(refined):
    (table,) = refined().tables.values()
    lookup = Lookup(table)
    for shape in (LinearShape(m, k, n) for m in (24, 96, 176) for k in (24, 96, 176) for n in (48, 208)):
        estimate = lookup(shape)
        assert (estimate.interpolated, estimate.outside) == (True, False)
        assert estimate.speedup == pytest.approx(speedup_at(shape), rel=0.01)


@pytest.mark.parametrize("points", [5, len(COARSE), len(COARSE) + 7, len(DUE)])
def test_stopped_anywhere_it_goes_on_to_the_same_table(refined, run, tmp_path, script, stopped_after, points):  # noqa: F811
    (whole,) = refined(out=tmp_path / "at once").tables.values()
    script.asked.clear()
    stopped = refined(out=tmp_path / "in parts", stop_after_s=stopped_after(points))
    assert len(script.asked) == points
    (table,) = stopped.incomplete.values()
    assert table.incomplete.measured == points
    assert table.incomplete.of > points
    (completed,) = refined(out=tmp_path / "in parts").tables.values()
    assert [(p.shape, p.speedup) for p in completed.points] == [(p.shape, p.speedup) for p in whole.points]
    assert len(script.shapes) == len(set(script.shapes)) == len(DUE)


@pytest.mark.parametrize("points", [5, len(COARSE) + 7])
def test_all_measurements_that_are_not_made_again_are_taken_from_the_journal(
    refined,
    script,  # noqa: F811
    stopped_after,  # noqa: F811
    monkeypatch,
    points,
):
    """Refined points, repeats and second looks too."""
    twice = dataclasses.replace(NEVER_NOISE, measures_twice=True)
    monkeypatch.setattr(Cpu, "defaults", dataclasses.replace(Cpu.defaults, noise=twice))
    refined(stop_after_s=stopped_after(points))
    report = refined().report
    assert (report.resumed, report.measured) == (points, 2 * len(DUE) - points)
    report = refined().report
    assert (report.resumed, report.measured) == (2 * len(DUE), 0)


def test_the_points_of_an_earlier_table_are_measured_again(refined, run, tmp_path, script):  # noqa: F811
    run(SHAPES, recipes=["rowwise"], grid=GRID)
    for journal in tmp_path.rglob("journal-*"):
        journal.unlink()
    script.asked.clear()
    assert len(refined().tables) == 1
    assert set(script.shapes) == set(SHAPES)
    script.asked.clear()
    (path,) = refined(fresh=True).tables
    assert set(script.shapes) == DUE == {point.shape for point in read_table(path).points}


def test_a_fresh_sweep_that_was_stopped_beside_a_complete_table_goes_on_with_what_decides(
    refined,
    run,  # noqa: F811
    script,  # noqa: F811
    stopped_after,  # noqa: F811
):
    run(SHAPES, recipes=["rowwise"], grid=GRID)
    script.asked.clear()
    assert refined(fresh=True, stop_after_s=stopped_after(3)).incomplete == {}  # the complete table is kept
    (table,) = refined().tables.values()
    assert set(script.shapes) == DUE == {point.shape for point in table.points}
    assert len(script.shapes) == len(DUE)


def test_a_recipe_that_a_fresh_sweep_did_not_measure_keeps_its_points(refined, run, script, stopped_after):  # noqa: F811
    run(SHAPES, recipes=["tensorwise"], grid=GRID)
    refined(fresh=True, stop_after_s=stopped_after(3))
    script.asked.clear()
    refined(recipes=["tensorwise"])
    assert set(script.shapes) == set(SHAPES)


def test_a_smaller_refined_grid_does_not_replace_a_table(refined, run, script):  # noqa: F811
    run([*SHAPES, LinearShape(512, 512, 512)], recipes=["rowwise"], grid=GRID)
    journals = next(iter(run(SHAPES, recipes=["rowwise"], grid=GRID).tables)).parent.glob("journal-*")
    for journal in journals:
        journal.unlink()
    with pytest.raises(InputError, match="1 of its points are not in this sweep"):
        refined()


class FakeLedger:
    """A journal's records in memory."""

    def __init__(self):
        self.journal = SimpleNamespace(records=[])
        self.off, self.asked, self.said = {}, 0, []

    @property
    def left(self):
        return self.asked - len(self.journal.records)

    def ask(self, count, at_most):
        self.asked += count

    def say(self, message):
        self.said.append(message)

    def keep(self, tasks, process):
        for task in tasks:
            speedup = speedup_at(task.shape)
            self.journal.records.append(record_of(task, ["rowwise"], speedup=speedup, process=process))


def test_repeats_do_not_change_which_points_are_due():
    refinement, ledger = Refinement(GRID, SHAPES), FakeLedger()
    first = SweepTasks(setup=SETUP, recipes=("rowwise",), seed=0, tasks=())
    agenda = Agenda(first, refinement.first, refinement, ledger, grid=GRID, repeats=False)
    ledger.keep([Task(shape) for shape in refinement.first], process=1)
    for shape in refinement.first:
        ledger.journal.records.append(record_of(Task(shape, repeat=True), ["rowwise"], speedup=1.0, process=2))
    assert {task.shape for task in agenda.more()} == DUE - set(COARSE)


def test_half_of_the_repeats_come_among_the_refined_points_and_none_twice(monkeypatch):
    some = dataclasses.replace(NEVER_NOISE, repeats=8)
    monkeypatch.setattr(Cpu, "defaults", dataclasses.replace(Cpu.defaults, noise=some))
    refinement, ledger = Refinement(GRID, SHAPES), FakeLedger()
    first = SweepTasks(setup=SETUP, recipes=("rowwise",), seed=0, tasks=tuple(map(Task, refinement.first)))
    agenda = Agenda(first, refinement.first, refinement, ledger, grid=GRID, repeats=True)
    ledger.ask(len(first.tasks), 0)
    ledger.keep(first.tasks, process=1)
    batches = []
    while tasks := agenda.more():
        batches.append(tasks)
        ledger.keep(tasks, process=1 + len(batches))
    refined, rest = batches
    repeats = [[task.shape for task in batch if task.repeat] for batch in batches]
    assert [len(found) for found in repeats] == [4, 4]
    assert len({*repeats[0], *repeats[1]}) == 8
    assert set(repeats[0]) <= set(COARSE)
    assert {task.shape for task in refined if not task.repeat} == DUE - set(COARSE)
    assert [task.repeat for task in refined] != sorted(task.repeat for task in refined)  # they are mixed
    assert all(task.repeat for task in rest)
    assert not ledger.left


def test_recipes_that_were_measured_apart_decide_together(run, script):  # noqa: F811
    script.answer = lambda task, recipes: record_of(task, recipes, speedup=3.0 if recipes == ("rowwise",) else 1.0)
    run(SHAPES, recipes=["rowwise"], grid=GRID, refines=True)
    assert set(script.shapes) == set(COARSE)
    result = run(SHAPES, recipes=["tensorwise", "rowwise"], grid=GRID, refines=True)
    assert set(script.shapes) == set(SHAPES)
    assert (result.remaining, len(result.tables)) == (0, 2)


def test_the_same_command_again_measures_nothing(refined, script, capsys):  # noqa: F811
    refined()
    script.asked.clear()
    again = refined()
    assert script.asked == []
    assert (again.remaining, again.report.measured, len(again.tables)) == (0, 0, 1)
    assert "nothing was left to measure" in capsys.readouterr().err


def test_repeats_are_topped_up_by_points_that_were_being_measured(monkeypatch):
    some = dataclasses.replace(NEVER_NOISE, repeats=40)
    monkeypatch.setattr(Cpu, "defaults", dataclasses.replace(Cpu.defaults, noise=some))
    ledger, tasks = FakeLedger(), [Task(shape) for shape in SHAPES[:36]]
    first = SweepTasks(setup=SETUP, recipes=("rowwise",), seed=0, tasks=tuple(tasks))
    agenda = Agenda(first, SHAPES[:36], None, ledger, grid=GRID, repeats=True)
    ledger.ask(36, 0)
    ledger.keep(tasks[:24], process=1)
    some = agenda.more()
    assert len(some) == 8
    ledger.keep(tasks[24:], process=1)
    ledger.keep(some, process=2)
    rest = agenda.more()
    assert len({task.shape for task in [*some, *rest]}) == len(some) + len(rest) == 12
    ledger.keep(rest, process=2)
    assert agenda.more() == []


def test_refined_points_are_repeated_and_looked_at_too(refined, script, monkeypatch):  # noqa: F811
    twice = dataclasses.replace(NEVER_NOISE, measures_twice=True)
    monkeypatch.setattr(Cpu, "defaults", dataclasses.replace(Cpu.defaults, noise=twice))
    refined()
    measured = Counter([*script.shapes, *script.repeats])
    assert measured == dict.fromkeys(DUE, 2)


def test_several_ranks_measure_every_point(refined, script):  # noqa: F811
    refined(measuring=MeasuringAlone())
    assert set(script.shapes) == set(SHAPES)


def test_outside_of_the_grid_the_trend_goes_on_across_what_was_left_out(refined):
    """From the two outermost sizes that were measured."""
    (table,) = refined().tables.values()
    whole = msgspec.structs.replace(table, points=tuple(make_point(*_sizes(s), speedup_at(s)) for s in SHAPES))
    for shape in (LinearShape(8, 16, 16), LinearShape(16, 8, 24), LinearShape(64, 64, 8), LinearShape(512, 16, 16)):
        estimate, expected = Lookup(table)(shape), Lookup(whole)(shape)
        assert expected.trend is not None
        assert estimate.trend == pytest.approx(expected.trend, rel=0.01)
        assert estimate.speedup == pytest.approx(expected.speedup, rel=0.01)


def test_the_smallest_box_around_a_gap_answers():
    """Its corners say 2.0, those of a wider one 1.0."""
    sizes = (16, 32, 64, 128)
    grid = Grid(m=(16,), k=(16,), n=sizes)
    table = make_table(*(make_point(16, 16, n, s) for n, s in ((16, 1.0), (64, 2.0), (128, 2.0))), grid=grid)
    assert Lookup(table)(LinearShape(16, 16, 96)).speedup == pytest.approx(2.0)
    assert Lookup(table)(LinearShape(16, 16, 32)).speedup == pytest.approx(math.sqrt(2))
    assert Lookup(table)(LinearShape(16, 16, 48)).interpolated
