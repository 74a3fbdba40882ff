"""Quiet: who loads something onto the device waits while another times, and the other way round.

Threads stand in for processes: a lock belongs to the file that each has opened for itself.
"""

from __future__ import annotations

import multiprocessing
import threading

import pytest
from torch._inductor.runtime.triton_heuristics import CachingAutotuner

from fp8gate.calibrate.quiet import Quiet, load_kernels_in

WAITS_S, ENTERS_S = 0.2, 10.0


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def enter(how, device="device"):
    """Another process asks for this; returns what is set when it gets it."""
    entered = threading.Event()

    def wait():
        with getattr(Quiet(device), how)():
            entered.set()

    threading.Thread(target=wait, daemon=True).start()
    return entered


@pytest.mark.parametrize(("ours", "theirs"), [("kept", "disturbing"), ("disturbing", "kept"), ("kept", "kept")])
def test_one_that_keeps_quiet_is_alone(ours, theirs):
    with getattr(Quiet("device"), ours)():
        entered = enter(theirs)
        assert not entered.wait(WAITS_S)
    assert entered.wait(ENTERS_S)


def test_many_may_disturb_at_once():
    with Quiet("device").disturbing():
        assert enter("disturbing").wait(ENTERS_S)


def test_devices_do_not_wait_for_each_other():
    with Quiet("device").kept():
        assert enter("disturbing", "another").wait(ENTERS_S)


def test_quiet_ends_with_an_error():
    with pytest.raises(RuntimeError, match="lost"), Quiet("device").kept():
        raise RuntimeError("the device is lost")
    assert enter("kept").wait(ENTERS_S)


def keep_until_killed(folder, connection):
    import tempfile

    tempfile.tempdir = folder
    with Quiet("device").kept():
        connection.send("kept")
        connection.recv()


def test_quiet_ends_with_a_killed_process(tmp_path):
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=keep_until_killed, args=(str(tmp_path), theirs), daemon=True)
    process.start()
    assert ours.recv() == "kept"
    entered = enter("disturbing")
    assert not entered.wait(WAITS_S)
    process.kill()
    assert entered.wait(ENTERS_S)
    process.join()


def test_inductor_loads_kernels_only_where_nobody_keeps_quiet(monkeypatch):
    loaded = threading.Event()
    monkeypatch.setattr(CachingAutotuner, "_make_launchers", lambda autotuner: loaded.set())
    load_kernels_in(Quiet("device"))
    with Quiet("device").kept():
        threading.Thread(target=CachingAutotuner._make_launchers, args=(None,), daemon=True).start()
        assert not loaded.wait(WAITS_S)
    assert loaded.wait(ENTERS_S)
