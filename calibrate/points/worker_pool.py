"""Many processes compile, one at a time measures: all points of a schedule, whatever happens to the processes.

In: a job, a schedule. Out: an outcome a task, as they come. The device is handed from worker to worker: whoever has
compiled its point waits for its turn, and nobody else touches the device meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import TYPE_CHECKING

from fp8gate.calibrate.device.capacity import MAX_WORKER_BYTES
from fp8gate.calibrate.points.measure_point import DeviceLostError, make_ready
from fp8gate.calibrate.points.point_record import PointRecord
from fp8gate.calibrate.points.point_worker import (
    Broken,
    BrokenError,
    Job,
    Measured,
    PointBench,
    Ready,
    Turn,
    Warm,
    work,
)
from fp8gate.calibrate.points.task_queue import Task, TaskQueue
from fp8gate.calibrate.processes.forkserver import start_server
from fp8gate.filter.contract.shapes import LinearShape

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerProcess

MAX_STEP_S = 600.0  # to compile a point, or to measure it: who takes longer is stuck
POLL_S = 5.0
GOODBYE_S = 5.0  # for an idle worker to end by itself
MAX_LOST = 3  # workers in a row in which the device failed: it is gone for all
MAX_STILLBORN = 3  # workers in a row that die before they have compiled anything: it is not the points


@dataclass(frozen=True, slots=True)
class Finished:
    """A task and its record."""

    task: Task
    record: PointRecord


@dataclass(frozen=True, slots=True)
class Died:
    """A task whose process died, and how."""

    task: Task
    detail: str


class WorkersDiedError(RuntimeError):
    """No process can measure anything: none can start, or none can use the device."""


@dataclass(slots=True)
class DeviceUse:
    """Seconds since the first turn on the device, and those in which nobody had a turn."""

    first_turn_at: float | None = None
    idle_since: float = 0.0
    idle_s: float = 0.0

    def begin(self, now: float) -> None:
        if self.first_turn_at is None:
            self.first_turn_at = now
        else:
            self.idle_s += now - self.idle_since

    def end(self, now: float) -> None:
        self.idle_since = now


class InThisProcess:
    """The same without workers: compile, then measure, one point after the other."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.use = DeviceUse()
        self._bench = PointBench(job)

    def __enter__(self) -> InThisProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to end."""

    @property
    def pids(self) -> list[int]:
        return [os.getpid()]

    def run(self, schedule: TaskQueue) -> Iterator[Finished | Died]:
        while task := schedule.next():
            point = make_ready(task, self.job.protocols, self.job.device)
            self.use.begin(time.monotonic())
            try:
                record = self._bench.measure(point)
            except BrokenError as error:
                raise WorkersDiedError(str(error)) from error
            self.use.end(time.monotonic())
            yield Finished(task, record)


class WorkerPool:
    """`count` measuring processes; a context that ends them."""

    def __init__(self, job: Job, count: int) -> None:
        self.job = job
        self.use = DeviceUse()
        self._count = count
        self._workers: list[_Worker] = []
        self._stillborn = 0
        self._lost = 0

    def __enter__(self) -> WorkerPool:
        self._context = start_server()
        try:
            while len(self._workers) < self._count:
                self._workers.append(self._start(early=True))
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.dismiss()
        for worker in self._workers:
            worker.end()

    @property
    def pids(self) -> list[int]:
        return [worker.process.pid for worker in self._workers if worker.process.pid]

    def run(self, schedule: TaskQueue) -> Iterator[Finished | Died]:
        """Every task's outcome; what is given back to the schedule meanwhile is dealt out again.

        Raises DeviceLostError if the device fails in several workers in a row, WorkersDiedError if none can start.
        """
        while True:
            self._deal(schedule)
            busy = [worker for worker in self._workers if worker.task]
            if not busy and schedule:
                self._replace(0)  # everyone has measured what is left: a fresh process has not
                continue
            if not busy:
                return
            self._give_turn()
            self._end_stuck()
            speakers = [worker for worker in self._workers if worker.task or worker.is_warming]
            for connection in wait([worker.connection for worker in speakers], POLL_S):
                worker = next(w for w in self._workers if w.connection is connection)
                outcome = self._hear(worker, schedule)
                self._give_turn()  # before the outcome is dealt with: the device need not wait for that
                if outcome:
                    yield outcome

    def _deal(self, schedule: TaskQueue) -> None:
        for index, worker in enumerate(self._workers):
            if worker.task is None and (task := schedule.next(worker.measured)):
                if not worker.process.is_alive():  # while it was idle: the task is not at fault
                    self._replace(index)
                self._workers[index].take(task)

    def _give_turn(self) -> None:
        """To the one that waits longest, if nobody has the device, and all are warm that started early."""
        waiting = [worker for worker in self._workers if worker.ready_at is not None]
        if waiting and not any(worker.has_turn or worker.is_warming for worker in self._workers):
            worker = min(waiting, key=lambda w: w.ready_at or 0.0)
            worker.ready_at, worker.has_turn, worker.busy_since = None, True, time.monotonic()
            self.use.begin(worker.busy_since)
            worker.send(Turn())

    def _end_stuck(self) -> None:
        for worker in self._workers:
            is_working = worker.is_warming or (worker.task and worker.ready_at is None)
            if is_working and time.monotonic() - worker.busy_since > MAX_STEP_S:
                worker.is_stuck = True
                worker.process.kill()

    def _hear(self, worker: _Worker, schedule: TaskQueue) -> Finished | Died | None:
        try:
            message = worker.connection.recv()
        except (EOFError, OSError):
            return self._bury(worker)
        if isinstance(message, Broken):
            if worker.has_turn:
                self.use.end(time.monotonic())
            if worker.task:
                schedule.give_back(worker.finish())
            self._count_stillborn(message.detail)
            self._replace(self._workers.index(worker))
            return None
        if isinstance(message, Warm):
            worker.is_warming = False
            return None
        if isinstance(message, Ready):
            worker.ready_at = time.monotonic()
            worker.was_ready = True
            return None
        task = worker.finish()
        self._stillborn = 0
        self.use.end(time.monotonic())
        return self._finished(worker, task, message)

    def _finished(self, worker: _Worker, task: Task, message: Measured) -> Finished | Died:
        self._lost = 0 if message.lost is None else self._lost + 1
        if self._lost == MAX_LOST:
            raise DeviceLostError(message.record) from RuntimeError(message.lost)
        if message.lost is not None or message.memory_bytes > MAX_WORKER_BYTES:
            self._replace(self._workers.index(worker))
        if message.lost is not None:
            return Died(task, f"the device failed in its process ({message.lost})")
        return Finished(task, message.record)

    def _bury(self, worker: _Worker) -> Died | None:
        if worker.has_turn:
            self.use.end(time.monotonic())
        task = worker.task
        detail = worker.how_it_died()
        if not worker.was_ready:
            self._count_stillborn(detail)
        self._replace(self._workers.index(worker))
        return Died(task, detail) if task else None

    def _count_stillborn(self, detail: str) -> None:
        self._stillborn += 1
        if self._stillborn > MAX_STILLBORN:
            raise WorkersDiedError(f"{self._stillborn} processes in a row could not measure anything: {detail}")

    def _replace(self, index: int) -> None:
        self._workers[index].process.kill()
        self._workers[index].end()
        self._workers[index] = self._start(early=False)

    def _start(self, *, early: bool) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=work, args=(theirs, self.job), kwargs={"early": early}, daemon=True)
        try:
            process.start()
        except (EOFError, ConnectionError) as error:
            raise WorkersDiedError("the process that starts workers died; is there enough memory?") from error
        theirs.close()
        return _Worker(process, ours, is_warming=early, busy_since=time.monotonic())


@dataclass(slots=True)
class _Worker:
    """A worker process as the sweep sees it."""

    process: ForkServerProcess
    connection: Connection
    is_warming: bool
    busy_since: float  # with starting the device's libraries, compiling, or its turn
    task: Task | None = None
    ready_at: float | None = None  # it has compiled its task and waits for its turn
    has_turn: bool = False
    was_ready: bool = False
    is_stuck: bool = False
    measured: set[LinearShape] = field(default_factory=set)

    def take(self, task: Task) -> None:
        self.task, self.busy_since = task, time.monotonic()
        self.send(task)

    def send(self, message: Task | Turn | None) -> None:
        with contextlib.suppress(OSError):  # it died; reading will say so
            self.connection.send(message)

    def finish(self) -> Task:
        task, self.task, self.has_turn = self.task, None, False
        assert task
        self.measured.add(task.shape)
        return task

    def how_it_died(self) -> str:
        if self.is_stuck:
            return f"it took more than {MAX_STEP_S:.0f} s to compile or to measure"
        self.process.join(1)
        code = self.process.exitcode
        if code is not None and code < 0:
            return f"its process was killed by signal {-code}" + (" (out of memory?)" if code == -9 else "")
        return f"its process ended with exit code {code}"

    def dismiss(self) -> None:
        """End it: at once if it has a task, which is then lost, else when it has tidied up."""
        if self.task:
            self.process.kill()
        self.send(None)

    def end(self) -> None:
        """Make sure that it is gone."""
        self.process.join(0 if self.task else GOODBYE_S)
        self.process.kill()
        self.process.join()
        self.connection.close()
