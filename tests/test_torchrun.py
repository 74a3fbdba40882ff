"""Sweeps that torchrun itself starts, on the CPU: it ends all ranks if one fails, and may start them again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from forked import MAX_WAIT_S, SHAPES, points_in_table, sweep_arguments, table_in
from samples import SOURCE, journal_points

pytestmark = pytest.mark.slow
START = """
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, {tests!r})
from forked import PointBench, before_call, prepare, wait_until

prepare()
{change}
from fp8gate.cli import app
app()
"""
DIES_ONCE = """
flag = Path({flag!r})

def die_once():
    if not flag.exists():
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)

if os.environ["RANK"] == "0":
    before_call(PointBench, "measure", 1, lambda: wait_until(flag.exists))
else:
    before_call(PointBench, "measure", 3, die_once)
"""


@pytest.fixture
def torchrun(tmp_path):
    """Runs a sweep by two ranks. change: code that each rank runs before."""
    command = [*sweep_arguments(tmp_path), "--workers", "0"]

    def run(*options, change=""):
        script = tmp_path / "start.py"
        script.write_text(START.format(tests=str(Path(__file__).parent), change=change))
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *options]
        environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
        process = subprocess.run(
            [*launcher, str(script), *command], env=environment, capture_output=True, text=True, timeout=2 * MAX_WAIT_S
        )
        assert process.returncode == 0, process.stderr
        return process.stdout

    return run


def test_torchrun_measures_every_point_once_and_a_share_on_every_rank(torchrun, tmp_path):
    assert torchrun().count("wrote ") == 1
    points = journal_points(tmp_path)
    assert len(points) == len(SHAPES) + 2  # one point is measured again by each
    assert sorted(set(points)) == points_in_table(tmp_path) == SHAPES
    assert table_in(tmp_path).protocol.devices == 2
    assert f"0 points measured, {len(points)} taken from the journal" in torchrun()
    assert journal_points(tmp_path) == points


def test_torchrun_restarts_ranks_that_go_on_from_the_journal(torchrun, tmp_path):
    """Its store outlives them: what it holds of the first attempt must not confuse the second."""
    flag = tmp_path / "died"
    torchrun("--max-restarts=1", change=DIES_ONCE.format(flag=str(flag)))
    assert flag.exists()
    points = journal_points(tmp_path)
    assert len(points) == len(SHAPES) + 2  # none twice, but the one that both ranks measure again
    assert sorted(set(points)) == points_in_table(tmp_path) == SHAPES
