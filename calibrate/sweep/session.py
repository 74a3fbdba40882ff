"""One process's part of a sweep: measure what a queue deals out, and decide which records are to be trusted.

In: a job, a queue. Out: records, each given to a `Ledger` as soon as it is there.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Protocol

from fp8gate.calibrate.device.host_load import HostLoad
from fp8gate.calibrate.device.registry import kind_of
from fp8gate.calibrate.device.watch import other_processes, spoils_timings
from fp8gate.calibrate.points.point_record import ArmName, ArmRecord, PointRecord, Stages
from fp8gate.calibrate.points.point_worker import Job
from fp8gate.calibrate.points.task_queue import Task, TaskQueue
from fp8gate.calibrate.points.worker_pool import Died, InThisProcess, WorkerPool
from fp8gate.calibrate.sweep.journal import SweepJournal
from fp8gate.calibrate.sweep.progress import Observer
from fp8gate.filter.contract.recipes import Recipe
from fp8gate.filter.contract.shapes import LinearShape


class Ledger(Protocol):
    """Where records go."""

    def keep(self, task: Task, record: PointRecord) -> None:
        """On return the record is safe."""

    def refuse(self, task: Task, error: float) -> None:
        """Again and again, bf16 against itself was off by so much."""

    def say(self, message: str) -> None: ...


class JournalLedger:
    """The ledger of a whole sweep: the journal, what this call has added to it, and how much it was asked to add."""

    def __init__(self, journal: SweepJournal, observer: Observer, asked: int = 0) -> None:
        self.journal, self.observer, self.asked = journal, observer, asked
        self.measured: list[PointRecord] = []
        self.off: dict[LinearShape, float] = {}

    @property
    def left(self) -> int:
        """How many of the measurements asked for are not there."""
        return self.asked - len(self.measured) - len(self.off)

    def keep(self, task: Task, record: PointRecord) -> None:
        self.journal.append(record)
        self.measured.append(record)
        self.observer.finished(record)

    def refuse(self, task: Task, error: float) -> None:
        self.off[task.shape] = error

    def say(self, message: str) -> None:
        self.observer.say(message)

    def forget_rest(self) -> None:
        """Do not wait for what is not there yet."""
        self.asked -= self.left

    def ask(self, count: int, at_most: int = 0) -> None:
        """So many more measurements are wanted, and perhaps `at_most` others later."""
        self.asked += count
        self.observer.expect(self.asked + at_most)


@dataclass(frozen=True, kw_only=True, slots=True)
class SessionResult:
    """What measuring came to, beside the records.

    remaining: tasks without a record. troubles: what each device reported. lost: ranks that did not stay to the end,
    and why. host: the load of this machine.
    """

    remaining: int
    retried: int
    discarded: list[Stages]
    starting_s: float
    idle_s: float
    troubles: dict[str, str]
    lost: dict[int, str] = field(default_factory=dict)
    host: HostLoad = field(default_factory=HostLoad)

    def then(self, later: SessionResult) -> SessionResult:
        """This session and a later one of the same sweep, together."""
        return SessionResult(
            remaining=self.remaining + later.remaining,
            retried=self.retried + later.retried,
            discarded=[*self.discarded, *later.discarded],
            starting_s=self.starting_s + later.starting_s,
            idle_s=self.idle_s + later.idle_s,
            troubles={**self.troubles, **later.troubles},
            lost=self.lost,
            host=max(self.host, later.host, key=lambda host: host.highest),
        )


class SweepSession:
    """The measuring of one process and its workers on one device. stop_after_s: begin no further point then."""

    def __init__(self, job: Job, queue: TaskQueue, ledger: Ledger, *, stop_after_s: float | None) -> None:
        self.job, self.queue, self.ledger = job, queue, ledger
        self.start = time.monotonic()
        self.until = math.inf if stop_after_s is None else self.start + stop_after_s
        self.discarded: list[Stages] = []
        self.troubles: Counter[str] = Counter()
        self.idle_s = self.starting_s = 0.0
        self.watch = kind_of(job.device).make_watch(job.device)
        self.others: set[str] = set()
        self.host = HostLoad()

    def measure(self, workers: int) -> None:
        """Until the queue has nothing more or the time is up. workers: 0 for this process alone.

        Raises DeviceLostError if the device fails for good, NoChildError if no worker can start.
        """
        if not self.queue.wait(self.until):
            return
        self._look_for_others([])
        self._sample_load()
        with WorkerPool(self.job, workers) if workers else InThisProcess(self.job) as pool:
            try:
                while self.queue.wait(self.until):
                    for outcome in pool.run(self.queue, self.until):
                        record = self._record(outcome) if isinstance(outcome, Died) else outcome.record
                        self._note(outcome.task, record)
                        self._look_for_others(pool.pids)
                        self._sample_load()
            finally:
                self.idle_s = pool.use.idle_s
                self.starting_s = (pool.use.first_turn_at or time.monotonic()) - self.start

    def result(self, *, remaining: int) -> SessionResult:
        troubles = ", ".join(f"{trouble}, {count} times" for trouble, count in self.troubles.most_common())
        return SessionResult(
            remaining=remaining,
            retried=self.queue.retries,
            discarded=self.discarded,
            starting_s=self.starting_s,
            idle_s=self.idle_s,
            troubles={self.job.measured_on: troubles} if troubles else {},
            host=self.host,
        )

    def _note(self, task: Task, record: PointRecord | None) -> None:
        """Keep a record, unless it is to be taken again: the GPU slowed down, or the control was off."""
        if record is None:
            return
        trouble = next((arm.detail for arm in record.arms.values() if arm.status == "unstable"), "")
        self.troubles.update([trouble] if trouble else [])
        control_error = record.control_error(next(iter(self.job.protocols.values())))
        if control_error:
            trouble = f"bf16 against itself differs by {control_error:.1%}"
        if trouble and self.queue.may_retry(task):
            self.ledger.say(f"{task.shape}: {trouble}; measured again later")
            self.discarded.append(record.stages)
        elif control_error:
            self.ledger.say(f"{task.shape}: {trouble}, again: not to be trusted")
            self.discarded.append(record.stages)
            self.ledger.refuse(task, control_error)
        else:
            self.ledger.keep(task, record)

    def _record(self, died: Died) -> PointRecord | None:
        """None if the task is tried again."""
        if self.queue.may_try_after_death(died.task):
            self.ledger.say(f"{died.task.shape}: {died.detail}; measured again later")
            return None
        return failed_record(died.task, self.job.protocols, f"{died.detail}, twice", self.job.measured_on)

    def _look_for_others(self, own: Sequence[int]) -> None:
        """Name each other process on the device once."""
        for other in other_processes(self.watch.processes(), own):
            if other not in self.others:
                self.others.add(other)
                self.ledger.say(spoils_timings(other))

    def _sample_load(self) -> None:
        """Say once that the machine is busy."""
        was_busy = self.host.is_busy
        self.host.sample()
        if self.host.is_busy and not was_busy:
            self.ledger.say(f"warning: the host is busy and may spoil timings: {self.host}")


def failed_record(task: Task, recipes: Iterable[Recipe], detail: str, measured_on: str = "") -> PointRecord:
    """The record of a point that nobody could measure."""
    arms: tuple[ArmName, ...] = ("bf16", *recipes)
    return PointRecord(
        m=task.shape.m,
        k=task.shape.k,
        n=task.shape.n,
        measured_at=datetime.now(timezone.utc).replace(microsecond=0),
        stages=Stages(),
        process=0,
        measured_on=measured_on,
        repeat=task.repeat,
        arms=dict.fromkeys(arms, ArmRecord(status="failed", detail=detail)),
    )
