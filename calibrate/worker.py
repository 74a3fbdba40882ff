"""A measuring process: it compiles a point beside all others, and times it when it is told that its turn has come.

In: tasks from the sweep over a pipe. Out: `Ready` when compiled, `Measured` with the record; only between the turn and
that does it use the device. It ends when the pipe does, however the sweep ended.
"""

from __future__ import annotations

import gc
import os
import queue
import resource
import signal
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from fp8gate.calibrate.gpu_watch import Watch, make_watch
from fp8gate.calibrate.measure import DeviceLostError, ReadyPoint, make_ready, measure_point
from fp8gate.calibrate.records import PointRecord
from fp8gate.calibrate.schedule import Task
from fp8gate.calibrate.timing import CpuTimer, CudaTimer, Timer
from fp8gate.filter.table import Protocol, Recipe


@dataclass(frozen=True, slots=True)
class Job:
    """What all workers of a sweep have in common."""

    device: torch.device
    protocols: Mapping[Recipe, Protocol]
    seed: int


@dataclass(frozen=True, slots=True)
class Ready:
    """The task is compiled; its turn on the device may come."""


@dataclass(frozen=True, slots=True)
class Turn:
    """The device is this worker's until it has sent `Measured`."""


@dataclass(frozen=True, slots=True)
class Measured:
    """The record; lost: how the device failed in this process, which ends. memory_bytes: the most it has held."""

    record: PointRecord
    lost: str
    memory_bytes: int


class Bench:
    """The device as one process uses it; nothing is done there before the first point is measured."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._tools: tuple[Timer[Any], Watch] | None = None

    def measure(self, point: ReadyPoint) -> PointRecord:
        if not self._tools:
            timer: Timer[Any] = CudaTimer(self.job.device) if self.job.device.type == "cuda" else CpuTimer()
            self._tools = timer, make_watch(self.job.device)
        return measure_point(point, *self._tools, self.job.device, self.job.seed)


def work(connection: Connection, job: Job) -> None:
    """Serve tasks until the pipe closes or None comes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the sweep's to handle
    inbox = _listen(connection)
    bench = Bench(job)
    gc.freeze()
    while isinstance(task := inbox.get(), Task):
        point = make_ready(task, job.protocols, job.device)
        connection.send(Ready())
        inbox.get()
        try:
            record, lost = bench.measure(point), ""
        except DeviceLostError as error:
            record, lost = error.args[0], str(error.__cause__)
        connection.send(Measured(record, lost, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))
        if lost:
            return
        del point
        gc.collect()  # compiled functions are in reference cycles


def _listen(connection: Connection) -> queue.SimpleQueue[Task | Turn | None]:
    """Read messages on a thread, which ends the process with the pipe: a killed sweep cannot end its workers."""
    inbox: queue.SimpleQueue[Task | Turn | None] = queue.SimpleQueue()

    def listen() -> None:
        try:
            while True:
                inbox.put(connection.recv())
        except (EOFError, OSError):
            os._exit(1)

    threading.Thread(target=listen, daemon=True).start()
    return inbox
