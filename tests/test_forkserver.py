"""The fork server: Ctrl-C is its parent's to handle, from the first moment on."""

from __future__ import annotations

import signal
from pathlib import Path

from forked import MAX_WAIT_S

from fp8gate.calibrate.processes.forkserver import start_server


def write_inherited(path: Path) -> None:
    """In a child: what it inherits of the signals that the server blocks."""
    path.write_text(" ".join(found.name for found in blocked_signals()))


def blocked_signals() -> set[signal.Signals]:
    return {signal.Signals(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])}


def test_neither_the_server_nor_its_children_hear_of_ctrl_c_and_their_parent_does(tmp_path: Path) -> None:
    child = start_server().Process(target=write_inherited, args=(tmp_path / "blocked",))
    child.start()
    child.join(MAX_WAIT_S)
    assert (tmp_path / "blocked").read_text() == "SIGINT"
    assert blocked_signals() == set()
