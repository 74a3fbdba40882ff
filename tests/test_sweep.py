"""The sweep: what is measured, again and no more, what is thrown away, and what the tables and the report say."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import multiprocessing
import os
import re
import tempfile
import time
from collections import Counter
from contextlib import nullcontext
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from forked import serve_quick_points
from samples import (
    NOON,
    PROTOCOL,
    SETUP,
    SOFTWARE,
    TABLE_PROTOCOL,
    journal_points,
    point_record,
    quick_points,
    replaced,
    timed_arm,
)

from fp8gate.calibrate.device import capacity
from fp8gate.calibrate.device.cpu import Cpu
from fp8gate.calibrate.device.host_load import HostLoad
from fp8gate.calibrate.device.lock import DeviceBusyError
from fp8gate.calibrate.grid.grid import grid_shapes, measuring_order
from fp8gate.calibrate.points import point_worker, task_queue, worker_pool
from fp8gate.calibrate.points.measure_point import DeviceLostError
from fp8gate.calibrate.points.point_record import CONTROL, ArmRecord, Stages
from fp8gate.calibrate.points.ready_point import ReadyPoint
from fp8gate.calibrate.points.setup import make_setup
from fp8gate.calibrate.points.task_queue import MAX_RETRIES
from fp8gate.calibrate.points.worker_pool import Died, Finished, InThisProcess, WorkerPool
from fp8gate.calibrate.sweep import run_sweep, session
from fp8gate.calibrate.sweep.journal import JournalError, SweepJournal
from fp8gate.calibrate.sweep.run_sweep import MeasuringAlone, sweep
from fp8gate.calibrate.sweep.table_writing import make_table
from fp8gate.filter.contract.bounds import Bounds, RunBounds, Spread
from fp8gate.filter.contract.devices import cpu_name, device_slug
from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.contract.recipes import RECIPES
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.contract.table import Grid, Incomplete, read_table

CPU = torch.device("cpu")
ALL = tuple(RECIPES)
GRID = Grid(m=(32,), k=(32, 64), n=(48,))
SHAPES = grid_shapes(GRID)
ONE_MORE = LinearShape(48, 32, 32)
THREE = [*SHAPES, ONE_MORE]
FORTY = grid_shapes(Grid(m=(32,), k=tuple(range(16, 176, 16)), n=(16, 32, 48, 64)))
LARGE = LinearShape(8192, 8192, 8192)  # 4 GiB of operands, which this CPU has, but hours of measuring
HUGE = LinearShape(65536, 65536, 65536)
FAILED = ArmRecord(status="failed", detail="broken kernel")
UNSTABLE = ArmRecord(status="unstable", detail="thermal slowdown of the GPU while timing")


@pytest.fixture(autouse=True)
def _own_device_lock(tmp_path_factory, monkeypatch):
    """Sweeps of other tests on this machine do not find the device busy."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("locks")))


@pytest.fixture(autouse=True)
def _calm_host(monkeypatch):
    monkeypatch.setattr(session, "HostLoad", lambda: HostLoad(lambda: (0.0, 0.0, 0.0)))


@pytest.fixture(scope="module", autouse=True)
def _quick_points():
    with quick_points():
        yield


@pytest.fixture
def _quick_workers(monkeypatch):
    """Points of a real worker take milliseconds too."""
    monkeypatch.setattr(session, "WorkerPool", functools.partial(WorkerPool, serve=serve_quick_points))


@pytest.fixture(scope="module")
def real_setup():
    """This machine, with as few rounds as there can be and no control ever off."""
    real = make_setup(CPU)
    quick = {"settle_s": 0.0, "run_s": 0.0, "rounds": (8,), "control": 10.0}
    return replaced(real, protocols={recipe: replaced(p, **quick) for recipe, p in real.protocols.items()})


@pytest.fixture
def run(tmp_path):
    """Sweeps into the test's folder, without workers."""

    def run_on_cpu(shapes=SHAPES, recipes=ALL, **options):
        options = {"grid": GRID, "setup": SETUP, "out": tmp_path, "workers": 0, **options}
        return sweep(shapes=shapes, recipes=recipes, device=CPU, **options)

    return run_on_cpu


def record_of(task, recipes, *, speedup=2.0, **fields):
    """An instant record of a task, each recipe with this speedup; bf16 against itself is 1."""
    arms = {"bf16": timed_arm([200.0] * 8), **dict.fromkeys(recipes, timed_arm([200.0 / speedup] * 8))}
    if task.control:
        arms[CONTROL] = timed_arm([200.0] * 8)
    shape = task.shape
    return point_record((shape.m, shape.k, shape.n), **{"repeat": task.repeat, "arms": arms, **fields})


class Script:
    """Stands in for compiling and measuring: notes what is asked for, and gives the record that `answer` makes."""

    def __init__(self):
        self.answer = record_of
        self.asked = []

    def make_ready(self, task, protocols, device):
        return ReadyPoint(task, protocols)

    def measure_point(self, point, timer, watch, timing_lock, device, seed, measured_on):
        self.asked.append((point.task, tuple(point.protocols), seed))
        return replaced(self.answer(point.task, tuple(point.protocols)), measured_on=measured_on)

    @property
    def tasks(self):
        return [task for task, _, _ in self.asked]

    @property
    def points(self):
        """The shapes measured for the tables, with the recipes."""
        return [(task.shape, recipes) for task, recipes, _ in self.asked if not task.repeat]

    @property
    def shapes(self):
        return [shape for shape, _ in self.points]

    @property
    def repeats(self):
        return [task.shape for task in self.tasks if task.repeat]

    @property
    def controls(self):
        return [task.shape for task in self.tasks if task.control]


@pytest.fixture
def script(monkeypatch):
    script = Script()
    monkeypatch.setattr(worker_pool, "make_ready", script.make_ready)
    monkeypatch.setattr(point_worker, "measure_point", script.measure_point)
    return script


def tables_in(folder):
    return {path.stem: path.read_bytes() for path in folder.rglob("*.yaml")}


def journal_records(folder, setup):
    with SweepJournal(folder / device_slug(setup.device.name), setup) as journal:
        return journal.records


def is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


class Clock:
    """The sweep's clock. It stands still but for what `script` does: 3 s to compile a point, 4 s to measure it."""

    def __init__(self, script, monkeypatch):
        self.now_s = 1000.0
        for module in (run_sweep, session, worker_pool, task_queue):
            monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: self.now_s))
        monkeypatch.setattr(worker_pool, "make_ready", self.make_ready)
        self.answer, script.answer = script.answer, self.measure

    def make_ready(self, task, protocols, device):
        self.now_s += 3.0
        return ReadyPoint(task, protocols)

    def measure(self, task, recipes):
        self.now_s += 4.0
        stages = Stages(compiling_s=3.0, loading_s=1.0, settling_s=0.5, timing_s=2.5)
        return replaced(self.answer(task, recipes), stages=stages)


@pytest.fixture
def stopped_after(script, monkeypatch):
    """Gives the `stop_after_s` by which a sweep stops after so many measurements, from now on."""

    def seconds(points):
        Clock(script, monkeypatch)
        return 7.0 * points - 0.5

    return seconds


# Measured for real, on this CPU.


def test_every_recipe_gets_a_table_with_every_shape(run, tmp_path, real_setup):
    result = run(setup=real_setup)
    assert (result.report.measured, result.report.resumed) == (3, 0)  # two points, one of them twice
    assert (result.remaining, result.capped, result.off) == (0, {}, {})
    folder = tmp_path / device_slug(cpu_name())
    assert list(result.tables) == [folder / f"{recipe}.yaml" for recipe in RECIPES]
    for recipe in RECIPES:
        table = read_table(folder / f"{recipe}.yaml")
        assert table == result.tables[folder / f"{recipe}.yaml"]
        assert (table.recipe, table.grid) == (recipe, GRID)
        assert (table.device, table.software) == (real_setup.device, real_setup.software)
        assert table.protocol.controls.points == 1
        protocol = replaced(real_setup.protocols[recipe], estimate="quotient_of_times")
        assert replaced(table.protocol, controls=None, bounds=None) == protocol
        assert [point.shape for point in table.points] == SHAPES
        assert {point.status for point in table.points} <= {"measured", "ambiguous"}
        assert None not in table.points[0].numbers


def test_a_second_run_measures_nothing_and_writes_the_same_bytes(run, tmp_path, real_setup):
    run(setup=real_setup)
    before = tables_in(tmp_path)
    assert len(before) == len(RECIPES)
    for path in tmp_path.rglob("*.yaml"):
        path.unlink()
    result = run(setup=real_setup)
    assert (result.report.measured, result.report.resumed, result.remaining) == (0, 3, 0)
    assert tables_in(tmp_path) == before


@pytest.mark.usefixtures("_quick_workers")
def test_workers_measure_every_point_and_repeat_in_another_process(run, tmp_path, real_setup):
    result = run(setup=real_setup, workers=2)
    assert (result.report.measured, result.remaining, len(result.tables)) == (3, 0, 3)
    records = journal_records(tmp_path, real_setup)
    process = {record.shape: record.process for record in records if not record.repeat}
    assert sorted(process) == SHAPES
    (again,) = (record for record in records if record.repeat)
    assert again.process not in (process[again.shape], os.getpid())
    assert {path.stem: table.protocol.spread.points for path, table in result.tables.items()} == dict.fromkeys(
        RECIPES, 1
    )
    assert set(result.report.spread) == set(RECIPES)


@pytest.mark.usefixtures("_quick_workers")
def test_stopped_workers_are_gone_and_it_goes_on_later(run, tmp_path, real_setup, monkeypatch):
    """An hour passes as soon as two points are in the journal."""
    with monkeypatch.context() as patch:
        now = time.monotonic
        clock = SimpleNamespace(monotonic=lambda: now() + (3600 if len(journal_points(tmp_path)) > 1 else 0))
        for module in (session, worker_pool, task_queue):
            patch.setattr(module, "time", clock)
        stopped = run(THREE, setup=real_setup, workers=2, stop_after_s=1800.0)
    assert (stopped.report.measured, stopped.remaining, stopped.tables) == (2, 2, {})
    records = journal_records(tmp_path, real_setup)
    assert len(records) == 2
    assert not any(is_alive(record.process) for record in records)
    finished = run(THREE, setup=real_setup, workers=1)
    assert (finished.report.measured, finished.remaining, len(finished.tables)) == (2, 0, 3)
    assert sorted({record.shape for record in journal_records(tmp_path, real_setup)}) == sorted(THREE)


def test_the_setup_of_a_cpu_says_so():
    real = make_setup(CPU)
    assert (real.device.name, real.device.kind) == (cpu_name(), "cpu")
    assert real.device.threads == torch.get_num_threads()
    assert (real.device.capability, real.software.cuda) == (None, None)
    assert real.software.torch == torch.__version__
    for protocol in real.protocols.values():
        assert (protocol.timer, protocol.compile, protocol.inductor) == ("wall_clock", False, {})
        assert (protocol.rounds, protocol.confidence, protocol.control) == ((10, 30), 0.99, 0.2)


# What is measured, and what is not measured again.


def test_one_more_shape_measures_only_that(run, script):
    run()
    script.asked.clear()
    result = run(THREE)
    assert script.points == [(ONE_MORE, ALL)]
    assert result.report.resumed == 3  # two points, one of them twice
    for table in result.tables.values():
        assert [point.shape for point in table.points] == THREE


def test_a_smaller_sweep_leaves_the_points_as_they_are(run, script):
    before = run(THREE).tables
    script.asked.clear()
    result = run(SHAPES[:1], grid=Grid(m=(32,), k=(32,), n=(48,)))
    assert script.points == []
    assert result.report.resumed == 1
    assert {path: (t.points, t.grid) for path, t in result.tables.items()} == {
        path: (t.points, t.grid) for path, t in before.items()
    }


def test_a_sweep_of_other_axes_adds_to_the_table(run, script):
    run()
    result = run([ONE_MORE], grid=Grid(m=(48,), k=(32,), n=(32,)))
    for table in result.tables.values():
        assert [point.shape for point in table.points] == THREE
        assert table.grid == Grid(m=(32, 48), k=(32, 64), n=(32, 48))


def test_points_that_no_journal_has_are_not_lost(run, tmp_path, script):
    (path,) = run(recipes=["rowwise"]).tables
    next(tmp_path.rglob("journal-*.jsonl")).unlink()
    before = path.read_bytes()
    script.asked.clear()
    with pytest.raises(ValueError, match=r"rowwise\.yaml: 1 of its points .* would be lost.*--fresh"):
        run(SHAPES[:1], recipes=["rowwise"])
    assert script.asked == []  # said before hours of measuring, not after
    assert path.read_bytes() == before


def test_points_that_no_journal_has_are_replaced_if_measured_again_or_told_so(run, tmp_path, script):
    run(recipes=["rowwise"])
    next(tmp_path.rglob("journal-*.jsonl")).unlink()
    assert run(recipes=["rowwise"]).report.measured == 3
    (table,) = run(SHAPES[:1], recipes=["rowwise"], fresh=True, grid=Grid(m=(32,), k=(32,), n=(48,))).tables.values()
    assert [point.shape for point in table.points] == SHAPES[:1]
    assert table.grid == Grid(m=(32,), k=(32,), n=(48,))


def test_one_more_recipe_measures_only_that(run, tmp_path, script):
    run(recipes=["tensorwise"])
    before = tables_in(tmp_path)
    script.asked.clear()
    run(recipes=["rowwise"])
    assert script.points == [(shape, ("rowwise",)) for shape in measuring_order(SHAPES, 0)]
    assert len(script.repeats) == 1
    after = tables_in(tmp_path)
    assert set(after) == {"tensorwise", "rowwise"}
    assert after["tensorwise"] == before["tensorwise"]


def test_recipes_asked_for_together_are_measured_together(run, script):
    run(recipes=["tensorwise"])
    script.asked.clear()
    result = run(recipes=["tensorwise", "rowwise"])
    assert script.points == [(shape, ("tensorwise", "rowwise")) for shape in measuring_order(SHAPES, 0)]
    assert result.report.resumed == 0
    assert run(recipes=["rowwise", "tensorwise"]).report.measured == 0


def test_capped_shapes_are_reported_and_not_measured(run, script, capsys):
    result = run([SHAPES[0], LARGE, HUGE], grid=Grid(m=(32, 8192), k=(32, 8192), n=(48, 8192)))
    assert set(result.capped) == {LARGE, HUGE}
    assert "FLOP" in result.capped[LARGE]
    assert "GiB" in result.capped[HUGE]
    assert result.report.capped == 2
    assert set(script.shapes) == {SHAPES[0]}
    assert [[p.shape for p in table.points] for table in result.tables.values()] == [[SHAPES[0]]] * 3
    said = capsys.readouterr().err
    assert "2 points left out" in said
    assert f"  {LARGE}: {result.capped[LARGE]}\n" in said


def test_a_shape_beside_the_grid_takes_the_time_it_needs(run, script):
    assert run([SHAPES[0], LARGE]).capped == {}
    assert sorted(script.shapes) == [SHAPES[0], LARGE]


def test_with_every_shape_capped_there_is_nothing_to_do(run, tmp_path):
    with pytest.raises(InputError, match=r"no point to measure: all 1 were left out, .*GiB"):
        run([HUGE])
    assert list(tmp_path.iterdir()) == []


def test_fresh_measures_again_and_keeps_the_old_journal(run, tmp_path, script, capsys):
    run()
    (journal,) = tmp_path.rglob("journal-*.jsonl")
    content = journal.read_bytes()
    capsys.readouterr()
    result = run(fresh=True)
    assert (result.report.measured, result.report.resumed) == (3, 0)
    (aside,) = tmp_path.rglob("journal-*.jsonl.*")
    assert aside.read_bytes() == content
    assert f"the earlier journal is kept as {aside}" in capsys.readouterr().err


def test_fresh_replaces_a_table_that_cannot_be_read(run, tmp_path, script):
    run(SHAPES[:1], recipes=["rowwise"])
    (path,) = tmp_path.rglob("rowwise.yaml")
    path.write_text("schema: 0\n")
    (table,) = run(SHAPES[:1], recipes=["rowwise"], fresh=True).tables.values()
    assert read_table(path) == table


@pytest.mark.parametrize("fresh", [False, True])
def test_a_table_of_a_device_whose_name_only_looks_alike_is_not_replaced(run, tmp_path, script, fresh):
    run(SHAPES[:1], recipes=["rowwise"])
    (path,) = tmp_path.rglob("rowwise.yaml")
    before = path.read_bytes()
    other = replaced(SETUP, device=replaced(SETUP.device, name="CPU-Test-9000"))
    with pytest.raises(InputError, match="expected 'CPU-Test-9000', found 'CPU Test 9000'; give another --out"):
        run(SHAPES[:1], recipes=["rowwise"], fresh=fresh, setup=other)
    assert path.read_bytes() == before


def test_a_journal_of_other_software_is_named_and_not_used(run, script, capsys):
    run(setup=replaced(SETUP, software=replaced(SOFTWARE, torch="2.0.0")))
    capsys.readouterr()
    result = run()
    assert (result.report.measured, result.report.resumed) == (3, 0)
    assert "is of other software, protocol or device: not used" in capsys.readouterr().err


def test_a_damaged_journal_stops_the_sweep(run, tmp_path, script):
    run()
    (journal,) = tmp_path.rglob("journal-*.jsonl")
    journal.write_bytes(journal.read_bytes().replace(b'"m":32', b'"m":"thirty-two"', 1))
    before = tables_in(tmp_path)
    with pytest.raises(JournalError, match=r"journal-\w+\.jsonl:2: "):
        run()
    assert tables_in(tmp_path) == before


# The order, the controls and the repeats.


@pytest.mark.parametrize(("count", "share"), [(1, 1), (2, 1), (40, 2)])
def test_a_twentieth_of_the_points_and_at_least_one_is_controlled_and_repeated(run, script, count, share):
    result = run(FORTY[:count])
    assert script.shapes == measuring_order(FORTY[:count], 0)
    assert len(set(script.controls)) == len(script.controls) == share
    assert len(set(script.repeats)) == len(script.repeats) == share
    assert set(script.repeats) <= set(FORTY[:count])
    assert [task.repeat for task in script.tasks] == [False] * count + [True] * share  # repeats come last
    assert (result.report.measured, result.report.controls) == (count + share, share)


def test_shapes_are_measured_each_once(run, script):
    run([*THREE, *SHAPES], recipes=["tensorwise"])
    assert script.shapes == measuring_order(THREE, 0)


def test_the_seed_decides_the_order_the_controls_the_repeats_and_the_data(run, tmp_path, script):
    def chosen(seed, out):
        script.asked.clear()
        run(FORTY, seed=seed, out=tmp_path / out)
        assert {seed_of_data for _, _, seed_of_data in script.asked} == {seed}
        return script.shapes, set(script.controls), set(script.repeats)

    first, other, same = chosen(3, "a"), chosen(4, "b"), chosen(3, "c")
    assert first == same
    assert all(one != another for one, another in zip(first, other, strict=True))


def test_an_interrupted_sweep_takes_the_same_controls_and_repeats(run, tmp_path, script, stopped_after):
    run(FORTY, out=tmp_path / "at once")
    at_once = script.tasks
    script.asked.clear()
    run(FORTY, out=tmp_path / "in two", stop_after_s=stopped_after(20))
    assert len(script.tasks) == 20
    run(FORTY, out=tmp_path / "in two")
    assert script.tasks == at_once


def spreads_of(result):
    return {path.stem: table.protocol.spread for path, table in result.tables.items()}


def test_repeats_say_how_far_processes_differ_and_change_no_point(run, script):
    speedups = iter([2.2, 1.4])  # of the repeats: 10 and 30 % from the first times

    def answer(task, recipes):
        again = {"process": 8, "speedup": next(speedups)} if task.repeat else {"process": 7}
        return record_of(task, recipes, **again)

    script.answer = answer
    result = run(FORTY, recipes=["rowwise"])
    expected = Spread(points=2, median=0.2, p95=0.29, worst=0.3)
    (path,), (table,) = result.tables, result.tables.values()
    equal = Spread(points=2, median=0.0, p95=0.0, worst=0.0)
    part = RunBounds(coverage=0.666, within=0.0, between=round(math.log(2.0 / 1.4), 5), repeats=2)  # 2 of 3 at most
    found = replaced(TABLE_PROTOCOL, spread=expected, controls=equal, bounds=Bounds(from_120_us=part))
    assert read_table(path).protocol == found
    assert result.report.spread == {"rowwise": expected}
    assert [point.shape for point in table.points] == FORTY
    assert {point.speedup for point in table.points} == {2.0}
    assert {point.speedup_low for point in table.points} == {1.4}


def repeats_wanted(monkeypatch, repeats):
    """As on a GPU: so many points of a class are repeated. This process stands in for the workers asked for."""
    noise = dataclasses.replace(Cpu.defaults.noise, repeats=repeats)
    monkeypatch.setattr(Cpu, "defaults", dataclasses.replace(Cpu.defaults, noise=noise))
    measure = MeasuringAlone.measure

    def measure_here(self, tasks, ledger, device, workers, stop_after_s):
        return measure(self, tasks, ledger, device, 0, stop_after_s)

    monkeypatch.setattr(MeasuringAlone, "measure", measure_here)


def from_another_process(task, recipes):
    return record_of(task, recipes, **({"process": 8, "speedup": 2.1} if task.repeat else {"process": 7}))


def test_repeats_are_topped_up_to_tell_what_another_sweep_measures(run, tmp_path, script, monkeypatch, capsys):
    repeats_wanted(monkeypatch, 10)
    script.answer = from_another_process
    result = run(FORTY, workers=2)
    assert len(set(script.repeats)) == len(script.repeats) == 10  # two of them before the points, as without bounds
    assert "8 points are to be repeated, to tell how far two runs differ" in capsys.readouterr().err
    for table in result.tables.values():
        found = table.protocol.bounds.from_120_us
        assert (found.repeats, found.coverage, found.between) == (10, 0.909, round(math.log(1.05), 5))
        assert {(p.speedup, p.speedup_high) for p in table.points} == {(2.0, 2.1)}
    before, asked = tables_in(tmp_path), len(script.asked)
    run(FORTY, workers=2)
    assert (tables_in(tmp_path), len(script.asked)) == (before, asked)


def test_a_sweep_that_is_stopped_takes_as_many_repeats_as_one_that_is_not(
    run, tmp_path, script, stopped_after, monkeypatch
):
    repeats_wanted(monkeypatch, 10)
    stopped = run(FORTY, workers=2, stop_after_s=stopped_after(45))
    assert (stopped.remaining, len(script.repeats)) == (5, 5)
    assert incomplete_in(tmp_path) == all_incomplete(45, 50)
    assert run(FORTY, workers=2).incomplete == {}
    assert len(set(script.repeats)) == 10


def test_a_process_that_measures_alone_repeats_nothing_for_bounds(run, script, monkeypatch):
    repeats_wanted(monkeypatch, 10)
    run(FORTY, workers=0)
    assert len(script.repeats) == 2


def test_repeats_by_the_same_process_say_nothing(run, script):
    script.answer = lambda task, recipes: record_of(task, recipes, speedup=2.2 if task.repeat else 2.0)
    result = run(recipes=["rowwise"])
    assert len(script.repeats) == 1
    assert spreads_of(result) == {"rowwise": None}
    assert result.report.spread == {}


def test_a_later_run_keeps_the_spread_of_earlier_ones(run, script):
    script.answer = lambda task, recipes: record_of(task, recipes, process=8 if task.repeat else 7)
    before = spreads_of(run())
    script.asked.clear()
    after = run()
    assert script.asked == []
    assert spreads_of(after) == before == dict.fromkeys(RECIPES, Spread(points=1, median=0.0, p95=0.0, worst=0.0))


def test_a_missing_repeat_keeps_the_table_back(run, script, stopped_after):
    stopped = run(stop_after_s=stopped_after(2))
    assert (len(script.shapes), script.repeats) == (2, [])
    assert (stopped.remaining, stopped.tables) == (1, {})
    finished = run()
    assert len(script.repeats) == 1
    assert (finished.report.measured, finished.report.resumed, len(finished.tables)) == (1, 2, 3)


# What is measured again, and what is given up.


def with_control(bf16_again_us):
    """Answers whose bf16 takes 200 us, and when captured a second time these."""

    def answer(task, recipes):
        record = record_of(task, recipes)
        return replaced(record, arms={**record.arms, CONTROL: timed_arm(bf16_again_us)}) if task.control else record

    return answer


def test_a_control_that_stays_off_withholds_the_tables(run, tmp_path, script, capsys):
    script.answer = with_control([160.0] * 8)  # 25 % off; the protocol tolerates 20
    result = run()
    (control,) = set(script.controls)
    assert len(script.controls) == 1 + MAX_RETRIES
    assert result.off == {control: pytest.approx(0.25)}
    assert (result.tables, result.remaining, result.report.retried) == ({}, 0, MAX_RETRIES)
    assert tables_in(tmp_path) == {}
    said = capsys.readouterr().err.splitlines()
    assert said.count(f"{control}: bf16 against itself differs by 25.0%; measured again later") == MAX_RETRIES
    assert said.count(f"{control}: bf16 against itself differs by 25.0%, again: not to be trusted") == 1


def test_what_an_off_control_measured_is_not_kept_and_a_rerun_tries_again(run, tmp_path, script):
    script.answer = with_control([160.0] * 8)
    (control,) = run().off
    points = [record.shape for record in journal_records(tmp_path, SETUP) if not record.repeat]
    assert points == [shape for shape in SHAPES if shape != control]
    script.asked.clear()
    assert list(run().off) == [control]
    assert script.shapes == [control] * (1 + MAX_RETRIES)
    script.asked.clear()
    script.answer = record_of
    result = run()
    assert script.controls == script.shapes == [control]
    assert (result.off, result.report.resumed, len(result.tables)) == ({}, 2, 3)


@pytest.mark.parametrize("times", [1, MAX_RETRIES])
def test_a_control_that_is_off_for_a_while_is_measured_until_it_is_not(run, tmp_path, script, times):
    answers = itertools.chain([with_control([160.0] * 8)] * times, itertools.repeat(record_of))
    script.answer = lambda task, recipes: (next(answers) if task.control else record_of)(task, recipes)
    result = run()
    assert (result.report.retried, result.off, len(result.tables)) == (times, {}, 3)
    assert len(script.controls) == times + 1
    assert len(journal_points(tmp_path)) == 3
    assert result.report.worst_control == pytest.approx(0)


@pytest.mark.parametrize(
    "bf16_again_us",
    [
        pytest.param([170.0] * 8, id="tolerated"),
        pytest.param([160.0] * 6 + [400.0] * 2, id="chance"),
    ],
)
def test_a_control_within_tolerance_or_chance_is_kept(run, script, bf16_again_us):
    script.answer = with_control(bf16_again_us)
    result = run()
    assert (result.report.retried, result.off, len(result.tables)) == (0, {}, 3)
    assert result.report.worst_control > 0.17


def slowed_down(times):
    """Answers of a GPU that slows down in each shape's first so many measurements, repeats aside."""
    seen = Counter()

    def answer(task, recipes):
        seen[task] += 1
        record = record_of(task, recipes)
        slow = not task.repeat and seen[task] <= times
        return replaced(record, arms=dict.fromkeys(record.arms, UNSTABLE)) if slow else record

    return answer


@pytest.mark.parametrize("times", [1, MAX_RETRIES])
def test_a_point_the_gpu_slowed_down_in_is_measured_later(run, tmp_path, script, times, capsys):
    script.answer = slowed_down(times)
    result = run(recipes=["rowwise"])
    assert script.shapes == measuring_order(SHAPES, 0) * (times + 1)  # after all others
    assert (result.report.retried, result.report.without_numbers) == (2 * times, 0)
    assert len(journal_points(tmp_path)) == 3
    assert [point.status for table in result.tables.values() for point in table.points] == ["measured"] * 2
    said = capsys.readouterr().err
    assert said.count("thermal slowdown of the GPU while timing; measured again later") == 2 * times


def test_a_point_the_gpu_always_slows_down_in_is_unstable(run, script):
    script.answer = slowed_down(100)
    result = run(recipes=["rowwise"])
    assert Counter(script.shapes) == dict.fromkeys(SHAPES, 1 + MAX_RETRIES)
    assert (result.report.retried, result.report.without_numbers) == (2 * MAX_RETRIES, 2)
    assert [point.status for table in result.tables.values() for point in table.points] == ["unstable"] * 2


@pytest.fixture
def dying(monkeypatch):
    """Makes the worker that measures a point die, as often as given for the shape."""

    class DyingWorkers(InThisProcess):
        def __init__(self, job, deaths):
            super().__init__(job)
            self.deaths = Counter(deaths)

        def run(self, queue, until):
            while task := queue.next():
                if self.deaths[task.shape] and not task.repeat:
                    self.deaths[task.shape] -= 1
                    yield Died(task, "its process was killed by signal 9")
                else:
                    yield Finished(task, record_of(task, tuple(self.job.protocols)))

    def set_deaths(deaths):
        monkeypatch.setattr(session, "WorkerPool", lambda job, count: DyingWorkers(job, deaths))

    return set_deaths


def test_a_point_whose_process_died_is_tried_again(run, tmp_path, dying, capsys):
    dying({SHAPES[0]: 1})
    result = run(workers=1)
    assert (result.report.measured, result.report.retried, result.report.without_numbers) == (3, 1, 0)
    assert len(journal_points(tmp_path)) == 3
    assert f"{SHAPES[0]}: its process was killed by signal 9; measured again later" in capsys.readouterr().err


def test_a_point_whose_process_died_twice_has_failed(run, tmp_path, dying):
    dying({SHAPES[0]: 2})
    result = run(workers=1, recipes=["tensorwise", "rowwise"])
    assert (result.report.measured, result.report.without_numbers, result.remaining) == (3, 2, 0)
    for table in result.tables.values():
        assert [point.status for point in table.points] == ["failed", "measured"]
    (record,) = (r for r in journal_records(tmp_path, SETUP) if r.shape == SHAPES[0] and not r.repeat)
    assert set(record.arms) == {"bf16", "tensorwise", "rowwise"}
    assert {arm.status for arm in record.arms.values()} == {"failed"}
    assert {arm.detail for arm in record.arms.values()} == {"its process was killed by signal 9, twice"}


def test_a_point_given_up_at_its_second_death_was_retried_once(run, dying):
    dying({SHAPES[0]: 2})
    assert run(workers=1).report.retried == 1


def with_rowwise(script, rowwise):
    """Every point measured from now on has this rowwise arm; tensorwise is measured."""

    def answer(task, recipes):
        record = record_of(task, recipes)
        return replaced(record, arms={name: rowwise if name == "rowwise" else arm for name, arm in record.arms.items()})

    script.answer = answer


def test_a_recipe_without_numbers_is_in_its_table(run, script):
    with_rowwise(script, FAILED)
    result = run(SHAPES[:1], recipes=["tensorwise", "rowwise"])
    assert [table.points[0].status for table in result.tables.values()] == ["measured", "failed"]


def test_a_point_without_numbers_is_tried_once_more(run, script):
    with_rowwise(script, FAILED)
    for tries in (1, 2, 2, 2):
        run(SHAPES[:1], recipes=["rowwise"])
        assert script.points == [(SHAPES[0], ("rowwise",))] * tries
        assert script.repeats == SHAPES[:1]
    run(SHAPES[:1], recipes=["tensorwise"])
    assert script.points[-1] == (SHAPES[0], ("tensorwise",))


def test_a_table_keeps_its_numbers_when_something_broke(run, script, tmp_path):
    """Another set-up, as after an upgrade, so that every point is measured again."""
    run(SHAPES[:1], recipes=["tensorwise", "rowwise"])
    before = tables_in(tmp_path)
    upgraded = replaced(SETUP, software=replaced(SETUP.software, torch="2.14.0"))
    with_rowwise(script, FAILED)
    with pytest.raises(
        ValueError, match=r"rowwise\.yaml: 1 of its points .*\(32, 32, 48\) failed: broken kernel.*--fresh"
    ):
        run(SHAPES[:1], recipes=["tensorwise", "rowwise"], setup=upgraded)
    assert tables_in(tmp_path) == before
    result = run(SHAPES[:1], recipes=["tensorwise", "rowwise"], setup=upgraded, fresh=True)
    assert [table.points[0].status for table in result.tables.values()] == ["measured", "failed"]


def test_a_second_attempt_that_succeeds_counts(run, script):
    with_rowwise(script, FAILED)
    run(SHAPES[:1], recipes=["rowwise"])
    with_rowwise(script, timed_arm([50.0] * 8))
    (table,) = run(SHAPES[:1], recipes=["rowwise"]).tables.values()
    assert (table.points[0].status, table.points[0].speedup) == ("measured", 4.0)
    assert run(SHAPES[:1], recipes=["rowwise"]).report.measured == 0


def test_the_record_of_a_lost_device_is_kept(run, tmp_path, script):
    def lose_the_device(task, recipes):
        record = point_record((32, 32, 48), arms=dict.fromkeys(("bf16", *recipes), FAILED))
        raise DeviceLostError(record, "an illegal memory access")

    script.answer = lose_the_device
    said = "the device failed at (32, 32, 48): an illegal memory access; run the same command to go on"
    for attempt in (1, 2):
        with pytest.raises(DeviceLostError, match=re.escape(said)):
            run(SHAPES[:1], recipes=["tensorwise"])
        assert journal_points(tmp_path) == [(32, 32, 48)] * attempt
    assert tables_in(tmp_path) == {}
    script.answer = record_of
    (table,) = run(SHAPES[:1], recipes=["tensorwise"]).tables.values()  # it is not run into for ever
    assert table.points[0].status == "failed"


# When it stops.


def test_stopped_at_once_it_goes_on_later(run, tmp_path, script):
    stopped = run(stop_after_s=0)
    assert (stopped.report.measured, stopped.remaining, stopped.tables) == (0, 3, {})
    assert tables_in(tmp_path) == {}
    finished = run()
    assert (finished.report.measured, finished.report.resumed, finished.remaining) == (3, 0, 0)
    assert len(tables_in(tmp_path)) == len(RECIPES)


def test_stopped_midway_it_goes_on_where_it_was(run, tmp_path, script, stopped_after):
    stopped = run(THREE, stop_after_s=stopped_after(2))
    assert (stopped.report.measured, stopped.remaining, stopped.tables) == (2, 2, {})
    finished = run(THREE)
    assert (finished.report.measured, finished.report.resumed, finished.remaining) == (2, 2, 0)
    assert sorted(script.shapes) == sorted(THREE)
    assert len(tables_in(tmp_path)) == len(RECIPES)


def test_with_all_points_there_the_time_limit_does_not_matter(run, script):
    run()
    assert len(run(stop_after_s=0).tables) == len(RECIPES)


def test_stopped_before_an_off_control_is_given_up_it_remains(run, script, stopped_after):
    script.answer = with_control([160.0] * 8)
    stopped = run(SHAPES[:1], stop_after_s=stopped_after(1))
    assert (stopped.remaining, stopped.off, stopped.report.retried) == (2, {}, 1)


# What a sweep that ends early leaves.


def incomplete_in(folder):
    """How far the sweep of each table under a folder came, by recipe."""
    return {path.stem: read_table(path).incomplete for path in folder.rglob("*.yaml")}


def all_incomplete(measured, of):
    return dict.fromkeys(RECIPES, Incomplete(measured=measured, of=of))


def test_what_a_stopped_sweep_has_measured_is_in_incomplete_tables(run, tmp_path, script, stopped_after, capsys):
    stopped = run(THREE, stop_after_s=stopped_after(2))
    assert {path.stem: table.incomplete for path, table in stopped.incomplete.items()} == all_incomplete(2, 4)
    for path, table in stopped.incomplete.items():
        assert read_table(path) == table
        assert [point.shape for point in table.points] == sorted(measuring_order(THREE, 0)[:2])
        assert (table.grid, {point.status for point in table.points}) == (GRID, {"measured"})
    said = capsys.readouterr().err
    assert all(f"wrote {path}, incomplete: 2 of 4 measurements\n" in said for path in stopped.incomplete)


def test_it_says_what_is_missing_and_what_completes_it(run, script, stopped_after, capsys):
    run(THREE, stop_after_s=stopped_after(2))
    assert capsys.readouterr().err.splitlines()[-1] == (
        "2 measurements are missing: the same command takes them and completes the tables"
    )


def test_the_next_run_completes_the_tables(run, tmp_path, script, stopped_after, capsys):
    run(THREE, out=tmp_path / "at once")
    assert "missing" not in capsys.readouterr().err
    for points in (1, 1):
        run(THREE, out=tmp_path / "in parts", stop_after_s=stopped_after(points))
    assert incomplete_in(tmp_path / "in parts") == all_incomplete(2, 4)
    finished = run(THREE, out=tmp_path / "in parts")
    assert finished.incomplete == {}
    for path in finished.tables:
        at_once = read_table(tmp_path / "at once" / path.relative_to(tmp_path / "in parts"))
        in_parts = read_table(path)
        assert (in_parts.points, in_parts.incomplete) == (at_once.points, None)
        assert b"incomplete" not in path.read_bytes()


def test_without_its_repeat_a_table_is_incomplete(run, tmp_path, script, stopped_after):
    stopped = run(stop_after_s=stopped_after(2))
    assert incomplete_in(tmp_path) == all_incomplete(2, 3)
    assert [len(table.points) for table in stopped.incomplete.values()] == [2] * 3


def test_stopped_before_its_second_looks_a_table_is_incomplete(run, tmp_path, script, stopped_after, monkeypatch):
    """As on a CPU, where all points are measured twice."""
    twice = dataclasses.replace(Cpu.defaults.noise, measures_twice=True)
    monkeypatch.setattr(Cpu, "defaults", dataclasses.replace(Cpu.defaults, noise=twice))
    stopped = run(stop_after_s=stopped_after(3))  # two points and a repeat, but not the look at the other point
    assert stopped.remaining == 1
    assert incomplete_in(tmp_path) == all_incomplete(3, 4)
    assert run().incomplete == {}
    assert incomplete_in(tmp_path) == dict.fromkeys(RECIPES)


def test_a_sweep_that_measured_nothing_leaves_no_table(run, tmp_path, script, capsys):
    stopped = run(stop_after_s=0)
    assert (stopped.incomplete, tables_in(tmp_path)) == ({}, {})
    assert "incomplete" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [KeyboardInterrupt(), SystemExit(), RuntimeError("CUDA error: an illegal memory access"), DeviceLostError],
    ids=["Ctrl-C", "a signal", "a CUDA error", "a lost device"],
)
def test_whatever_ends_a_sweep_it_leaves_what_there_is(run, tmp_path, script, error):
    def end_at_the_second(task, recipes):
        if len(script.asked) == 1:
            return record_of(task, recipes)
        failed = replaced(record_of(task, recipes), arms=dict.fromkeys(("bf16", *recipes), FAILED))
        raise error(failed, "it does not answer") if error is DeviceLostError else error

    script.answer = end_at_the_second
    with pytest.raises(error if error is DeviceLostError else type(error)):
        run(THREE)
    is_kept = error is DeviceLostError
    assert incomplete_in(tmp_path) == all_incomplete(2 if is_kept else 1, 4)
    (table,) = {read_table(path).points for path in tmp_path.rglob("tensorwise.yaml")}
    assert Counter(point.status for point in table) == Counter({"measured": 1, **({"failed": 1} if is_kept else {})})
    script.answer = record_of
    assert len(run(THREE).tables) == len(RECIPES)
    assert incomplete_in(tmp_path) == dict.fromkeys(RECIPES)


def test_what_another_command_has_to_mend_leaves_no_table(run, tmp_path, script):
    def refuse(task, recipes):
        if len(script.asked) > 1:
            raise InputError("rank 1 differs from rank 0")
        return record_of(task, recipes)

    script.answer = refuse
    with pytest.raises(InputError, match="rank 1"):
        run(THREE)
    assert tables_in(tmp_path) == {}


@pytest.mark.parametrize("fresh", [False, True])
def test_a_complete_table_is_never_replaced_by_an_incomplete_one(run, tmp_path, script, stopped_after, fresh, capsys):
    run(recipes=["rowwise"])
    before = tables_in(tmp_path)["rowwise"]
    stopped = run(THREE, stop_after_s=stopped_after(2), fresh=fresh)
    assert tables_in(tmp_path)["rowwise"] == before
    assert {path.stem for path in stopped.incomplete} == {"tensorwise", "rowwise_with_gw_hp"}
    (path,) = tmp_path.rglob("rowwise.yaml")
    assert f"{path} is kept: it is complete\n" in capsys.readouterr().err
    assert {path.stem for path in run(THREE).tables} == set(RECIPES)
    assert incomplete_in(tmp_path) == dict.fromkeys(RECIPES)


def test_an_incomplete_table_with_more_numbers_is_kept(run, tmp_path, script, stopped_after, capsys):
    """Another set-up, as after an upgrade, has a journal of its own."""
    run(THREE, recipes=["rowwise"], stop_after_s=stopped_after(2))
    before = tables_in(tmp_path)
    upgraded = replaced(SETUP, software=replaced(SETUP.software, torch="2.14.0"))
    stopped = run(THREE, recipes=["rowwise"], setup=upgraded, stop_after_s=stopped_after(1))
    assert (stopped.incomplete, tables_in(tmp_path)) == ({}, before)
    assert "rowwise.yaml is kept: it has 2 points that were timed, this sweep 1\n" in capsys.readouterr().err
    again = run(THREE, recipes=["rowwise"], setup=upgraded, stop_after_s=stopped_after(2))
    (table,) = again.incomplete.values()
    assert (table.software.torch, len(table.points)) == ("2.14.0", 3)


def test_a_number_of_an_incomplete_table_that_turns_out_to_be_noise_is_given_up(
    run, tmp_path, script, stopped_after, monkeypatch
):
    """It is measured again only by the run that completes the table, and no two measurements agree."""
    strict = dataclasses.replace(Cpu.defaults.noise, measures_twice=True, apart=1.2)
    monkeypatch.setattr(Cpu, "defaults", dataclasses.replace(Cpu.defaults, noise=strict))
    run(recipes=["rowwise"], stop_after_s=stopped_after(2))
    (path,) = tmp_path.rglob("rowwise.yaml")
    assert [point.status for point in read_table(path).points] == ["measured"] * 2
    script.answer = lambda task, recipes: record_of(task, recipes, speedup=1.5 ** len(script.asked))
    result = run(recipes=["rowwise"])
    assert (read_table(path), read_table(path).incomplete) == (result.tables[path], None)
    assert [point.status for point in read_table(path).points] == ["noisy"] * 2


def test_a_recipe_without_any_number_gets_no_incomplete_table(run, tmp_path, script, stopped_after, capsys):
    with_rowwise(script, FAILED)
    stopped = run(THREE, stop_after_s=stopped_after(2))
    assert {path.stem for path in stopped.incomplete} == {"tensorwise", "rowwise_with_gw_hp"}
    assert "rowwise.yaml is not written: no point has a number yet\n" in capsys.readouterr().err


def test_where_a_control_was_off_no_incomplete_table_is_written(run, tmp_path, script, monkeypatch, capsys):
    refuse = session.JournalLedger.refuse

    def refuse_and_end(ledger, task, error):
        refuse(ledger, task, error)
        raise KeyboardInterrupt

    script.answer = with_control([160.0] * 8)
    monkeypatch.setattr(session.JournalLedger, "refuse", refuse_and_end)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert tables_in(tmp_path) == {}
    assert capsys.readouterr().err.splitlines()[-1] == ("no table is written: bf16 against itself was off at 1 points")


def test_a_fresh_sweep_is_completed_without_fresh(run, tmp_path, script, stopped_after, capsys):
    run(THREE, stop_after_s=stopped_after(2), fresh=True)
    assert "2 measurements are missing: the same command without --fresh takes them" in capsys.readouterr().err


def test_a_full_disk_does_not_hide_why_a_sweep_ended(run, tmp_path, script, monkeypatch, capsys):
    def end(task, recipes):
        if len(script.asked) > 1:
            raise KeyboardInterrupt
        return record_of(task, recipes)

    def no_space(*_):
        raise OSError("No space left on device")

    script.answer = end
    monkeypatch.setattr(run_sweep, "write_incomplete_tables", no_space)
    with pytest.raises(KeyboardInterrupt):
        run(THREE)
    assert "the incomplete tables cannot be written: No space left on device\n" in capsys.readouterr().err
    assert len(journal_points(tmp_path)) == 1


# What else it says.


def test_the_report_counts_points_and_not_repeats(run, script):
    tie = timed_arm([180.0, 220.0] * 4)  # against a bf16 of 200
    rowwise = {SHAPES[0]: tie, SHAPES[1]: FAILED, ONE_MORE: timed_arm([100.0] * 8)}
    repeated = []

    def answer(task, recipes):
        record = record_of(task, recipes)
        if task.repeat:
            repeated.append(task.shape)
        return replaced(record, arms={**record.arms, "rowwise": tie if task.repeat else rowwise[task.shape]})

    script.answer = answer
    report = run(THREE, recipes=["tensorwise", "rowwise"]).report
    assert len(repeated) == 1
    assert (report.measured, report.resumed, report.capped) == (4, 0, 0)
    # The repeat is not counted, but it leaves open whether the third point wins.
    assert (report.ambiguous, report.without_numbers, report.retried) == (2, 1, 0)


def seconds(report):
    return report.starting_s + report.loading_s + report.settling_s + report.timing_s + report.idle_s


def test_the_stages_seconds_add_up(run, script, monkeypatch):
    Clock(script, monkeypatch)
    report = run().report
    assert (report.total_s, report.starting_s, report.compiling_s, report.idle_s) == (21.0, 3.0, 9.0, 6.0)
    assert (report.loading_s, report.settling_s, report.timing_s) == (3.0, 1.5, 7.5)
    assert seconds(report) == report.total_s


def test_the_seconds_of_measurements_thrown_away_count_too(run, script, monkeypatch):
    script.answer = slowed_down(1)
    Clock(script, monkeypatch)
    report = run().report
    assert report.total_s == 35.0  # two points twice, one repeat
    assert seconds(report) == report.total_s


def test_a_run_with_nothing_to_measure_takes_no_time(run, script, monkeypatch):
    run()
    Clock(script, monkeypatch)
    report = run().report
    assert (report.total_s, seconds(report)) == (0.0, 0.0)


@pytest.fixture
def processes_seen(monkeypatch):
    """Sets what the device's watch sees, each time that it looks."""

    def see(processes):
        watch = SimpleNamespace(processes=iter(processes).__next__)
        monkeypatch.setattr(Cpu, "make_watch", lambda kind, device: watch)

    return see


def test_each_other_process_on_the_device_is_named_once(run, script, processes_seen, capsys):
    own = {os.getpid(): "python"}
    processes_seen([{5: "train"}, {**own, 6: "eval"}, {**own, 5: "train", 6: "eval"}, {**own, 6: "eval"}])
    run()
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning:")]
    names = [
        line.removeprefix("warning: another process is on the device and may spoil timings: ") for line in warnings
    ]
    assert names == ["5 (train)", "6 (eval)"]


def test_alone_on_the_device_it_warns_of_nobody(run, script, processes_seen, capsys):
    processes_seen(itertools.chain([{}], itertools.repeat({os.getpid(): "python"})))
    run()
    assert "warning" not in capsys.readouterr().err


# The device is one sweep's at a time.


def try_to_sweep(run, out, answer):
    """Sends what came of a sweep into another folder."""
    try:
        run(out=out)
    except DeviceBusyError as error:
        answer.send(str(error))
    else:
        answer.send("it measured")


def test_a_second_sweep_on_the_device_is_refused_while_the_first_measures(run, tmp_path, script):
    context = multiprocessing.get_context("fork")
    heard = []

    def measure(task, recipes):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=try_to_sweep, args=(run, tmp_path / "other", theirs))
        script.answer = record_of  # for the other process, and for the points after this one
        process.start()
        heard.append(ours.recv() if ours.poll(30) else "nothing")
        process.join()
        return record_of(task, recipes)

    script.answer = measure
    result = run(out=tmp_path / "one")
    assert len(result.tables) == len(RECIPES)  # the first is not disturbed
    (message,) = heard
    assert f"another sweep is measuring on this device: process {os.getpid()} (" in message
    assert list((tmp_path / "other").rglob("*")) == []


@pytest.mark.parametrize("ending", ["done", "stopped", "failed"])
def test_after_a_sweep_the_device_is_free(run, tmp_path, script, ending):
    if ending == "failed":
        script.answer = lambda task, recipes: 1 / 0
    with pytest.raises(ZeroDivisionError) if ending == "failed" else nullcontext():
        run(out=tmp_path / "one", stop_after_s=0 if ending == "stopped" else None)
    script.answer = record_of
    assert len(run(out=tmp_path / "other").tables) == len(RECIPES)


# How many processes compile.


@pytest.fixture
def pool_sizes(monkeypatch):
    """How many workers were started, each time; they measure in this process."""
    sizes = []

    def start(job, count):
        sizes.append(count)
        return InThisProcess(job)

    monkeypatch.setattr(session, "WorkerPool", start)
    monkeypatch.setattr(capacity, "default_workers", lambda device, sweeps: 2)
    return sizes


@pytest.mark.parametrize(
    ("compiled", "asked", "sizes"), [(True, None, [2]), (False, None, []), (True, 0, []), (False, 1, [1])]
)
def test_only_what_is_compiled_has_workers_unless_told_so(run, script, pool_sizes, compiled, asked, sizes):
    protocols = {recipe: replaced(PROTOCOL, compile=compiled) for recipe in RECIPES}
    run(setup=replaced(SETUP, protocols=protocols), workers=asked)
    assert pool_sizes == sizes


def test_no_more_workers_than_there_is_to_measure(run, script, pool_sizes):
    run(workers=100)
    run(workers=100)
    assert pool_sizes == [len(SHAPES) + 1]  # a point is repeated; the second sweep has nothing to do


# Tables from records.


def with_speedup(speedup, minutes, shape=(32, 32, 48), **fields):
    arms = {"bf16": timed_arm([100.0 * speedup] * 8), "tensorwise": timed_arm([100.0] * 8)}
    return point_record(shape, arms=arms, measured_at=NOON + timedelta(minutes=minutes), **fields)


def test_a_table_takes_the_latest_record_of_a_shape():
    records = [with_speedup(2.0, 0), with_speedup(4.0, 1), with_speedup(3.0, 2, (32, 64, 48)), with_speedup(5.0, 3)]
    table = make_table(GRID, "tensorwise", SETUP, records)
    assert [(point.k, point.speedup) for point in table.points] == [(32, 5.0), (64, 3.0)]
    assert table.measured_at == NOON + timedelta(minutes=3)


def test_a_table_prefers_numbers_to_a_later_failure():
    failed = point_record((32, 32, 48), arms={"bf16": timed_arm([100.0] * 8), "tensorwise": FAILED})
    first, last = with_speedup(2.0, 1), with_speedup(3.0, 2)
    for records, speedup in (([first, failed], 2.0), ([failed, last], 3.0), ([first, failed, last, failed], 3.0)):
        table = make_table(GRID, "tensorwise", SETUP, records)
        assert [point.speedup for point in table.points] == [speedup]


def test_a_table_ignores_records_of_other_recipes():
    rowwise = point_record((32, 64, 48), arms={name: timed_arm([9.0] * 8) for name in ("bf16", "rowwise")})
    table = make_table(GRID, "tensorwise", SETUP, [with_speedup(2.0, 1), rowwise])
    assert [(point.k, point.speedup) for point in table.points] == [(32, 2.0)]
    assert (table.measured_at, replaced(table.protocol, bounds=None)) == (NOON + timedelta(minutes=1), TABLE_PROTOCOL)


def test_repeats_go_into_a_tables_spread_and_bounds_and_nothing_else():
    records = [with_speedup(2.0, 1), with_speedup(2.5, 9, process=8, repeat=True)]
    table = make_table(GRID, "tensorwise", SETUP, records)
    assert [point.speedup for point in table.points] == [2.0]
    assert table.measured_at == NOON + timedelta(minutes=1)
    spread = Spread(points=1, median=0.25, p95=0.25, worst=0.25)
    assert replaced(table.protocol, bounds=None) == replaced(TABLE_PROTOCOL, spread=spread)
    assert (table.points[0].speedup_low, table.points[0].speedup_high) == (1.6, 2.5)
