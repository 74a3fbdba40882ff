"""What the ranks of a sweep tell each other, over torch.distributed's store.

In: a store. Out: what rank 0 has published, tasks that are taken one by one, messages to rank 0, and signs of life.
A store may outlive a sweep, as torchrun's does when it restarts ranks. So each sweep is a session of its own, which
rank 0 opens, and a process that joins it is told apart from an earlier process of the same rank.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from fp8gate.calibrate.points.point_record import PointRecord, Stages
from fp8gate.calibrate.points.task_queue import Task
from fp8gate.calibrate.sweep.sweep_tasks import SweepTasks
from fp8gate.filter.contract.errors import InputError, UnfinishedError
from fp8gate.filter.contract.shapes import LinearShape

PREFIX = "fp8gate"
WAITING = "waiting"  # the session of processes that rank 0 has not yet let into its own
TASKS_S = 600.0  # for rank 0 to say what is to be measured: it may have more to import, or to lock
CALL_S = 120.0  # for a call to the store, which answers at once unless its machine hangs
POLL_S = 0.2


class RanksError(UnfinishedError):
    """This rank cannot go on: rank 0 is gone, or never came."""


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """From a rank to rank 0. task: its number among those dealt out, if it is one.

    left: the rank has ended, because it is `lost`, if that says why. refused: why no rank may go on.
    """

    task: int | None = None
    record: PointRecord | None = None
    off: tuple[LinearShape, float] | None = None
    say: str = ""
    left: bool = False
    lost: str = ""
    retried: int = 0
    discarded: tuple[Stages, ...] = ()
    troubles: dict[str, str] = {}
    refused: str = ""


class RankStore:
    """The store as one process uses it in one session. Raises RanksError where it is gone."""

    def __init__(self, store: Any, session: str, me: str) -> None:
        self.me = me
        self._store, self._session = store, session
        self._posted = 0
        self._ticket: int | None = None  # the number of the task that is this process's, perhaps not there yet
        self._calls: dict[int, float] = {}  # since when a thread waits for the store

    @classmethod
    def open(cls, store: Any) -> RankStore:
        """Rank 0's, of a new session."""
        return cls(store, uuid.uuid4().hex, uuid.uuid4().hex)

    @classmethod
    def join(cls, store: Any, rank: int) -> RankStore:
        """Another rank's, of the session that rank 0 lets it into. Raises RanksError if it does not."""
        waiting, me = cls(store, WAITING, uuid.uuid4().hex), uuid.uuid4().hex
        waiting._set(f"join/{rank}", me)
        session = waiting._wait(f"session/{me}")
        return cls(store, session.decode(), me)

    def admit(self, ranks: Iterable[int]) -> dict[int, str]:
        """Tell the processes that wait, the newest of each rank, which session to join."""
        waiting = RankStore(self._store, WAITING, self.me)
        asked = {rank: text.decode() for rank in ranks if (text := waiting._get(f"join/{rank}"))}
        for process in asked.values():
            waiting._set(f"session/{process}", self._session)
        return asked

    def publish(self, tasks: SweepTasks) -> None:
        self.append(tasks.tasks, 0)
        self._set("tasks", msgspec.json.encode(msgspec.structs.replace(tasks, tasks=())))

    def append(self, tasks: Iterable[Task], count: int) -> int:
        """Add to the `count` tasks there are; returns how many there are now."""
        for task in tasks:
            self._set(f"task/{count}", msgspec.json.encode(task))
            count += 1
        return count

    def published(self) -> SweepTasks:
        """What rank 0 has published; its tasks are taken one by one. Raises InputError if the sweep ended before."""
        return msgspec.json.decode(self._wait("tasks"), type=SweepTasks)

    def take(self) -> tuple[int, Task] | None:
        """The next task that nobody has taken, and its number; None if there is none now."""
        if self._ticket is None:
            with self._call():
                self._ticket = int(self._store.add(self._key("taken"), 1)) - 1
            self._set(f"owner/{self._ticket}", self.me)
        text = self._get(f"task/{self._ticket}")
        if text is None:
            return None
        number, self._ticket = self._ticket, None
        return number, msgspec.json.decode(text, type=Task)

    def task(self, number: int) -> Task:
        text = self._get(f"task/{number}")
        assert text is not None
        return msgspec.json.decode(text, type=Task)

    def taken(self) -> int:
        """How many numbers have been taken, of tasks that there are and of the next that there will be."""
        with self._call():
            return int(self._store.add(self._key("taken"), 0))

    def owner(self, number: int) -> str | None:
        text = self._get(f"owner/{number}")
        return None if text is None else text.decode()

    def post(self, message: Message) -> None:
        self._set(f"message/{self.me}/{self._posted}", msgspec.json.encode(message))
        self._posted += 1

    def message(self, process: str, number: int) -> Message | None:
        text = self._get(f"message/{process}/{number}")
        return None if text is None else msgspec.json.decode(text, type=Message)

    def beat(self, count: int) -> None:
        self._set(f"beat/{self.me}", str(count))

    def beats(self, process: str) -> bytes | None:
        return self._get(f"beat/{process}")

    def end(self, error: str = "") -> None:
        """No further task will come; only the first word counts. error: what every rank is to raise."""
        if not self.has_ended():
            self._set("end", error)

    def has_ended(self) -> bool:
        return self._get("end") is not None

    def require_no_error(self) -> None:
        """Raises InputError with what ended the sweep for all."""
        if error := self._get("end"):
            raise InputError(error.decode())

    def waiting_s(self) -> float:
        """How long the oldest call to the store has been waiting; 0 if there is none."""
        return max((time.monotonic() - since for since in list(self._calls.values())), default=0.0)

    def _wait(self, key: str) -> bytes:
        give_up_at = time.monotonic() + TASKS_S
        while (text := self._get(key)) is None:
            if time.monotonic() > give_up_at:
                raise RanksError(f"rank 0 has not said within {TASKS_S:.0f} s what to measure")
            self.require_no_error()
            time.sleep(POLL_S)
        return text

    def _key(self, key: str) -> str:
        return f"{PREFIX}/{self._session}/{key}"

    def _set(self, key: str, value: str | bytes) -> None:
        with self._call():
            self._store.set(self._key(key), value)

    def _get(self, key: str) -> bytes | None:
        with self._call():
            return bytes(self._store.get(self._key(key))) if self._store.check([self._key(key)]) else None

    @contextlib.contextmanager
    def _call(self) -> Iterator[None]:
        thread = threading.get_ident()
        self._calls[thread] = time.monotonic()
        try:
            yield
        except RuntimeError as error:  # torch's errors of the store and the network
            raise RanksError(f"the store that rank 0 or torchrun holds is gone: {error}") from error
        finally:
            self._calls.pop(thread, None)


@contextlib.contextmanager
def watchdog(store: RankStore) -> Iterator[None]:
    """End this process if the store does not answer, which no call to it can be made to give up."""
    stop = threading.Event()

    def watch() -> None:
        while not stop.wait(min(1.0, CALL_S / 2)):
            if store.waiting_s() > CALL_S:
                print(f"fp8gate: the store has not answered for {CALL_S:.0f} s: this rank ends", file=sys.stderr)
                sys.stderr.flush()
                os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        stop.set()
