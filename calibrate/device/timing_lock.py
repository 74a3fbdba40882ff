"""Quiet on the device while one process times: what others load onto it would interrupt what is timed.

Compiling touches the device at its end: Inductor loads each kernel that it has compiled. On a GPU, where processes take
turns, every such load takes 0.4 ms from the process that is timing (NVIDIA H200, LOG.md), some 25 times a second in a
sweep with 14 workers. So they wait for the short pauses between two runs.

In: a file of the sweep's own, whose lock its processes share. Out: a `Quiet` for each of them.
"""

from __future__ import annotations

import fcntl
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def timing_lock_file() -> Iterator[Path]:
    """For the processes of one sweep on one device."""
    with tempfile.NamedTemporaryFile(prefix="fp8gate-", suffix=".quiet") as file:
        yield Path(file.name)


class TimingLock:
    """What one process knows of it; one that dies gives back what it holds."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._is_kept = False

    @contextmanager
    def kept(self) -> Iterator[None]:
        """No other process is `disturbing` meanwhile."""
        with self._locked(fcntl.LOCK_EX):
            self._is_kept = True
            try:
                yield
            finally:
                self._is_kept = False

    @contextmanager
    def disturbing(self) -> Iterator[None]:
        """No other process keeps quiet meanwhile; several may disturb at once."""
        if self._is_kept:  # by this process, whose own work it is
            yield
            return
        with self._locked(fcntl.LOCK_SH):
            yield

    @contextmanager
    def _locked(self, how: int) -> Iterator[None]:
        fcntl.flock(self._file, how)
        try:
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)


def load_kernels_under(quiet: TimingLock) -> None:
    """From now on, this process loads the kernels that Inductor has compiled only where nobody keeps quiet."""
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    load = CachingAutotuner._make_launchers

    def wait_and_load(autotuner: CachingAutotuner) -> Any:
        with quiet.disturbing():
            return load(autotuner)  # type: ignore[no-untyped-call]

    CachingAutotuner._make_launchers = wait_and_load  # type: ignore[method-assign]
