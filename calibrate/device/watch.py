"""What may spoil a timing from outside: a device that slows down, another process on it.

In: a device. Out: a `Watch`, and the processes that are not ours.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol


class Watch(Protocol):
    """What a device tells about itself while it works. A kind of device that tells nothing answers None."""

    def slowdown(self) -> str | None:
        """Why the device is slower than it should be now. The power limit is no reason: training runs at it."""

    def is_power_limited(self) -> bool:
        """Whether the clock is lowered now to keep to the power limit."""

    def sm_clock_mhz(self) -> int | None:
        """The clock of the multiprocessors now."""

    def waited_s(self) -> float | None:
        """How long the threads of this process have waited for a processor so far, if that disturbs timings here."""

    def processes(self) -> dict[int, str]:
        """The name of every process that computes on the device, by its number."""


def spoils_timings(other: str) -> str:
    """The warning about one of `other_processes`."""
    return f"warning: another process is on the device and may spoil timings: {other}"


def other_processes(on_device: dict[int, str], own: Iterable[int]) -> list[str]:
    """The processes on the device that are not ours: "1234 (python3)".

    Inside a container the driver may number processes as the host does. Ours then cannot be told from others, and only
    a surplus over the number that we have is reported.
    """
    own = set(own)
    if on_device.keys() & own or not own:
        return [f"{pid} ({name})" for pid, name in sorted(on_device.items()) if pid not in own]
    surplus = len(on_device) - len(own)
    return [f"{surplus} that cannot be told from this sweep's own"] if surplus > 0 else []
