"""Sweeps by several ranks, for real: processes on the CPU that torchrun or the test starts, and kills.

Nothing may hang: every process has a limit, after which the test fails.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from samples import SOURCE, journal_points

from fp8gate.filter.contract.table import read_table

SHAPES = [(32, k, n) for k in (32, 48, 64) for n in (32, 64)]
LIMIT_S = 90.0
START = """
import sys
from fp8gate.calibrate import dealing, sweep
sweep.CPU_CONTROL_ERROR = 9.0
dealing.BEAT_S, dealing.DEAD_S, dealing.JOIN_S = 0.2, 3.0, 10.0
{more}
from fp8gate.cli import app
app()
"""
SLOW = """
import time
from fp8gate.calibrate import worker
measure = worker.Bench.measure
worker.Bench.measure = lambda bench, point: time.sleep(0.5) or measure(bench, point)
"""
ANOTHER_KIND = """
import msgspec
describe = sweep.describe_device
sweep.describe_device = lambda device: msgspec.structs.replace(describe(device), name="CPU of another kind")
"""


@pytest.fixture
def command(tmp_path):
    """The sweep's arguments; its tables and journal are in tmp_path / "out"."""
    grid = tmp_path / "grid.yaml"
    grid.write_text("m: [32]\nk: [32, 48, 64]\nn: [32, 64]\n")
    out = ["--device", "cpu", "--recipes", "rowwise", "--grid", str(grid), "--out", str(tmp_path / "out")]
    return ["calibrate", *out, "--workers", "0"]


class Ranks:
    """Ranks that the test starts itself, so that none dies because another does."""

    def __init__(self, command):
        self.command, self.processes = command, []
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.port = listener.getsockname()[1]

    def start(self, rank, world, more=""):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self.port, "OMP_NUM_THREADS": 1, **place}
        process = subprocess.Popen(
            [sys.executable, "-c", START.format(more=more), *self.command],
            env={**os.environ, "PYTHONPATH": str(SOURCE), **{name: str(v) for name, v in environment.items()}},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.processes.append(process)
        return process

    def results(self):
        """Each rank's exit code and all that it said."""
        ends = [(*process.communicate(timeout=LIMIT_S), process.returncode) for process in self.processes]
        return [(code, output + errors) for output, errors, code in ends]


@pytest.fixture
def ranks(command):
    started = Ranks(command)
    yield started
    for process in started.processes:
        process.kill()
        process.communicate()


def wait_for_points(folder, count):
    give_up_at = time.monotonic() + LIMIT_S
    while len(journal_points(folder)) < count:
        assert time.monotonic() < give_up_at
        time.sleep(0.02)


def torchrun(command, tmp_path, ranks, *options, more=""):
    """The same through torchrun itself, which ends all ranks if one fails."""
    script = tmp_path / "start.py"
    script.write_text(START.format(more=more))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *options]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*launcher, str(script), *command], env=environment, capture_output=True, text=True, timeout=2 * LIMIT_S
    )


def points_of(tmp_path):
    (path,) = (tmp_path / "out").rglob("rowwise.yaml")
    return [(point.m, point.k, point.n) for point in read_table(path).points]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_torchrun_measures_every_point_once_and_a_share_on_every_rank(command, tmp_path, world):
    process = torchrun(command, tmp_path, world)
    assert process.returncode == 0, process.stderr
    assert points_of(tmp_path) == SHAPES
    points = journal_points(tmp_path)
    assert len(points) == len(SHAPES) + world  # one point is measured again by each
    assert sorted(set(points)) == SHAPES
    assert process.stdout.count("wrote ") == 1
    (path,) = (tmp_path / "out").rglob("rowwise.yaml")
    protocol = read_table(path).protocol
    assert protocol.devices == world
    assert (protocol.between is None) == (world == 1)
    again = torchrun(command, tmp_path, world)
    assert "0 points measured, 6 taken from the journal" in again.stdout


DIES_ONCE = """
import os, pathlib, time
flag = pathlib.Path({flag!r})
from fp8gate.calibrate import worker
measure, points = worker.Bench.measure, []
def die_at_the_third(bench, point):
    points.append(point)
    if os.environ["RANK"] == "0":
        time.sleep(0.5)
    elif len(points) == 3 and not flag.exists():
        flag.touch()
        os.kill(os.getpid(), 9)
    return measure(bench, point)
worker.Bench.measure = die_at_the_third
"""


def test_torchrun_restarts_ranks_that_go_on_from_the_journal(command, tmp_path):
    """Its store outlives them: what it holds of the first attempt must not confuse the second."""
    more = DIES_ONCE.format(flag=str(tmp_path / "died"))
    process = torchrun(command, tmp_path, 2, "--max-restarts=1", more=more)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "died").exists()
    assert points_of(tmp_path) == SHAPES
    points = journal_points(tmp_path)
    assert len(points) == len(SHAPES) + 2  # none twice, but the one that both ranks measure again
    assert sorted(set(points)) == SHAPES


def test_a_rank_that_is_new_measures_its_share_though_all_points_are_there(command, tmp_path):
    assert torchrun(command, tmp_path, 1).returncode == 0
    before = len(journal_points(tmp_path))
    process = torchrun(command, tmp_path, 2)
    assert process.returncode == 0, process.stderr
    assert "did not join" not in process.stderr + process.stdout
    assert len(journal_points(tmp_path)) == before + 1


def test_what_is_wrong_on_rank_0_is_said_everywhere(ranks):
    ranks.command[ranks.command.index("--grid") + 1] = "no such grid.yaml"
    for rank in range(2):
        ranks.start(rank, 2)
    for code, said in ranks.results():
        assert code == 2, said
        assert "no such grid.yaml" in said


def test_a_rank_that_never_starts_does_not_keep_the_others(ranks, tmp_path):
    ranks.start(0, 2)
    ((code, said),) = ranks.results()
    assert code == 0, said
    assert "rank 1 did not join within 10 s" in said
    assert points_of(tmp_path) == SHAPES


def test_a_rank_that_is_killed_loses_no_point(ranks, tmp_path):
    ranks.start(0, 3, SLOW)
    ranks.start(1, 3)
    doomed = ranks.start(2, 3, SLOW.replace("0.5", "60"))
    wait_for_points(tmp_path, 3)  # it has taken its share by now, and is at its first point
    doomed.kill()
    (code, said), (other, _), (killed, _) = ranks.results()
    assert (code, other, killed) == (0, 0, -signal.SIGKILL), said
    assert "rank 2 has not been heard of for 3 s" in said
    assert points_of(tmp_path) == SHAPES
    assert sorted(set(journal_points(tmp_path))) == SHAPES


def test_ranks_of_different_devices_make_no_table(ranks, tmp_path):
    ranks.start(0, 2, SLOW)
    ranks.start(1, 2, ANOTHER_KIND)
    for code, said in ranks.results():
        assert code == 2, said
        assert "device.name is CPU of another kind, there CPU" in said
        assert "rank 1" in said
    assert not list((tmp_path / "out").rglob("*.yaml"))


def test_without_rank_0_the_others_end_and_a_later_sweep_goes_on(ranks, command, tmp_path):
    leader = ranks.start(0, 2, SLOW)
    ranks.start(1, 2, SLOW)
    wait_for_points(tmp_path, 2)
    leader.kill()
    _, (code, said) = ranks.results()
    assert code == 1
    assert "rank 0" in said
    kept = len(journal_points(tmp_path))
    assert torchrun(command, tmp_path, 2).returncode == 0
    assert points_of(tmp_path) == SHAPES
    assert kept >= 2


def test_ctrl_c_ends_all_ranks_and_keeps_what_was_measured(ranks, tmp_path):
    for rank in range(2):
        ranks.start(rank, 2, SLOW)
    wait_for_points(tmp_path, 2)
    for process in ranks.processes:
        process.send_signal(signal.SIGINT)
    (code, said), (other, _) = ranks.results()
    assert code == 130, said
    assert other != 0  # by its own Ctrl-C, or as rank 0 is gone
    assert len(journal_points(tmp_path)) >= 2
