"""Whether processes are alive, for the tests that start some."""

from __future__ import annotations

import time
from pathlib import Path

PATIENCE_S = 60.0  # for what ends within a second: only a test that fails waits so long


def is_alive(pid: int) -> bool:
    """Zombies are not: the process that started them will hear of their end."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rsplit(")", 1)[1].split()[0] not in "ZX"


def wait_until_gone(*pids: int) -> None:
    give_up_at = time.monotonic() + PATIENCE_S
    while left := [pid for pid in pids if is_alive(pid)]:
        assert time.monotonic() < give_up_at, f"{left} are left"
        time.sleep(0.01)
