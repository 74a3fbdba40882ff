"""One folder for the temporary files of a command: it goes with the command, and what a killed one left, with the next.

The fork server's socket, the timing lock and the journals that nobody wants to keep lie in it.
"""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import multiprocessing.util
import os
import shutil
import tempfile
import time
from pathlib import Path

PREFIX, LOCK = "fp8gate-run-", "lock"
STARTING_S = 3600.0  # a folder without a lock may be one that is being made, but not for so long
AFTER_MULTIPROCESSING = -200  # multiprocessing ends what it has in its folder at -100


def use_run_folder() -> Path:
    """Make the folder of this process, which ends with it, and remove those of processes that were killed."""
    remove_left_over()
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o600)  # held until the process ends, however it does
    fcntl.flock(handle, fcntl.LOCK_EX)
    multiprocessing.current_process()._config["tempdir"] = str(folder)  # type: ignore[attr-defined]  # no public name
    multiprocessing.util.Finalize(
        None, shutil.rmtree, (folder,), {"ignore_errors": True}, exitpriority=AFTER_MULTIPROCESSING
    )
    return folder


def run_folder() -> Path:
    """Where temporary files go: the folder of `use_run_folder`, or one that multiprocessing makes."""
    return Path(multiprocessing.util.get_temp_dir())


def remove_left_over() -> None:
    """Remove the folders of this user's processes that are not there any more."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # another process removes it too, or it is another user's
            if folder.stat().st_uid == os.getuid() and not folder.is_symlink() and _is_left_over(folder):
                shutil.rmtree(folder)


def _is_left_over(folder: Path) -> bool:
    """Whether nobody holds its lock."""
    try:
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        return time.time() > folder.stat().st_mtime + STARTING_S
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(handle)
    return True
