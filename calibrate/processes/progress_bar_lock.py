"""Imported by the fork server: tqdm's lock is one of threads, not of processes.

Inductor makes a progress bar for every compilation, though it shows none. tqdm's default lock is a semaphore of the
system, which a child that is killed leaves behind: Python warns of "leaked semaphore objects".
"""

import contextlib
import threading

with contextlib.suppress(ImportError):  # torch does without tqdm where there is none
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())
