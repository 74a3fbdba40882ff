"""Time one point, alone on the device.

In: a `ReadyPoint`, a timer. Out: a `PointRecord`. What goes wrong with a point is a result (out_of_memory, failed,
unstable), never an exception, unless the device itself is lost.
"""

from __future__ import annotations

import os
import random
import socket
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from statistics import fmean
from typing import Any

import msgspec
import torch

from fp8gate.calibrate.arms.failure import Failure
from fp8gate.calibrate.arms.linear import LinearArm, Operands
from fp8gate.calibrate.arms.numerics import References, acceptable
from fp8gate.calibrate.device.timer import Sample, Timer
from fp8gate.calibrate.device.timing_lock import TimingLock
from fp8gate.calibrate.device.watch import Watch
from fp8gate.calibrate.points.point_record import (
    CONTROL,
    ArmName,
    ArmRecord,
    PointRecord,
    Stages,
    is_near,
    speedup_of,
)
from fp8gate.calibrate.points.ready_point import ReadyPoint
from fp8gate.calibrate.timing.steady_run import run_steadily
from fp8gate.filter.contract.errors import UnfinishedError
from fp8gate.filter.contract.table import SweepProtocol

BURST_S, FIRST_SETTLE = 0.6, 2
"""A GPU at its power limit keeps to it on average over about a second. After a pause it draws 3 % more for 0.8 s, and
then 15 % less for 0.2 s, in which every arm is 7 % slower. So where the limit is reached, the device idles for the
protocol's pause_s before a run that would begin more than BURST_S after the last pause. Loading a point is a pause too.
The first run after a pause settles FIRST_SETTLE times as long if it has reached the limit by then. Four short runs fit
between two pauses."""


class DeviceLostError(UnfinishedError):
    """The device no longer answers in this process: every later point would fail with it. record: of this point."""

    def __init__(self, record: PointRecord, reason: object) -> None:
        super().__init__(f"the device failed at {record.shape}: {reason}; run the same command to go on")
        self.record = record
        self.reason = str(reason)


def measure_point(
    point: ReadyPoint,
    timer: Timer[Any],
    watch: Watch,
    timing_lock: TimingLock,
    device: torch.device,
    seed: int,
    measured_on: str = "",
) -> PointRecord:
    """Time a ready point on `device`, where nothing else must run meanwhile. measured_on: the device's identity.

    Raises DeviceLostError, with the record as its argument, if the device fails for good.
    """
    torch.manual_seed(seed)
    timing = _PointTiming(point, timer, watch, timing_lock, device, random.Random(f"{seed} {point.task.shape}"))
    lost: RuntimeError | None = None
    try:
        arms = timing.run()
    finally:
        try:
            timing.free()  # synchronizes: a device that failed for good says so here
        except RuntimeError as error:
            lost = error
    record = PointRecord(
        m=point.task.shape.m,
        k=point.task.shape.k,
        n=point.task.shape.n,
        measured_at=datetime.now(timezone.utc).replace(microsecond=0),
        stages=timing.stages(),
        process=os.getpid(),
        measured_on=measured_on,
        host=socket.gethostname(),
        repeat=point.task.repeat,
        sm_clock_mhz=tuple(timing.clocks_mhz),
        waited=timing.waited(),
        arms=arms,
    )
    if lost:
        raise DeviceLostError(record, lost) from lost
    return record


class _PointTiming:
    """The arms of one point, from operands to records."""

    def __init__(
        self,
        point: ReadyPoint,
        timer: Timer[Any],
        watch: Watch,
        timing_lock: TimingLock,
        device: torch.device,
        rng: random.Random,
    ) -> None:
        self.point, self.timer, self.watch, self.timing_lock = point, timer, watch, timing_lock
        self.device, self.rng = device, rng
        self.operands: Operands | None = None
        self.records = {name: _record_of(failure) for name, failure in point.failures.items()}
        self.prepared: dict[ArmName, Any] = {}
        self.samples: dict[ArmName, list[Sample]] = {}
        self.clocks_mhz: list[int] = []
        self.start = time.perf_counter()
        self.burst_start, self.is_limited = self.start, False
        self.loading_s = self.settling_s = self.timing_s = self.running_s = 0.0
        self.waited_s: float | None = None

    def run(self) -> dict[ArmName, ArmRecord]:
        names = (*self.point.linears, *self.point.failures)
        try:
            self.operands = Operands.random(self.point.task.shape, self.device)
            references = References(self.operands)
        except Exception as error:
            return {name: _record_of(Failure.of(error)) for name in names}
        for name, linear in self.point.linears.items():
            self._prepare(name, linear.over(self.operands), references)
        self.loading_s = time.perf_counter() - self.start
        if "bf16" in self.prepared and len(self.prepared) > 1:
            try:
                self._run_rounds()
            except Exception as error:  # which arm it was is not known: none of them counts
                self._none_counts(_record_of(Failure.of(error)))
        return {name: self._record(name) for name in names}

    def free(self) -> None:
        """Give the device's memory back at once, before another process needs it."""
        if self.operands:
            self.operands.free()
        self.timer.free(list(self.prepared.values()))

    def stages(self) -> Stages:
        return Stages(
            compiling_s=round(self.point.compiling_s, 3),
            loading_s=round(self.loading_s, 3),
            settling_s=round(self.settling_s, 3),
            timing_s=round(self.timing_s, 3),
        )

    def waited(self) -> float | msgspec.UnsetType:
        """Seconds of waiting for a processor, per second of running; unset if nobody counts them."""
        return msgspec.UNSET if self.waited_s is None else round(self.waited_s / self.running_s, 4)

    def _prepare(self, name: ArmName, arm: LinearArm, references: References) -> None:
        """Load, capture and check one arm; what goes wrong becomes its record."""
        try:
            prepared = self.timer.prepare(arm)
            errors = references.relative_errors(self.timer.results(prepared))
        except Exception as error:
            self.records[name] = _record_of(Failure.of(error))
            return
        if acceptable(errors):
            self.prepared[name] = prepared
            self.samples[name] = []
            self.records[name] = ArmRecord(errors=_rounded(errors))
        else:
            self.records[name] = ArmRecord(
                status="failed", errors=_rounded(errors), detail=f"wrong result: relative errors {errors}"
            )

    def _run_rounds(self) -> None:
        """Each arm alone, in random order; then, if there is a second run, those on which the decision hangs."""
        protocol = next(iter(self.point.protocols.values()))
        recipes: list[ArmName] = [name for name in self.prepared if name not in ("bf16", CONTROL)]
        self.burst_start = time.perf_counter()
        first, *second = protocol.rounds
        if not self._run_all(recipes, first, protocol):
            return
        near = [name for name in recipes if self._is_near(name)] if second else []
        if near:
            self._run_all(near, second[0], protocol)

    def _run_all(self, recipes: Sequence[ArmName], target: int, protocol: SweepProtocol) -> bool:
        """Run bf16, with the control if there is one, and these recipes' arms, until each has `target` samples.

        Returns whether the GPU kept its speed; if not, none has any.
        """
        bf16: list[ArmName] = [name for name in ("bf16", CONTROL) if name in self.prepared]  # one power draw, one run
        runs = [bf16, *([name] for name in recipes)]
        for i, run in enumerate(self.rng.sample(runs, len(runs))):
            begins = self._paused(protocol.pause_s) or i == 0
            limited_settle_s = protocol.settle_s * (FIRST_SETTLE - 1) if begins else 0.0
            lacking = target - len(self.samples[run[0]])
            with self.timing_lock.timing():
                slowdown = self._run_steadily(run, lacking, protocol.settle_s, limited_settle_s, protocol.run_s)
            if slowdown:
                self._none_counts(ArmRecord(status="unstable", detail=f"{slowdown} of the GPU while timing"))
                return False
        return True

    def _paused(self, pause_s: float) -> bool:
        """Let the device idle, if it has reached its power limit and the last pause is too long ago."""
        now = time.perf_counter()
        if not self.is_limited or now < self.burst_start + BURST_S:
            return False
        time.sleep(pause_s)
        self.burst_start, self.is_limited = time.perf_counter(), False
        self.settling_s += self.burst_start - now
        return True

    def _run_steadily(
        self, names: Sequence[ArmName], samples: int, settle_s: float, limited_settle_s: float, run_s: float
    ) -> str | None:
        """Settle, then run for run_s (less on an idle device), at least `samples` rounds, which become so many samples.

        Returns a slowdown.
        """
        start, waited_s = time.perf_counter(), self.watch.waited_s()
        run = run_steadily(
            [self.prepared[name] for name in names],
            self.timer,
            self.watch,
            self.rng,
            settle_s=settle_s,
            limited_settle_s=limited_settle_s,
            run_s=run_s,
            least=samples,
        )
        self._count_waiting(start, waited_s)
        self.clocks_mhz += run.clocks_mhz
        if run.is_limited:
            self.is_limited = True
        if run.slowdown:
            return run.slowdown
        for name, of_arm in zip(names, zip(*run.rounds, strict=True), strict=True):
            self.samples[name] += condensed(of_arm, samples)
        self.settling_s += run.settling_s
        self.timing_s += run.timing_s
        return None

    def _count_waiting(self, start: float, waited_s: float | None) -> None:
        """Add what this process's threads have waited for a processor since the run's start."""
        now_s = self.watch.waited_s()
        if waited_s is not None and now_s is not None:
            self.running_s += time.perf_counter() - start
            self.waited_s = (self.waited_s or 0.0) + max(0.0, now_s - waited_s)

    def _is_near(self, recipe: ArmName) -> bool:
        protocol = next(p for name, p in self.point.protocols.items() if name == recipe)
        return is_near(speedup_of(self._record("bf16"), self._record(recipe), protocol), protocol)

    def _none_counts(self, why: ArmRecord) -> None:
        self.samples.clear()
        self.records.update(dict.fromkeys(self.prepared, why))

    def _record(self, name: ArmName) -> ArmRecord:
        record, samples = self.records[name], self.samples.get(name, [])
        return ArmRecord(
            status=record.status,
            fwd_us=tuple(round(s.fwd_us, 3) for s in samples),
            bwd_us=tuple(round(s.bwd_us, 3) for s in samples),
            errors=record.errors,
            detail=record.detail,
        )


def condensed(rounds: Sequence[Sample], samples: int) -> list[Sample]:
    """The means of so many equal parts of the rounds, each of rounds from the whole run.

    What a GPU at its power limit does within a second belongs to every part, in its share of the time.
    """
    parts = [rounds[i::samples] for i in range(samples)]
    return [Sample(fmean(s.fwd_us for s in part), fmean(s.bwd_us for s in part)) for part in parts]


def _record_of(failure: Failure) -> ArmRecord:
    return ArmRecord(status=failure.status, detail=failure.detail)


def _rounded(errors: dict[str, float]) -> dict[str, float | None]:
    return {name: None if error != error else round(error, 5) for name, error in errors.items()}
