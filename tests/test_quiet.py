"""Quiet: who loads something onto the device waits while another times, and the other way round.

Threads stand in for processes: a lock belongs to the file that each has opened for itself.
"""

from __future__ import annotations

import multiprocessing
import threading

import pytest
from torch._inductor.runtime.triton_heuristics import CachingAutotuner

from fp8gate.calibrate.device.timing_lock import TimingLock, load_kernels_under, timing_lock_file

WAITS_S, ENTERS_S = 0.2, 10.0


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


@pytest.mark.parametrize(("ours", "theirs"), [("kept", "disturbing"), ("disturbing", "kept"), ("kept", "kept")])
def test_one_that_keeps_quiet_is_alone(path, ours, theirs):
    with getattr(TimingLock(path), ours)():
        entered = enter(path, theirs)
        assert not entered.wait(WAITS_S)
    assert entered.wait(ENTERS_S)


def test_many_may_disturb_at_once(path):
    with TimingLock(path).disturbing():
        assert enter(path, "disturbing").wait(ENTERS_S)


def test_sweeps_do_not_wait_for_each_other(path):
    with TimingLock(path).kept(), timing_lock_file() as another:
        assert enter(another, "disturbing").wait(ENTERS_S)


def test_who_keeps_quiet_may_disturb_itself_and_still_keeps_it(path):
    quiet = TimingLock(path)
    with quiet.kept():
        with quiet.disturbing():
            pass
        entered = enter(path, "disturbing")
        assert not entered.wait(WAITS_S)
    assert entered.wait(ENTERS_S)


def test_quiet_ends_with_an_error(path):
    with pytest.raises(RuntimeError, match="lost"), TimingLock(path).kept():
        raise RuntimeError("the device is lost")
    assert enter(path, "kept").wait(ENTERS_S)


def keep_until_killed(path, connection):
    with TimingLock(path).kept():
        connection.send("kept")
        connection.recv()


def test_quiet_ends_with_a_killed_process(path):
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=keep_until_killed, args=(path, theirs), daemon=True)
    process.start()
    assert ours.recv() == "kept"
    entered = enter(path, "disturbing")
    assert not entered.wait(WAITS_S)
    process.kill()
    assert entered.wait(ENTERS_S)
    process.join()


def test_inductor_loads_kernels_only_where_nobody_keeps_quiet(path, monkeypatch):
    loaded = threading.Event()
    monkeypatch.setattr(CachingAutotuner, "_make_launchers", lambda autotuner: loaded.set())
    load_kernels_under(TimingLock(path))
    with TimingLock(path).kept():
        threading.Thread(target=CachingAutotuner._make_launchers, args=(None,), daemon=True).start()
        assert not loaded.wait(WAITS_S)
    assert loaded.wait(ENTERS_S)
