"""The timing lock: a process that loads kernels waits while another times, and the other way round.

Threads stand in for processes: a lock belongs to the file that each has opened for itself.
"""

from __future__ import annotations

import threading

import pytest
from samples import python
from torch._inductor.runtime.triton_heuristics import CachingAutotuner

from fp8gate.calibrate.device.cuda.kernel_loading import load_kernels_under
from fp8gate.calibrate.device.timing_lock import TimingLock, timing_lock_file

WAITS_S, ENTERS_S = 0.1, 60.0
TIME_UNTIL_KILLED = """
import sys
import time
from pathlib import Path
from fp8gate.calibrate.device.timing_lock import TimingLock

with TimingLock(Path(sys.argv[1])).timing():
    print("timing", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def path():
    with timing_lock_file() as path:
        yield path


def enter(path, how):
    """Another process asks for this; returns what is set when it gets it."""
    entered = threading.Event()

    def wait():
        with getattr(TimingLock(path), how)():
            entered.set()

    threading.Thread(target=wait, daemon=True).start()
    return entered


@pytest.mark.parametrize(("ours", "theirs"), [("timing", "loading"), ("loading", "timing"), ("timing", "timing")])
def test_a_process_that_times_is_alone(path, ours, theirs):
    with getattr(TimingLock(path), ours)():
        entered = enter(path, theirs)
        assert not entered.wait(WAITS_S)
    assert entered.wait(ENTERS_S)


def test_many_may_load_at_once(path):
    with TimingLock(path).loading():
        assert enter(path, "loading").wait(ENTERS_S)


def test_commands_do_not_wait_for_each_other(path):
    with TimingLock(path).timing(), timing_lock_file() as another:
        assert enter(another, "loading").wait(ENTERS_S)


def test_a_process_loads_what_it_times_and_keeps_the_lock(path):
    lock = TimingLock(path)
    with lock.timing():
        with lock.loading():
            pass
        entered = enter(path, "loading")
        assert not entered.wait(WAITS_S)
    assert entered.wait(ENTERS_S)


def test_the_lock_is_given_back_after_an_error(path):
    with pytest.raises(RuntimeError, match="lost"), TimingLock(path).timing():
        raise RuntimeError("the device is lost")
    assert enter(path, "timing").wait(ENTERS_S)


def test_the_lock_is_given_back_by_a_process_that_is_killed(path):
    process = python("-c", TIME_UNTIL_KILLED, str(path))
    try:
        assert process.stdout.readline() == "timing\n"
        entered = enter(path, "loading")
        assert not entered.wait(WAITS_S)
    finally:
        process.kill()
        process.communicate()
    assert entered.wait(ENTERS_S)


def test_inductor_loads_kernels_only_while_no_process_times(path, monkeypatch):
    loaded = threading.Event()
    monkeypatch.setattr(CachingAutotuner, "_make_launchers", lambda autotuner: loaded.set())
    load_kernels_under(TimingLock(path))
    with TimingLock(path).timing():
        threading.Thread(target=CachingAutotuner._make_launchers, args=(None,), daemon=True).start()
        assert not loaded.wait(WAITS_S)
    assert loaded.wait(ENTERS_S)
