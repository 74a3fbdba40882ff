"""How busy the machine is with other work, as its load average tells.

In: samples before and during a sweep. Out: the highest load, and whether the machine was busy.
"""

from __future__ import annotations

import os
from collections.abc import Callable

BUSY = 1.25
"""Processes that are ready to run, for each processor of the machine. What a sweep does itself keeps at most one ready
for each (a CPU's threads, or workers that compile), and the average over a minute wavers."""


class HostLoad:
    """The machine's load average over the last minute, the highest of all samples.

    It counts the processes of the whole machine, so it is compared with all processors, and not only with those that
    this process may use.
    """

    def __init__(self, read: Callable[[], tuple[float, float, float]] = os.getloadavg) -> None:
        self._read = read
        self._processors = os.cpu_count() or 1
        self.highest = 0.0

    def sample(self) -> None:
        try:
            self.highest = max(self.highest, self._read()[0])
        except OSError:  # this system does not tell
            return

    @property
    def is_busy(self) -> bool:
        return self.highest > BUSY * self._processors

    def __str__(self) -> str:
        return f"load {self.highest:.1f} on {self._processors} processors"
