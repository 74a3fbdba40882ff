"""A process that measures points: it compiles one while others do the same, and times it when its turn has come.

In: tasks from the pool. Out: `Ready` when one is compiled, `Measured` with its record. Only between `Turn` and
`Measured` does it use the device, and before `Warm` if it starts early.
"""

from __future__ import annotations

import gc
import resource
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fp8gate.calibrate.device.registry import kind_of
from fp8gate.calibrate.device.timer import Timer
from fp8gate.calibrate.device.timing_lock import TimingLock
from fp8gate.calibrate.device.watch import Watch
from fp8gate.calibrate.points.measure_point import DeviceLostError, measure_point
from fp8gate.calibrate.points.point_record import PointRecord
from fp8gate.calibrate.points.ready_point import ReadyPoint, make_ready
from fp8gate.calibrate.points.task_queue import Task
from fp8gate.calibrate.processes.channel import Channel
from fp8gate.calibrate.processes.messages import Broken
from fp8gate.filter.contract.errors import UnfinishedError
from fp8gate.filter.contract.recipes import Recipe
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.contract.table import SweepProtocol

TINY = LinearShape(256, 256, 256)


@dataclass(frozen=True, slots=True)
class Job:
    """What all workers of a sweep have in common.

    timing_lock: the file by which they do not disturb each other. flush_bytes: see `DeviceKind.make_timer`.
    """

    device: torch.device
    protocols: Mapping[Recipe, SweepProtocol]
    seed: int
    timing_lock: Path
    measured_on: str = ""
    flush_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Warm:
    """The device's libraries are started. Nobody may measure before every early worker has said so."""


@dataclass(frozen=True, slots=True)
class Ready:
    """The task is compiled; its turn on the device may come."""


@dataclass(frozen=True, slots=True)
class Turn:
    """The device belongs to this worker until it has sent `Measured`."""


@dataclass(frozen=True, slots=True)
class Measured:
    """The record. lost: how the device failed in this process, which then ends. memory_bytes: the most it has held."""

    record: PointRecord
    lost: str | None
    memory_bytes: int


class BrokenError(UnfinishedError):
    """The device cannot be used from this process."""


class PointBench:
    """The device as one process uses it."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.timing_lock = TimingLock(job.timing_lock)
        self._tools: tuple[Timer[Any], Watch] | None = None

    def warm_up(self) -> None:
        """Start the device's libraries by a tiny bf16 point: the first turn would take 0.4 s longer otherwise.

        Raises BrokenError.
        """
        try:
            self._measure(ReadyPoint.of_bf16(TINY), measured_on="")
        except DeviceLostError as error:
            raise BrokenError(error.reason) from error

    def measure(self, point: ReadyPoint) -> PointRecord:
        """Raises BrokenError if the device cannot be used at all, DeviceLostError if it failed at this point."""
        return self._measure(point, self.job.measured_on)

    def start(self) -> None:
        """Create what the process keeps on the device, while nobody times. Raises BrokenError."""
        with self.timing_lock.loading():
            self._open()

    def _measure(self, point: ReadyPoint, measured_on: str) -> PointRecord:
        timer, watch = self._open()
        return measure_point(point, timer, watch, self.timing_lock, self.job.device, self.job.seed, measured_on)

    def _open(self) -> tuple[Timer[Any], Watch]:
        if not self._tools:
            kind = kind_of(self.job.device)
            try:
                timer = kind.make_timer(self.job.device, flush_bytes=self.job.flush_bytes)
                self._tools = timer, kind.make_watch(self.job.device)
            except Exception as error:
                raise BrokenError(f"{type(error).__name__}: {error}") from error
        return self._tools


def serve_points(channel: Channel, job: Job, *, early: bool) -> None:
    """Serve tasks until dismissed. early: nobody measures yet, so the device may be used now."""
    try:
        bench = PointBench(job)
    except FileNotFoundError as error:  # the command has ended while this process started, and the lock's file with it
        channel.send(Broken(str(error)))
        return
    kind_of(job.device).load_kernels_under(bench.timing_lock)
    try:
        if early:
            bench.warm_up()
            channel.send(Warm())
        else:
            bench.start()
        while _serve_one(channel, bench):
            with bench.timing_lock.loading():
                gc.collect()  # compiled functions are in reference cycles, and their kernels on the device
    except BrokenError as error:
        channel.send(Broken(str(error)))


def _serve_one(channel: Channel, bench: PointBench) -> bool:
    """Whether the process can go on. Raises BrokenError."""
    task: Task = channel.receive()
    point = make_ready(task, bench.job.protocols, bench.job.device)
    channel.send(Ready())
    turn = channel.receive()
    assert isinstance(turn, Turn)
    try:
        record, lost = bench.measure(point), None
    except DeviceLostError as error:
        record, lost = error.record, error.reason
    channel.send(Measured(record, lost, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024))
    return lost is None
