"""A command's temporary files go with it; those of a command that was killed go with the next one."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from pathlib import Path

import pytest
from samples import python

from fp8gate.calibrate.processes import run_folder
from fp8gate.calibrate.processes.run_folder import LOCK, PREFIX, STARTING_S, remove_left_over

PATIENCE_S = 120.0
HOLD = """
import time
from fp8gate.calibrate.processes.run_folder import run_folder, use_run_folder

folder = use_run_folder()
assert run_folder() == folder
print(folder, flush=True)
time.sleep(SECONDS)
"""
SWEEP = (
    "from fp8gate.__main__ import main; main()",
    *("calibrate", "--device", "cpu", "--grid", "quick", "--workers", "2", "--out"),
)


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def hold(folder, seconds):
    process = python("-c", HOLD.replace("SECONDS", str(seconds)), TMPDIR=str(folder))
    return process, Path(process.stdout.readline().strip())


def test_a_folder_goes_with_its_process(temporary):
    process, folder = hold(temporary, 0)
    assert folder.parent == temporary
    assert process.wait(PATIENCE_S) == 0, process.stderr.read()
    assert list(temporary.iterdir()) == []


def test_a_killed_process_leaves_its_folder_to_the_next(temporary):
    process, folder = hold(temporary, 600)
    remove_left_over()
    assert (folder / LOCK).exists()
    process.kill()
    process.wait(PATIENCE_S)
    assert folder.exists()
    remove_left_over()
    assert list(temporary.iterdir()) == []


def test_what_may_still_be_made_and_what_is_not_ours_is_left(temporary, monkeypatch):
    made, old, link, other = (temporary / f"{PREFIX}{name}" for name in ("made", "old", "link", "other"))
    made.mkdir()
    old.mkdir()
    before = time.time() - 2 * STARTING_S
    os.utime(old, (before, before))
    elsewhere = temporary / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / LOCK).touch()
    link.symlink_to(elsewhere)
    remove_left_over()
    assert {path.name for path in temporary.iterdir()} == {made.name, link.name, "elsewhere"}
    other.mkdir()
    (other / LOCK).touch()
    monkeypatch.setattr(run_folder.os, "getuid", lambda: 12345)
    remove_left_over()
    assert other.exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_sweep_that_is_asked_to_end_leaves_nothing_and_says_how_to_go_on(tmp_path, number):
    temporary = Path(tempfile.mkdtemp())  # a short path: a socket lies in it
    process = python("-c", *SWEEP, str(tmp_path / "out"), TMPDIR=str(temporary))
    give_up_at = time.monotonic() + PATIENCE_S
    while not list(tmp_path.rglob("journal-*.jsonl")) and time.monotonic() < give_up_at:
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 128 + number, said
    assert f"fp8gate: ended by {number.name}; what was measured is in the journal" in said
    assert [path.name for path in temporary.iterdir()] == ["fp8gate-cpu.lock"]


@pytest.mark.parametrize("moment_s", [0.0, 0.1, 0.3])
def test_ctrl_c_in_the_first_second_is_exit_code_130(tmp_path, moment_s):
    process = python("-c", *SWEEP, str(tmp_path / "out"), "--workers", "0")
    time.sleep(0.05 + moment_s)  # Python itself starts in this time; before, it has no handler of ours or its own
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode in (130, -signal.SIGINT), said  # a shell reports both as 130
    if process.returncode == 130:
        assert "Traceback" not in said
