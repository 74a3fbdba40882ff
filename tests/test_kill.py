"""A sweep with workers that is killed loses no point, measures none twice, and leaves no process behind."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import msgspec
import pytest
from samples import python

from fp8gate.calibrate.points.point_record import PointRecord
from fp8gate.calibrate.sweep.journal import content_of
from fp8gate.filter.contract.recipes import RECIPES
from fp8gate.filter.contract.table import read_table

pytestmark = pytest.mark.slow
SHAPES = [(32, k, n) for k in (32, 48, 64) for n in (32, 64)]
MAX_WAIT_S = 300.0  # for anything: it only takes so long where it fails, or on a machine under heavy load
ENDING_S = 120.0  # for the fork server to notice, which it does when its imports are done
MAX_RUNS = 3  # until the control agrees with itself, on a machine that others use too
GO_ON = "fp8gate: stopped; what was measured is in the journal: run the same command to go on"


@pytest.fixture
def sweep(tmp_path_factory):
    """Starts the same sweep each time it is called."""
    folder = tmp_path_factory.mktemp("k")  # short, as sockets in TMPDIR need
    sweeps = Sweeps(folder)
    yield sweeps
    sweeps.clean_up()


class Sweeps:
    """Runs of one command, one after the other."""

    def __init__(self, folder):
        self.out, self.folder, self.grid = folder / "out", folder, folder / "grid.yaml"
        self.grid.write_text("m: [32]\nk: [32, 48, 64]\nn: [32, 64]\n")
        self.seen = set()  # every process of every run

    def start(self):
        args = ["--device", "cpu", "--grid", str(self.grid), "--out", str(self.out), "--workers", "2"]
        self.process = python("-m", "fp8gate", "calibrate", *args, OMP_NUM_THREADS="1", TMPDIR=str(self.folder))
        self.seen.add(self.process.pid)

    def family(self):
        """The processes that the sweep has now: those it started, and the workers, which the fork server started."""
        helpers = children(self.process.pid)
        workers = [pid for helper in helpers for pid in children(helper)]
        self.seen.update(helpers, workers)
        return helpers, workers

    def kill(self):
        self.process.kill()

    def press_ctrl_c(self):
        """A terminal tells all of them."""
        helpers, workers = self.family()
        for pid in (self.process.pid, *helpers, *workers):
            os.kill(pid, signal.SIGINT)

    def records(self):
        journals = list(self.out.rglob("journal-*.jsonl"))
        assert len(journals) <= 1
        lines = [line for journal in journals for line in journal.read_bytes().split(b"\n")[1:-1]]
        return [msgspec.json.decode(content_of(line), type=PointRecord) for line in lines]

    def tables(self):
        return {path.stem: read_table(path) for path in self.out.rglob("*.yaml")}

    def wait_until(self, condition):
        give_up_at = time.monotonic() + MAX_WAIT_S
        while not condition():
            assert self.process.poll() is None, self.process.communicate()[1]
            assert time.monotonic() < give_up_at
            self.family()
            time.sleep(0.01)

    def wait_for_records(self, count):
        self.wait_until(lambda: len(self.records()) >= count)

    def wait_for_helpers(self):
        self.wait_until(lambda: self.family()[0])

    def wait_for_import(self, library):
        """Until the fork server has loaded this library."""

        def has_loaded():
            servers = [pid for pid in self.family()[0] if "forkserver" in process_file(pid, "cmdline")]
            return any(library in process_file(pid, "maps") for pid in servers)

        self.wait_until(has_loaded)

    def wait_for_workers(self):
        self.wait_until(lambda: len(self.family()[1]) == 2)

    def finish(self):
        """Let it run to its end, and again if the control was off. Returns what it said last. Noise is an end too."""
        for _ in range(MAX_RUNS):
            self.wait_until_ended()
            output, errors = self.process.communicate()
            if self.process.returncode == 0 or "are noise and decide nothing" in errors:
                return output + errors
            assert self.process.returncode == 1, errors
            assert "bf16 against itself was" in output
            self.start()
        raise AssertionError(output)

    def wait_until_ended(self):
        give_up_at = time.monotonic() + MAX_WAIT_S
        while self.process.poll() is None:
            assert time.monotonic() < give_up_at
            self.family()
            time.sleep(0.01)

    def assert_nobody_is_left(self):
        give_up_at = time.monotonic() + ENDING_S
        while left := [pid for pid in self.seen if is_alive(pid)]:
            assert time.monotonic() < give_up_at, f"{left} outlived the sweep"
            time.sleep(0.02)

    def clean_up(self):
        for pid in self.seen:
            if is_alive(pid):
                os.kill(pid, signal.SIGKILL)
        self.process.communicate()


def children(pid):
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += map(int, path.read_text().split())
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def process_file(pid, name):
    try:
        return Path(f"/proc/{pid}/{name}").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def is_alive(pid):
    """Zombies are not: they only wait for somebody to hear of their end."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rsplit(")", 1)[1].split()[0] not in "ZX"


def assert_complete(sweep):
    """Each shape was measured once, and one of them again, before any second look; and all are in every table."""
    records = sweep.records()
    first, looks = records[: len(SHAPES) + 1], records[len(SHAPES) + 1 :]
    assert sorted((r.m, r.k, r.n) for r in first if not r.repeat) == SHAPES
    (again,) = ((r.m, r.k, r.n) for r in first if r.repeat)
    assert {(r.m, r.k, r.n) for r in looks} >= {*SHAPES} - {again}
    tables = sweep.tables()
    assert set(tables) == set(RECIPES)
    for table in tables.values():
        assert table.incomplete is None
        assert [(p.m, p.k, p.n) for p in table.points] == SHAPES
        assert {p.status for p in table.points} <= {"measured", "ambiguous", "noisy"}


@pytest.fixture
def _heeding_ctrl_c():
    """A job started in the background has Ctrl-C ignored, and so would have what it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_heeding_ctrl_c")
def test_stopped_again_and_again_it_goes_on(sweep):
    stops = [
        (sweep.wait_for_helpers, sweep.kill, -signal.SIGKILL),
        (lambda: sweep.wait_for_records(1), sweep.press_ctrl_c, 130),
        (lambda: sweep.wait_for_records(3), sweep.kill, -signal.SIGKILL),
    ]
    kept = []
    for wait, stop, exit_code in stops:
        sweep.start()
        wait()
        stop()
        sweep.wait_until_ended()
        sweep.assert_nobody_is_left()
        assert sweep.process.returncode == exit_code
        assert all(table.incomplete for table in sweep.tables().values())
        records = sweep.records()
        assert records[: len(kept)] == kept
        kept = records
    assert 3 <= len(kept) <= len(SHAPES)
    sweep.start()
    said = sweep.finish()
    sweep.assert_nobody_is_left()
    assert f"{len(kept)} taken from the journal" in said
    assert sweep.records()[: len(kept)] == kept
    assert_complete(sweep)


def test_workers_that_are_killed_are_replaced(sweep):
    sweep.start()
    for count in (0, 1, 3):
        sweep.wait_for_records(count)
        sweep.wait_for_workers()
        os.kill(sweep.family()[1][0], signal.SIGKILL)
    said = sweep.finish()
    sweep.assert_nobody_is_left()
    assert said.count("its process was killed by signal 9 (out of memory?); measured again later") == 3
    assert_complete(sweep)


@pytest.mark.usefixtures("_heeding_ctrl_c")
@pytest.mark.parametrize("library", ["msgspec", "libtorch"])
def test_ctrl_c_at_the_start_leaves_nobody_behind(sweep, library):
    """While the fork server loads what it imports first, and what it imports for workers."""
    sweep.start()
    sweep.wait_for_import(library)
    sweep.press_ctrl_c()
    sweep.wait_until_ended()
    sweep.assert_nobody_is_left()
    _, errors = sweep.process.communicate()
    assert sweep.process.returncode == 130, errors
    assert GO_ON in errors.splitlines()
    assert "Traceback" not in errors
    assert sweep.records() == []
