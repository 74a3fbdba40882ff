"""What libraries say on standard error though nobody can act on it: exactly these messages are left out.

In: nothing. Out: filters on loggers and warnings, and `without_lines` for what C++ writes. All else gets through.
The command line and the fork server import it for its effect, before torch; children inherit it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import threading
import warnings
from collections.abc import Iterator

LOGGED = {
    # torchao registers its enum in a way that torch no longer needs: theirs to change, and nothing depends on it.
    "torch.utils._pytree": r"<enum '\w+'> is an Enum subclass and is now natively supported by torch\.compile",
    # torchao's C++ extensions, for other devices and for inference: float8 training uses torch's own products.
    "torchao": r"Failed to load \S*_C\w*\.\S*so: |Skipping import of cpp extensions",
}
"""Logger -> how the message begins that is left out."""
WARNED = (
    # Threads and children make their own context when the first product needs it, as the warning says itself.
    r"Attempting to run cuBLAS, but there was no current CUDA context",
    # Before 2.13 torch says at the first cycle what only matters with a second one. A breakdown profiles one cycle.
    r"Warning: Profiler clears events at the end of each cycle",
)
"""How the warnings begin that are left out."""
PROFILER_LINES = re.compile(
    rb"USDT:\S+ \S+ \d+:\d+ \w+\.cpp:\d+\] profiler_(start|stop)\s*"
    rb"|ERROR:\S+ \S+ \d+:\d+ DeviceProperties\.cpp:\d+\] gpuGetDeviceCount failed with code (35|100)\s*"
)
"""kineto reports that profiling begins and ends. In torch's builds for CUDA it also reports that there is no driver
(35) or no GPU (100). Its setting KINETO_LOG_LEVEL would hide its other errors too."""


class _LeftOut(logging.Filter):
    """Drops one message of one logger."""

    def __init__(self, pattern: str) -> None:
        super().__init__()
        self.pattern = re.compile(pattern)

    def filter(self, record: logging.LogRecord) -> bool:
        return not self.pattern.match(record.getMessage())

    def __eq__(self, other: object) -> bool:  # a filter that is added twice is kept once
        return isinstance(other, _LeftOut) and other.pattern == self.pattern

    __hash__ = logging.Filter.__hash__


def leave_out_noise() -> None:
    """From now on, in this process and in those forked from it."""
    for name, pattern in LOGGED.items():
        logging.getLogger(name).addFilter(_LeftOut(pattern))
    for pattern in WARNED:
        warnings.filterwarnings("ignore", message=pattern)


@contextlib.contextmanager
def without_lines(pattern: re.Pattern[bytes]) -> Iterator[None]:
    """Leave out the lines of standard error that the pattern matches as a whole, also those that C++ writes.

    Other lines get through as soon as they are complete.
    """
    sys.stderr.flush()
    original, (reading, writing) = os.dup(2), os.pipe()
    os.dup2(writing, 2)
    os.close(writing)
    thread = threading.Thread(target=_pass_on, args=(reading, original, pattern), daemon=True)
    thread.start()
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(original, 2)  # closes the pipe's last end, unless a process that was started meanwhile holds one
        thread.join(timeout=1.0)
        if not thread.is_alive():
            os.close(original)


def _pass_on(reading: int, original: int, pattern: re.Pattern[bytes]) -> None:
    with open(reading, "rb") as lines:
        for line in lines:
            if not pattern.fullmatch(line):
                os.write(original, line)


leave_out_noise()
