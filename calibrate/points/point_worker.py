"""A measuring process: it compiles a point beside all others, and times it when it is told that its turn has come.

In: tasks from the sweep over a pipe. Out: `Ready` when compiled, `Measured` with the record; only between the turn and
that does it use the device, and until `Warm` if it starts early. It ends when the pipe does, however the sweep ended.
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
from pathlib import Path
from typing import Any

import torch

from fp8gate.calibrate.device.cuda.launch_tuning import tune_by
from fp8gate.calibrate.device.timer import CpuTimer, CudaTimer, Timer
from fp8gate.calibrate.device.timing_lock import TimingLock, load_kernels_under
from fp8gate.calibrate.device.watch import Watch, make_watch
from fp8gate.calibrate.points.measure_point import DeviceLostError, ReadyPoint, make_ready, measure_point
from fp8gate.calibrate.points.point_record import PointRecord
from fp8gate.calibrate.points.task_queue import Task
from fp8gate.filter.contract.recipes import Recipe
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.contract.table import SweepProtocol

TINY = LinearShape(256, 256, 256)


@dataclass(frozen=True, slots=True)
class Job:
    """What all workers of a sweep have in common. quiet: the file by which they leave each other alone."""

    device: torch.device
    protocols: Mapping[Recipe, SweepProtocol]
    seed: int
    quiet: Path
    measured_on: str = ""


@dataclass(frozen=True, slots=True)
class Warm:
    """The device's libraries are started; nobody may measure before every early worker has said so."""


@dataclass(frozen=True, slots=True)
class Ready:
    """The task is compiled; its turn on the device may come."""


@dataclass(frozen=True, slots=True)
class Turn:
    """The device is this worker's until it has sent `Measured`."""


@dataclass(frozen=True, slots=True)
class Broken:
    """The device cannot be used from this process, which ends; the point is not at fault."""

    detail: str


@dataclass(frozen=True, slots=True)
class Measured:
    """The record; lost: how the device failed in this process, which ends. memory_bytes: the most it has held."""

    record: PointRecord
    lost: str | None
    memory_bytes: int


class BrokenError(RuntimeError):
    """The device cannot be used from this process."""


class PointBench:
    """The device as one process uses it."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.quiet = TimingLock(job.quiet)
        self._tools: tuple[Timer[Any], Watch] | None = None

    def warm_up(self) -> None:
        """Start the device's libraries by a tiny bf16 point: 0.4 s of the first turn otherwise. Raises BrokenError."""
        try:
            measure_point(ReadyPoint.of_bf16(TINY), *self._open(), self.quiet, self.job.device, self.job.seed)
        except DeviceLostError as error:
            raise BrokenError(str(error.__cause__)) from error

    def measure(self, point: ReadyPoint) -> PointRecord:
        """Raises BrokenError if the device cannot be used at all, DeviceLostError if it failed at this point."""
        return measure_point(point, *self._open(), self.quiet, self.job.device, self.job.seed, self.job.measured_on)

    def start(self) -> None:
        """Create what the process keeps on the device, when nobody times. Raises BrokenError."""
        with self.quiet.disturbing():
            self._open()

    def _open(self) -> tuple[Timer[Any], Watch]:
        if not self._tools:
            try:
                self._tools = open_device(self.job.device)
            except Exception as error:
                raise BrokenError(f"{type(error).__name__}: {error}") from error
        return self._tools


def open_device(device: torch.device, *, is_pooled: bool = False) -> tuple[Timer[Any], Watch]:
    """A timer, by which Inductor tunes from now on, and a watch. is_pooled: see `CudaTimer`."""
    if device.type != "cuda":
        return CpuTimer(), make_watch(device)
    timer = CudaTimer(device, is_pooled=is_pooled)
    tune_by(timer)
    return timer, make_watch(device)


def work(connection: Connection, job: Job, *, early: bool) -> None:
    """Serve tasks until the pipe closes or None comes. early: nobody measures yet, so the device may be used now."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the sweep's to handle
    inbox = listen(connection)
    bench = PointBench(job)
    if job.device.type == "cuda":
        load_kernels_under(bench.quiet)
    gc.freeze()
    try:
        if early:
            bench.warm_up()
            connection.send(Warm())
        else:
            bench.start()
        _serve(connection, inbox, bench)
    except BrokenError as error:
        connection.send(Broken(str(error)))


def _serve(connection: Connection, inbox: queue.SimpleQueue[Task | Turn | None], bench: PointBench) -> None:
    """Raises BrokenError."""
    job = bench.job
    while isinstance(task := inbox.get(), Task):
        point = make_ready(task, job.protocols, job.device)
        connection.send(Ready())
        if not isinstance(inbox.get(), Turn):
            return
        try:
            record, lost = bench.measure(point), None
        except DeviceLostError as error:
            record, lost = error.args[0], str(error.__cause__)
        connection.send(Measured(record, lost, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))
        if lost is not None:
            return
        del point
        with bench.quiet.disturbing():
            gc.collect()  # compiled functions are in reference cycles, and their kernels on the device


def listen(connection: Connection) -> queue.SimpleQueue[Any]:
    """Read messages on a thread, which ends the process with the pipe: who is killed cannot end its workers."""
    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def listen() -> None:
        try:
            while True:
                inbox.put(connection.recv())
        except (EOFError, OSError):
            os._exit(1)

    threading.Thread(target=listen, daemon=True).start()
    return inbox
