"""What may spoil a timing from outside: a GPU that slows down, another process on it, another sweep.

In: a device. Out: the reason of a slowdown, the SM clock, the processes that are not ours; a lock per device.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from fp8gate.calibrate.device.cuda.nvml import nvml, nvml_handle
from fp8gate.filter.contract.errors import InputError


class DeviceBusyError(InputError):
    """Another sweep has the device; the message names its process."""


class GpuWatch:
    """NVML's view of one GPU. What the driver does not tell, or not just now, is not known."""

    def __init__(self, device: torch.device) -> None:
        with nvml() as self._nvml:
            self._handle = nvml_handle(str(torch.cuda.get_device_properties(device).uuid))
        self._slowdowns = {
            self._nvml.nvmlClocksEventReasonHwSlowdown: "hardware slowdown",
            self._nvml.nvmlClocksEventReasonHwThermalSlowdown: "hardware thermal slowdown",
            self._nvml.nvmlClocksEventReasonHwPowerBrakeSlowdown: "power brake",
            self._nvml.nvmlClocksEventReasonSwThermalSlowdown: "thermal slowdown",
        }

    def slowdown(self) -> str | None:
        """Why the GPU is slower than it should be now. The power limit is no reason: training runs at it."""
        reasons = self._reasons()
        return ", ".join(name for bit, name in self._slowdowns.items() if reasons & bit) or None

    def is_power_limited(self) -> bool:
        """Whether the clock is lowered now to keep to the power limit."""
        return bool(self._reasons() & self._nvml.nvmlClocksEventReasonSwPowerCap)

    def sm_clock_mhz(self) -> int | None:
        clock: int | None = self._ask("nvmlDeviceGetClockInfo", self._nvml.NVML_CLOCK_SM)
        return clock

    def processes(self) -> dict[int, str]:
        """Every process that computes on the GPU, by its number, as far as the driver tells."""
        found = self._ask("nvmlDeviceGetComputeRunningProcesses") or []
        return {process.pid: self._name(process.pid) for process in found}

    def _reasons(self) -> int:
        """Why the clock is not at its highest, as bits; 0 if the driver does not tell."""
        return self._ask("nvmlDeviceGetCurrentClocksEventReasons") or 0

    def _ask(self, question: str, *arguments: object) -> Any:
        try:
            return getattr(self._nvml, question)(self._handle, *arguments)
        except self._nvml.NVMLError:
            return None

    def _name(self, pid: int) -> str:
        try:
            return str(self._nvml.nvmlSystemGetProcessName(pid))
        except self._nvml.NVMLError:  # of another container, or gone
            return "unknown"


class CpuWatch:
    """On a CPU nothing tells."""

    def slowdown(self) -> None:
        return None

    def is_power_limited(self) -> bool:
        return False

    def sm_clock_mhz(self) -> None:
        return None

    def processes(self) -> dict[int, str]:
        return {}


Watch = GpuWatch | CpuWatch


def make_watch(device: torch.device) -> Watch:
    return GpuWatch(device) if device.type == "cuda" else CpuWatch()


def foreign(processes: dict[int, str], own: Iterable[int]) -> list[str]:
    """The processes that are not ours: "1234 (python3)".

    Inside a container the driver may number processes as the host does: then ours cannot be told from others, and only
    more processes than we have are foreign.
    """
    own = set(own)
    if processes.keys() & own or not own:
        return [f"{pid} ({name})" for pid, name in sorted(processes.items()) if pid not in own]
    surplus = len(processes) - len(own)
    return [f"{surplus} that cannot be told from this sweep's own"] if surplus > 0 else []


class DeviceLock:
    """Held by a sweep as long as it measures: two at once would measure each other. Open it as a context."""

    def __init__(self, device: torch.device) -> None:
        name = str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else "cpu"
        self.path = Path(tempfile.gettempdir()) / f"fp8gate-{name}.lock"

    def __enter__(self) -> DeviceLock:
        """Raises DeviceBusyError if another process holds the lock."""
        self._file = os.fdopen(_open_for_everyone(self.path), "r+")  # not truncated: it names the holder
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            holder = self._file.read().strip() or "unknown"
            self._file.close()
            raise DeviceBusyError(
                f"another sweep is measuring on this device: process {holder} ({self.path})"
            ) from error
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _open_for_everyone(path: Path) -> int:
    """A file that other users can open too: one user's lock file must not keep the others from the device."""
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return os.open(path, os.O_RDWR | os.O_NOFOLLOW)  # with O_CREAT, Linux refuses another user's file in /tmp
    os.fchmod(handle, 0o666)  # whatever the umask
    return handle
