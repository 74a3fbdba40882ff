"""One command at a time measures on a device: a lock file that names its holder."""

from __future__ import annotations

import fcntl
import os
import stat
import tempfile
from pathlib import Path
from types import TracebackType

import torch

from fp8gate.calibrate.device.registry import kind_of
from fp8gate.filter.contract.errors import InputError


class DeviceBusyError(InputError):
    """Another command measures on the device; the message names its process."""


class DeviceLock:
    """Held by a command as long as it measures: two at once would measure each other. Open it as a context."""

    def __init__(self, device: torch.device) -> None:
        name = kind_of(device).lock_name(device)
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
    except FileExistsError:  # with O_CREAT, Linux refuses another user's file in /tmp
        handle = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
        found = os.fstat(handle)
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
            os.close(handle)
            raise InputError(
                f"{path}: expected a file of its own, as it is written to; found a link or no file"
            ) from None
        return handle
    os.fchmod(handle, 0o666)  # whatever the umask
    return handle
