"""How long a parent waits for its children, and threads that end a wait that has no limit of its own."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Seconds. start_s: for the fork server to start a child. The first child waits until the server has imported
    torch. step_s: for one step of a child: to open its job, to compile, to load, to measure. A child that takes longer
    is stuck. ending_s: for an idle child to end by itself."""

    start_s: float = 600.0
    step_s: float = 600.0
    ending_s: float = 5.0


@contextlib.contextmanager
def ended_after(seconds: float, end: Callable[[], object]) -> Iterator[threading.Event]:
    """Call `end` on another thread if the block takes longer: it must make the block's call fail.

    Yields an event that is set once the time is up.
    """
    is_late = threading.Event()

    def end_late() -> None:
        is_late.set()
        end()

    timer = threading.Timer(seconds, end_late)
    timer.daemon = True
    timer.start()
    try:
        yield is_late
    finally:
        timer.cancel()
