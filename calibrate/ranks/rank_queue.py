"""A rank's tasks: its own, and those that it takes from the store one by one, as it gets free.

In: the store. Out: a queue for the rank's session, a ledger that posts everything to rank 0, and signs of life.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Container, Iterable, Iterator

from fp8gate.calibrate.points.point_record import PointRecord
from fp8gate.calibrate.points.task_queue import Task, TaskQueue
from fp8gate.calibrate.ranks.rank_store import POLL_S, Message, RanksError, RankStore
from fp8gate.filter.contract.shapes import LinearShape

BEAT_S = 2.0  # a rank shows this often that it lives


class RankTaskQueue(TaskQueue):
    """This rank's own tasks, and those that it takes from the board."""

    def __init__(self, own: Iterable[Task], store: RankStore) -> None:
        super().__init__(own)
        self._store = store
        self.numbers: dict[Task, int] = {}  # of those taken

    def next(self, measured: Container[LinearShape] = ()) -> Task | None:
        found = super().next(measured)
        if found is None and self._take():
            found = super().next(measured)
        return found

    def wait(self, until: float = math.inf) -> bool:
        """Wait for a task, until none will come: those of a rank that dies are dealt out again."""
        while not self and not self._take():
            if self._store.has_ended() or time.monotonic() >= until:
                return False
            time.sleep(POLL_S)
        return time.monotonic() < until

    def _take(self) -> bool:
        """Whether there was a task to take."""
        taken = None if self._store.has_ended() else self._store.take()
        if taken is None:
            return False
        number, task = taken
        self.numbers[task] = number
        self.give_back(task)
        return True


class RankLedger:
    """The ledger of a rank: it sends everything to rank 0."""

    def __init__(self, store: RankStore, queue: RankTaskQueue) -> None:
        self._store, self._queue = store, queue

    def keep(self, task: Task, record: PointRecord) -> None:
        self._store.post(Message(task=self._queue.numbers.get(task), record=record))

    def refuse(self, task: Task, error: float) -> None:
        self._store.post(Message(task=self._queue.numbers.get(task), off=(task.shape, error)))

    def say(self, message: str) -> None:
        self._store.post(Message(say=message))


@contextlib.contextmanager
def heartbeat(store: RankStore) -> Iterator[None]:
    """Show, for as long as the block runs, that this rank lives."""
    stop = threading.Event()

    def beat() -> None:
        count = 0
        with contextlib.suppress(RanksError):  # the rank will notice by itself
            while not stop.wait(BEAT_S if count else 0):
                count += 1
                store.beat(count)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
