"""Keep other processes from loading kernels onto the device while one of them times.

Compiling touches the device at its end: Inductor loads each kernel that it has compiled. On a GPU, where processes take
turns, every load takes 0.4 ms from the process that is timing (NVIDIA H200, LOG.md). A sweep with 14 workers loads some
25 kernels a second. So loads wait for the short pauses between two runs.

In: a file that the processes of one command share. Out: a `TimingLock` for each of them.
"""

from __future__ import annotations

import fcntl
import multiprocessing.util
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def timing_lock_file() -> Iterator[Path]:
    """The file that the processes of one command on one device share."""
    with tempfile.NamedTemporaryFile(suffix=".timing", dir=multiprocessing.util.get_temp_dir()) as file:
        yield Path(file.name)


class TimingLock:
    """One process's hold on the file. A process that dies gives back what it holds."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._is_timing = False

    @contextmanager
    def timing(self) -> Iterator[None]:
        """No other process is `loading` meanwhile."""
        with self._locked(fcntl.LOCK_EX):
            self._is_timing = True
            try:
                yield
            finally:
                self._is_timing = False

    @contextmanager
    def loading(self) -> Iterator[None]:
        """No other process is `timing` meanwhile; several may load at once."""
        if self._is_timing:  # this process loads what it is about to time
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
