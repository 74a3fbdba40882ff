"""Quiet on the device while one process times: what others load onto it would interrupt what is timed.

Compiling touches the device at its end: Inductor loads each kernel that it has compiled. On a GPU, where processes take
turns, every such load takes 0.4 ms from the process that is timing (NVIDIA H200, LOG.md), some 25 times a second in a
sweep with 14 workers. So they wait for the short pauses between two runs.

In: the device's identity. Out: a `Quiet` that all processes on this machine share by a lock file.
"""

from __future__ import annotations

import fcntl
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fp8gate.calibrate.gpu_watch import open_for_everyone


class Quiet:
    """One device's quiet. A process that dies gives back what it holds."""

    def __init__(self, device_identity: str) -> None:
        self._handle = open_for_everyone(Path(tempfile.gettempdir()) / f"fp8gate-{device_identity}.quiet")

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Nobody else is `disturbing` meanwhile."""
        with self._locked(fcntl.LOCK_EX):
            yield

    @contextmanager
    def disturbing(self) -> Iterator[None]:
        """Nobody keeps quiet meanwhile; several may disturb at once."""
        with self._locked(fcntl.LOCK_SH):
            yield

    @contextmanager
    def _locked(self, how: int) -> Iterator[None]:
        fcntl.flock(self._handle, how)
        try:
            yield
        finally:
            fcntl.flock(self._handle, fcntl.LOCK_UN)


def load_kernels_in(quiet: Quiet) -> None:
    """From now on, this process loads the kernels that Inductor has compiled only where nobody keeps quiet."""
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    load = CachingAutotuner._make_launchers

    def wait_and_load(autotuner: CachingAutotuner) -> Any:
        with quiet.disturbing():
            return load(autotuner)  # type: ignore[no-untyped-call]

    CachingAutotuner._make_launchers = wait_and_load  # type: ignore[method-assign]
