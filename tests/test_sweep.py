"""The sweep end to end on this CPU: what is measured, what is not measured again, and what the tables say."""

from __future__ import annotations

import itertools
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from samples import NOON, PROTOCOL, SETUP, journal_points, point_record, quick_points, replaced, timed_arm

from fp8gate.calibrate import sweep as sweep_module
from fp8gate.calibrate.grid import grid_shapes, measuring_order
from fp8gate.calibrate.journal import JournalError
from fp8gate.calibrate.measure import DeviceLostError
from fp8gate.calibrate.records import ArmRecord
from fp8gate.calibrate.sweep import make_setup, make_table, sweep
from fp8gate.filter.devices import cpu_name, device_slug
from fp8gate.filter.shapes import LinearShape
from fp8gate.filter.table import RECIPES, Grid, read_table

CPU = torch.device("cpu")
GRID = Grid(m=(32,), k=(32, 64), n=(48,))
SHAPES = grid_shapes(GRID)
ONE_MORE = LinearShape(48, 32, 32)
HUGE = LinearShape(16384, 16384, 16384)


@pytest.fixture(scope="module", autouse=True)
def _quick_points():
    with quick_points():
        yield


@pytest.fixture(scope="module")
def setup():
    real = make_setup(CPU)
    return replaced(real, protocols={r: replaced(p, settle_s=0.0) for r, p in real.protocols.items()})


@pytest.fixture
def run(tmp_path, setup):
    """Sweeps into the test's folder."""

    def run_sweep(shapes=SHAPES, recipes=RECIPES, **options):
        options = {"grid": GRID, "setup": setup, **options}
        return sweep(shapes=shapes, recipes=recipes, device=CPU, out=tmp_path, **options)

    return run_sweep


@pytest.fixture
def measured_shapes(monkeypatch):
    """The shapes measured, with the recipes, as they are."""
    calls = []
    real = sweep_module.measure_point

    def measure_point(shape, protocols, *rest):
        calls.append((shape, tuple(protocols)))
        return real(shape, protocols, *rest)

    monkeypatch.setattr(sweep_module, "measure_point", measure_point)
    return calls


def tables_in(folder):
    return {path.stem: path.read_bytes() for path in folder.rglob("*.yaml")}


def test_every_recipe_gets_a_table_with_every_shape(run, tmp_path, setup):
    result = run()
    assert (result.measured, result.resumed, result.remaining, result.capped) == (2, 0, 0, {})
    folder = tmp_path / device_slug(cpu_name())
    assert list(result.tables) == [folder / f"{recipe}.yaml" for recipe in RECIPES]
    for recipe in RECIPES:
        table = read_table(folder / f"{recipe}.yaml")
        assert (table.recipe, table.grid) == (recipe, GRID)
        assert (table.device, table.software, table.protocol) == (setup.device, setup.software, setup.protocols[recipe])
        assert [point.shape for point in table.points] == SHAPES
        assert {point.status for point in table.points} <= {"measured", "ambiguous"}
        assert None not in table.points[0].numbers


def test_the_setup_of_a_cpu_says_so(setup):
    real = make_setup(CPU)
    assert (real.device.name, real.device.kind) == (cpu_name(), "cpu")
    assert real.device.threads == torch.get_num_threads()
    assert (real.device.capability, real.software.cuda) == (None, None)
    assert real.software.torch == torch.__version__
    for protocol in real.protocols.values():
        assert (protocol.timer, protocol.compile, protocol.inductor) == ("wall_clock", False, {})
        assert (protocol.rounds, protocol.confidence) == ((8, 12, 16, 24, 32), 0.99)


def test_a_second_run_measures_nothing_and_writes_the_same_bytes(run, tmp_path, measured_shapes):
    run()
    before = tables_in(tmp_path)
    assert len(before) == len(RECIPES)
    measured_shapes.clear()
    for path in tmp_path.rglob("*.yaml"):
        path.unlink()
    result = run()
    assert measured_shapes == []
    assert (result.measured, result.resumed, result.remaining) == (0, 2, 0)
    assert tables_in(tmp_path) == before


def test_one_more_shape_measures_only_that(run, tmp_path, measured_shapes):
    run()
    measured_shapes.clear()
    result = run([*SHAPES, ONE_MORE])
    assert measured_shapes == [(ONE_MORE, RECIPES)]
    assert (result.measured, result.resumed) == (1, 2)
    for table in result.tables.values():
        assert [point.shape for point in table.points] == [*SHAPES, ONE_MORE]


def test_a_smaller_sweep_leaves_the_tables_as_they_are(run, tmp_path, measured_shapes):
    run([*SHAPES, ONE_MORE])
    before = tables_in(tmp_path)
    measured_shapes.clear()
    result = run(SHAPES[:1], grid=Grid(m=(32,), k=(32,), n=(48,)))
    assert measured_shapes == []
    assert (result.measured, result.resumed) == (0, 1)
    assert tables_in(tmp_path) == before


def test_a_sweep_of_other_axes_adds_to_the_table(run):
    run()
    result = run([ONE_MORE], grid=Grid(m=(48,), k=(32,), n=(32,)))
    for table in result.tables.values():
        assert [point.shape for point in table.points] == [*SHAPES, ONE_MORE]
        assert table.grid == Grid(m=(32, 48), k=(32, 64), n=(32, 48))


def test_points_that_no_journal_has_are_not_lost(run, tmp_path, measured_shapes):
    (path,) = run(recipes=["rowwise"]).tables
    next(tmp_path.rglob("journal-*.jsonl")).unlink()
    before, measured_shapes[:] = path.read_bytes(), []
    with pytest.raises(ValueError, match=r"rowwise\.yaml: 1 of its points .* would be lost.*--fresh"):
        run(SHAPES[:1], recipes=["rowwise"])
    assert measured_shapes == []  # said before hours of measuring, not after
    assert path.read_bytes() == before


def test_points_that_no_journal_has_are_replaced_if_measured_again_or_told_so(run, tmp_path):
    run(recipes=["rowwise"])
    next(tmp_path.rglob("journal-*.jsonl")).unlink()
    assert run(recipes=["rowwise"]).measured == 2
    (table,) = run(SHAPES[:1], recipes=["rowwise"], fresh=True, grid=Grid(m=(32,), k=(32,), n=(48,))).tables.values()
    assert [point.shape for point in table.points] == SHAPES[:1]
    assert table.grid == Grid(m=(32,), k=(32,), n=(48,))


def test_one_more_recipe_measures_only_that(run, tmp_path, measured_shapes):
    run(recipes=["tensorwise"])
    before = tables_in(tmp_path)
    measured_shapes.clear()
    run(recipes=["rowwise"])
    assert measured_shapes == [(shape, ("rowwise",)) for shape in measuring_order(SHAPES)]
    after = tables_in(tmp_path)
    assert set(after) == {"tensorwise", "rowwise"}
    assert after["tensorwise"] == before["tensorwise"]


def test_recipes_asked_for_together_are_measured_together(run, measured_shapes):
    run(recipes=["tensorwise"])
    measured_shapes.clear()
    result = run(recipes=["tensorwise", "rowwise"])
    assert measured_shapes == [(shape, ("tensorwise", "rowwise")) for shape in measuring_order(SHAPES)]
    assert (result.measured, result.resumed) == (2, 0)
    assert run(recipes=["rowwise", "tensorwise"]).measured == 0


def test_shapes_are_measured_in_the_grids_order_each_once(run, measured_shapes):
    run([*SHAPES, ONE_MORE, *SHAPES], recipes=["tensorwise"])
    assert [shape for shape, _ in measured_shapes] == measuring_order([*SHAPES, ONE_MORE])


def test_stopped_at_once_it_goes_on_later(run, tmp_path):
    stopped = run(stop_after_s=0)
    assert (stopped.measured, stopped.remaining, stopped.tables) == (0, 2, {})
    assert tables_in(tmp_path) == {}
    finished = run()
    assert (finished.measured, finished.resumed, finished.remaining) == (2, 0, 0)
    assert len(tables_in(tmp_path)) == len(RECIPES)


def test_stopped_midway_it_goes_on_where_it_was(run, tmp_path, monkeypatch, measured_shapes):
    clock = itertools.count(step=60.0)  # a minute passes before every point
    with monkeypatch.context() as patch:
        patch.setattr(sweep_module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
        stopped = run([*SHAPES, ONE_MORE], stop_after_s=150.0)
    assert (stopped.measured, stopped.remaining, stopped.tables) == (2, 1, {})
    finished = run([*SHAPES, ONE_MORE])
    assert (finished.measured, finished.resumed, finished.remaining) == (1, 2, 0)
    assert sorted(shape for shape, _ in measured_shapes) == sorted([*SHAPES, ONE_MORE])
    assert len(tables_in(tmp_path)) == len(RECIPES)


def test_with_all_points_there_the_time_limit_does_not_matter(run):
    run()
    assert len(run(stop_after_s=0).tables) == len(RECIPES)


def test_capped_shapes_are_reported_and_not_measured(run, measured_shapes, capsys):
    result = run([SHAPES[0], HUGE])
    assert list(result.capped) == [HUGE]
    assert "FLOP" in result.capped[HUGE]
    assert [shape for shape, _ in measured_shapes] == [SHAPES[0]]
    assert [[p.shape for p in table.points] for table in result.tables.values()] == [[SHAPES[0]]] * 3
    said = capsys.readouterr().err
    assert "1 points left out" in said
    assert f"  {HUGE}: {result.capped[HUGE]}\n" in said


def test_with_every_shape_capped_there_is_nothing_to_do(run, tmp_path):
    with pytest.raises(ValueError, match=r"no point to measure: all 1 were left out, .*FLOP"):
        run([HUGE])
    assert list(tmp_path.iterdir()) == []


def test_fresh_measures_again_and_keeps_the_old_journal(run, tmp_path, capsys):
    run()
    (journal,) = tmp_path.rglob("journal-*.jsonl")
    content = journal.read_bytes()
    capsys.readouterr()
    result = run(fresh=True)
    assert (result.measured, result.resumed) == (2, 0)
    (aside,) = tmp_path.rglob("journal-*.jsonl.*")
    assert aside.read_bytes() == content
    assert f"the earlier journal is kept as {aside}" in capsys.readouterr().err


def test_a_journal_of_other_software_is_named_and_not_used(run, setup, capsys):
    older = replaced(setup, software=replaced(setup.software, torch="2.0.0"))
    run(setup=older)
    capsys.readouterr()
    result = run()
    assert (result.measured, result.resumed) == (2, 0)
    assert "is of other software, protocol or device: not used" in capsys.readouterr().err


def test_a_damaged_journal_stops_the_sweep(run, tmp_path):
    run()
    (journal,) = tmp_path.rglob("journal-*.jsonl")
    journal.write_bytes(journal.read_bytes().replace(b'"m":32', b'"m":"thirty-two"', 1))
    before = tables_in(tmp_path)
    with pytest.raises(JournalError, match=r"journal-\w+\.jsonl:2: "):
        run()
    assert tables_in(tmp_path) == before


@pytest.fixture
def with_rowwise(monkeypatch):
    """Makes every point measured from now on one whose rowwise arm is this; tensorwise is measured."""

    def replace_measuring(rowwise):
        arms = {"bf16": timed_arm([200.0] * 8), "tensorwise": timed_arm([100.0] * 8), "rowwise": rowwise}

        def measure_point(shape, protocols, *_):
            chosen = {name: arm for name, arm in arms.items() if name in ("bf16", *protocols)}
            return point_record((shape.m, shape.k, shape.n), arms=chosen)

        monkeypatch.setattr(sweep_module, "measure_point", measure_point)

    return replace_measuring


FAILED = ArmRecord(status="failed", detail="broken kernel")


def test_a_recipe_without_numbers_is_in_its_table(run, with_rowwise):
    with_rowwise(FAILED)
    result = run(SHAPES[:1], recipes=["tensorwise", "rowwise"])
    assert [table.points[0].status for table in result.tables.values()] == ["measured", "failed"]


def test_a_point_without_numbers_is_tried_once_more(run, with_rowwise):
    with_rowwise(FAILED)
    assert [run(SHAPES[:1], recipes=["rowwise"]).measured for _ in range(4)] == [1, 1, 0, 0]
    assert run(SHAPES[:1], recipes=["tensorwise"]).measured == 1


def test_a_second_attempt_that_succeeds_counts(run, with_rowwise):
    with_rowwise(FAILED)
    run(SHAPES[:1], recipes=["rowwise"])
    with_rowwise(timed_arm([50.0] * 8))
    (table,) = run(SHAPES[:1], recipes=["rowwise"]).tables.values()
    assert (table.points[0].status, table.points[0].speedup) == ("measured", 4.0)
    assert run(SHAPES[:1], recipes=["rowwise"]).measured == 0


def test_the_record_of_a_lost_device_is_kept(run, tmp_path, monkeypatch):
    record = point_record((32, 32, 48), arms=dict.fromkeys(("bf16", "tensorwise"), FAILED))

    def lose_the_device(*_):
        raise DeviceLostError(record)

    monkeypatch.setattr(sweep_module, "measure_point", lose_the_device)
    for attempt in (1, 2):
        with pytest.raises(DeviceLostError):
            run(SHAPES[:1], recipes=["tensorwise"])
        assert journal_points(tmp_path) == [(32, 32, 48)] * attempt
    assert tables_in(tmp_path) == {}
    (table,) = run(SHAPES[:1], recipes=["tensorwise"]).tables.values()  # it is not run into for ever
    assert table.points[0].status == "failed"


def with_speedup(speedup, minutes, shape=(32, 32, 48)):
    arms = {"bf16": timed_arm([100.0 * speedup] * 8), "tensorwise": timed_arm([100.0] * 8)}
    return point_record(shape, arms=arms, measured_at=NOON + timedelta(minutes=minutes))


def test_a_table_takes_the_latest_record_of_a_shape():
    records = [with_speedup(2.0, 0), with_speedup(4.0, 1), with_speedup(3.0, 2, (32, 64, 48)), with_speedup(5.0, 3)]
    table = make_table(GRID, SHAPES, "tensorwise", SETUP, records)
    assert [(point.k, point.speedup) for point in table.points] == [(32, 5.0), (64, 3.0)]
    assert table.measured_at == NOON + timedelta(minutes=3)


def test_a_table_prefers_numbers_to_a_later_failure():
    failed = point_record((32, 32, 48), arms={"bf16": timed_arm([100.0] * 8), "tensorwise": FAILED})
    first, last = with_speedup(2.0, 1), with_speedup(3.0, 2)
    for records, speedup in (([first, failed], 2.0), ([failed, last], 3.0), ([first, failed, last, failed], 3.0)):
        table = make_table(GRID, SHAPES, "tensorwise", SETUP, records)
        assert [point.speedup for point in table.points] == [speedup]


def test_a_table_ignores_records_of_other_recipes_and_shapes():
    rowwise = point_record((32, 32, 48), arms={name: timed_arm([9.0] * 8) for name in ("bf16", "rowwise")})
    later = with_speedup(7.0, 9, (16, 16, 16))
    table = make_table(GRID, SHAPES, "tensorwise", SETUP, [with_speedup(2.0, 1), rowwise, later])
    assert [(point.k, point.speedup) for point in table.points] == [(32, 2.0)]
    assert (table.measured_at, table.protocol) == (NOON + timedelta(minutes=1), PROTOCOL)


def test_fresh_replaces_a_table_that_cannot_be_read(run, tmp_path):
    run(SHAPES[:1], recipes=["rowwise"])
    (path,) = tmp_path.rglob("rowwise.yaml")
    path.write_text("schema: 0\n")
    (table,) = run(SHAPES[:1], recipes=["rowwise"], fresh=True).tables.values()
    assert read_table(path) == table
