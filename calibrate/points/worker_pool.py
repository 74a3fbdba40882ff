"""Many processes compile, one at a time measures: all points of a queue, whatever happens to the processes.

In: a job, a queue. Out: an outcome of each task, as they come. The device is handed from worker to worker: one that
has compiled its point waits for its turn, and no other one touches the device meanwhile.
"""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from fp8gate.calibrate.device.capacity import MAX_WORKER_BYTES
from fp8gate.calibrate.points.measure_point import DeviceLostError
from fp8gate.calibrate.points.point_record import PointRecord
from fp8gate.calibrate.points.point_worker import (
    BrokenError,
    Job,
    Measured,
    PointBench,
    Ready,
    Turn,
    Warm,
    serve_points,
)
from fp8gate.calibrate.points.ready_point import make_ready
from fp8gate.calibrate.points.task_queue import Task, TaskQueue
from fp8gate.calibrate.processes.child import Child, ChildDiedError, NoChildError, end_all, wait_for
from fp8gate.calibrate.processes.limits import Limits
from fp8gate.calibrate.processes.messages import Broken
from fp8gate.filter.contract.shapes import LinearShape

MAX_LOST = 3  # workers in a row in which the device failed: it is gone for all
MAX_USELESS = 3  # workers in a row that end before they have compiled anything: the points are not at fault


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
        """There is no process to end."""

    @property
    def pids(self) -> list[int]:
        return [os.getpid()]

    def run(self, queue: TaskQueue, until: float = math.inf) -> Iterator[Finished | Died]:
        while time.monotonic() < until and (task := queue.next()):
            point = make_ready(task, self.job.protocols, self.job.device)
            self.use.begin(time.monotonic())
            try:
                record = self._bench.measure(point)
            except BrokenError as error:
                raise NoChildError(str(error)) from error
            self.use.end(time.monotonic())
            yield Finished(task, record)


class WorkerPool:
    """`count` measuring processes; a context that ends them.

    serve: what they run. limits: of each of their steps. max_worker_bytes: a worker that has held more makes room for
    another.
    """

    def __init__(
        self,
        job: Job,
        count: int,
        *,
        serve: Callable[..., None] = serve_points,
        limits: Limits | None = None,
        max_worker_bytes: int = MAX_WORKER_BYTES,
    ) -> None:
        self.job = job
        self.use = DeviceUse()
        self._count, self._serve, self._limits = count, serve, limits or Limits()
        self._max_worker_bytes = max_worker_bytes
        self._workers: list[_Worker] = []
        self._useless = 0
        self._lost = 0

    def __enter__(self) -> WorkerPool:
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
            if worker.task:  # it may wait for a turn that will not come
                worker.child.kill()
        end_all([worker.child for worker in self._workers])

    @property
    def pids(self) -> list[int]:
        return [worker.child.pid for worker in self._workers]

    def run(self, queue: TaskQueue, until: float = math.inf) -> Iterator[Finished | Died]:
        """The outcome of every task; what is given back to the queue meanwhile is dealt out again.

        until: of `time.monotonic`; whatever is under way by then has no outcome. Raises DeviceLostError if the device
        fails in several workers in a row, NoChildError if none can start.
        """
        while time.monotonic() < until:
            self._deal(queue)
            busy = [worker for worker in self._workers if worker.task]
            if not busy and queue:
                self._replace(0)  # every worker has measured what is left; a fresh process has not
                continue
            if not busy:
                return
            self._give_turn()
            speakers = {worker.child: worker for worker in self._workers if worker.task or worker.is_warming}
            for child in wait_for(list(speakers), until):
                outcome = self._hear(speakers[child], queue)
                self._give_turn()  # before the outcome is dealt with: the device need not wait for that
                if outcome:
                    yield outcome

    def _deal(self, queue: TaskQueue) -> None:
        for index, worker in enumerate(self._workers):
            if worker.task is None and (task := queue.next(worker.measured)):
                if not worker.child.is_alive:  # it died while it was idle: the task is not at fault
                    self._replace(index)
                self._workers[index].take(task)

    def _give_turn(self) -> None:
        """To the worker that waits longest, if nobody has the device and all early workers are warm."""
        waiting = [worker for worker in self._workers if worker.ready_at is not None]
        if waiting and not any(worker.has_turn or worker.is_warming for worker in self._workers):
            worker = min(waiting, key=lambda w: w.ready_at or 0.0)
            worker.ready_at, worker.has_turn = None, True
            self.use.begin(time.monotonic())
            worker.child.send(Turn())

    def _hear(self, worker: _Worker, queue: TaskQueue) -> Finished | Died | None:
        try:
            message: Any = worker.child.receive()
        except ChildDiedError as error:
            return self._died(worker, str(error))
        if isinstance(message, Measured):
            return self._finished(worker, message)
        if isinstance(message, Broken):
            self._give_back(worker, message.detail, queue)
        elif isinstance(message, Warm):
            worker.is_warm()
        else:
            assert isinstance(message, Ready)
            worker.ready_at, worker.was_ready = time.monotonic(), True
        return None

    def _finished(self, worker: _Worker, message: Measured) -> Finished | Died:
        task = worker.finish()
        self._useless = 0
        self.use.end(time.monotonic())
        self._lost = 0 if message.lost is None else self._lost + 1
        if self._lost == MAX_LOST:
            raise DeviceLostError(message.record, message.lost)
        if message.lost is not None or message.memory_bytes > self._max_worker_bytes:
            self._replace(self._workers.index(worker))
        if message.lost is not None:
            return Died(task, f"the device failed in its process ({message.lost})")
        return Finished(task, message.record)

    def _give_back(self, worker: _Worker, detail: str, queue: TaskQueue) -> None:
        """Its process cannot use the device: another one takes its task."""
        if worker.has_turn:
            self.use.end(time.monotonic())
        if worker.task:
            queue.give_back(worker.finish())
        self._count_useless(detail)
        self._replace(self._workers.index(worker))

    def _died(self, worker: _Worker, detail: str) -> Died | None:
        if worker.has_turn:
            self.use.end(time.monotonic())
        if not worker.was_ready:
            self._count_useless(detail)
        self._replace(self._workers.index(worker))
        return Died(worker.task, detail) if worker.task else None

    def _count_useless(self, detail: str) -> None:
        self._useless += 1
        if self._useless > MAX_USELESS:
            raise NoChildError(f"{self._useless} processes in a row could not measure anything: {detail}")

    def _replace(self, index: int) -> None:
        self._workers[index].child.kill()
        self._workers[index].child.end()
        self._workers[index] = self._start(early=False)

    def _start(self, *, early: bool) -> _Worker:
        serve = functools.partial(self._serve, early=early)
        return _Worker(Child(serve, self.job, self._limits, starts_busy=early), is_warming=early)


@dataclass(slots=True)
class _Worker:
    """A worker process as the pool sees it. ready_at: it has compiled its task then, and waits for its turn."""

    child: Child
    is_warming: bool
    task: Task | None = None
    ready_at: float | None = None
    has_turn: bool = False
    was_ready: bool = False
    measured: set[LinearShape] = field(default_factory=set)

    def take(self, task: Task) -> None:
        self.task = task
        self.child.send(task)

    def is_warm(self) -> None:
        self.is_warming = False
        if self.task:  # it was sent meanwhile
            self.child.expect_more()

    def finish(self) -> Task:
        task, self.task, self.has_turn = self.task, None, False
        assert task
        self.measured.add(task.shape)
        return task
