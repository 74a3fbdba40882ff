"""What the ranks of a sweep tell each other, over torch.distributed's store.

In: a store. Out: the plan that rank 0 has published, tasks that are taken one by one, messages to rank 0, and signs of
life. No call waits for another rank, but for the plan.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec

from fp8gate.calibrate.journal import Setup
from fp8gate.calibrate.records import PointRecord, Stages
from fp8gate.calibrate.schedule import Task
from fp8gate.filter.shapes import LinearShape
from fp8gate.filter.table import Recipe

PREFIX = "fp8gate"
PLAN_S = 600.0  # for rank 0 to say what is to be measured: it may have more to import, or to lock
POLL_S = 0.2


class RanksError(RuntimeError):
    """This rank cannot go on: rank 0 is gone, or never came."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What rank 0 wants measured. repeats: by every rank, to see how far they are apart, but for `repeated` ones."""

    setup: Setup
    recipes: tuple[Recipe, ...]
    seed: int
    tasks: tuple[Task, ...]
    repeats: tuple[LinearShape, ...] = ()
    repeated: tuple[tuple[LinearShape, str], ...] = ()
    stop_after_s: float | None = None

    def own_tasks(self, measured_on: str) -> list[Task]:
        """What this device measures whoever else does."""
        return [Task(shape, repeat=True) for shape in self.repeats if (shape, measured_on) not in self.repeated]


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


class Board:
    """The store as one rank uses it. Raises RanksError where it is gone."""

    def __init__(self, store: Any, rank: int) -> None:
        self.store, self.rank = store, rank
        self._posted = 0
        self._ticket: int | None = None  # the number of the task that is this rank's, perhaps not there yet

    def publish(self, plan: Plan) -> None:
        self.append(plan.tasks, 0)
        self._set("plan", msgspec.json.encode(msgspec.structs.replace(plan, tasks=())))

    def append(self, tasks: Iterable[Task], count: int) -> int:
        """Add to the `count` tasks there are; returns how many there are now."""
        for task in tasks:
            self._set(f"task/{count}", msgspec.json.encode(task))
            count += 1
        self._set("count", str(count))
        return count

    def plan(self) -> Plan:
        """What rank 0 has published. Its tasks are taken one by one."""
        give_up_at = time.monotonic() + PLAN_S
        while (text := self._get("plan")) is None:
            if time.monotonic() > give_up_at:
                raise RanksError(f"rank 0 said within {PLAN_S:.0f} s not what to measure")
            self.require_no_error()
            time.sleep(POLL_S)
        return msgspec.json.decode(text, type=Plan)

    def take(self) -> tuple[int, Task] | None:
        """The next task that nobody has taken, and its number; None if there is none now."""
        if self._ticket is None:
            with _gone():
                self._ticket = int(self.store.add(f"{PREFIX}/taken", 1)) - 1
            self._set(f"owner/{self._ticket}", str(self.rank))
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
        """How many numbers ranks have taken, of tasks that there are and of the next that there will be."""
        with _gone():
            return int(self.store.add(f"{PREFIX}/taken", 0))

    def owner(self, number: int) -> int | None:
        text = self._get(f"owner/{number}")
        return None if text is None else int(text)

    def post(self, message: Message) -> None:
        self._set(f"message/{self.rank}/{self._posted}", msgspec.json.encode(message))
        self._posted += 1

    def message(self, rank: int, number: int) -> Message | None:
        text = self._get(f"message/{rank}/{number}")
        return None if text is None else msgspec.json.decode(text, type=Message)

    def beat(self, count: int) -> None:
        self._set(f"beat/{self.rank}", str(count))

    def beats(self, rank: int) -> bytes | None:
        return self._get(f"beat/{rank}")

    def end(self, error: str = "") -> None:
        """No further task will come; only the first word counts. error: what every rank is to raise."""
        if not self.has_ended():
            self._set("end", error)

    def has_ended(self) -> bool:
        return self._get("end") is not None

    def require_no_error(self) -> None:
        """Raises ValueError with what ended the sweep for all."""
        if error := self._get("end"):
            raise ValueError(error.decode())

    def _set(self, key: str, value: str | bytes) -> None:
        with _gone():
            self.store.set(f"{PREFIX}/{key}", value)

    def _get(self, key: str) -> bytes | None:
        with _gone():
            key = f"{PREFIX}/{key}"
            return bytes(self.store.get(key)) if self.store.check([key]) else None


@contextlib.contextmanager
def _gone() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch's errors of the store and the network
        raise RanksError(f"the store that rank 0 or torchrun holds is gone: {error}") from error
