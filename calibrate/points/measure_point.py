"""Measure one point in two steps: make it ready (compile, touching no device), then time it, alone on the device.

In: a task, the recipes' protocols, a timer. Out: a `PointRecord`. Failures of a point are results (out_of_memory,
failed, unstable), never exceptions, unless the device itself is lost.
"""

from __future__ import annotations

import os
import random
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from statistics import fmean
from typing import Any, Literal

import torch

from fp8gate.calibrate.arms.compilation import ReadyLinear, compiled_linear, eager_linear
from fp8gate.calibrate.arms.linear import LinearArm, Operands
from fp8gate.calibrate.arms.numerics import References, acceptable
from fp8gate.calibrate.device.timer import Sample, Timer
from fp8gate.calibrate.device.timing_lock import TimingLock
from fp8gate.calibrate.device.watch import Watch
from fp8gate.calibrate.points.point_record import CONTROL, ArmName, ArmRecord, PointRecord, Stages, is_near, speedup_of
from fp8gate.calibrate.points.task_queue import Task
from fp8gate.calibrate.timing.steady_run import run_steadily
from fp8gate.filter.contract.recipes import Recipe
from fp8gate.filter.contract.shapes import LinearShape
from fp8gate.filter.contract.table import SweepProtocol

POINT_SETTLE_S, POINT_RUN_S = 0.1, 0.05
"""An arm runs alone on the device, for SETTLE_S uncounted and then for RUN_S or longer. Under the power limit the clock
follows what runs (H200, 700 W): 1485 MHz for a bf16 product, 1890 MHz for a rowwise one full of casts. Interleaved they
share a clock that neither has in training, which made rowwise up to 18 % slower against bf16 than it is. The GPU sets
its clock every 0.1 s: an arm that has not settled so long runs at the clock of the one before (LOG.md, 2026-11-24)."""
POINT_PAUSE_S, BURST_S, FIRST_SETTLE = 0.15, 0.6, 2
"""A GPU at its power limit keeps to it on average over about a second: after a pause it draws 3 % more for 0.8 s, and
then 15 % less for 0.2 s, in which every arm is 7 % slower. So where the limit is reached, the device idles for PAUSE_S
before a run that would begin more than BURST_S after the last pause; loading a point is one too. The first run after a
pause settles FIRST_SETTLE times as long where it has reached the limit by then. Four short runs fit between two
pauses."""
DETAIL_LENGTH = 2000  # Inductor's errors carry whole graphs; their first lines say what is wrong


class DeviceLostError(RuntimeError):
    """The device no longer answers in this process: every later point would fail with it."""


@dataclass(slots=True)
class ReadyPoint:
    """A point whose linears are compiled, or whose compilation failed."""

    task: Task
    protocols: Mapping[Recipe, SweepProtocol]
    linears: dict[ArmName, ReadyLinear] = field(default_factory=dict)
    failures: dict[ArmName, ArmRecord] = field(default_factory=dict)
    compiling_s: float = 0.0

    @classmethod
    def of_bf16(cls, shape: LinearShape) -> ReadyPoint:
        """bf16 alone, which needs no compilation."""
        return cls(Task(shape), {}, {"bf16": eager_linear(None, shape)})


def make_ready(task: Task, protocols: Mapping[Recipe, SweepProtocol], device: torch.device) -> ReadyPoint:
    """Compile what the task needs; `protocols` are those of its recipes. Runs nothing on the device."""
    start = time.perf_counter()
    torch._dynamo.reset()
    point = ReadyPoint(task, protocols, {"bf16": eager_linear(None, task.shape)})
    if task.control:
        point.linears[CONTROL] = eager_linear(None, task.shape)
    for recipe, protocol in protocols.items():
        try:
            if protocol.compile:
                ready = compiled_linear(recipe, task.shape, protocol.inductor, device.type)
            else:
                ready = eager_linear(recipe, task.shape)
        except Exception as error:
            point.failures[recipe] = _failure(error)
        else:
            point.linears[recipe] = ready
    point.compiling_s = time.perf_counter() - start
    return point


def measure_point(
    point: ReadyPoint,
    timer: Timer[Any],
    watch: Watch,
    quiet: TimingLock,
    device: torch.device,
    seed: int,
    measured_on: str = "",
) -> PointRecord:
    """Time a ready point on `device`, where nothing else must run meanwhile. measured_on: the device's identity.

    Raises DeviceLostError, with the record as its argument, if the device fails for good.
    """
    torch.manual_seed(seed)
    session = _Session(point, timer, watch, quiet, device, random.Random(f"{seed} {point.task.shape}"))
    lost: RuntimeError | None = None
    try:
        arms = session.run()
    finally:
        try:
            session.free()  # synchronizes: a device that failed for good says so here
        except RuntimeError as error:
            lost = error
    record = PointRecord(
        m=point.task.shape.m,
        k=point.task.shape.k,
        n=point.task.shape.n,
        measured_at=datetime.now(timezone.utc).replace(microsecond=0),
        stages=session.stages(),
        process=os.getpid(),
        measured_on=measured_on,
        host=socket.gethostname(),
        repeat=point.task.repeat,
        sm_clock_mhz=tuple(session.clocks_mhz),
        arms=arms,
    )
    if lost:
        raise DeviceLostError(record) from lost
    return record


class _Session:
    """The arms of one point, from operands to records."""

    def __init__(
        self,
        point: ReadyPoint,
        timer: Timer[Any],
        watch: Watch,
        quiet: TimingLock,
        device: torch.device,
        rng: random.Random,
    ) -> None:
        self.point, self.timer, self.watch, self.quiet = point, timer, watch, quiet
        self.device, self.rng = device, rng
        self.operands: Operands | None = None
        self.records: dict[ArmName, ArmRecord] = dict(point.failures)
        self.prepared: dict[ArmName, Any] = {}
        self.samples: dict[ArmName, list[Sample]] = {}
        self.clocks_mhz: list[int] = []
        self.start = time.perf_counter()
        self.burst_start, self.is_limited, self.has_been_limited = self.start, False, False
        self.loading_s = self.settling_s = self.timing_s = 0.0

    def run(self) -> dict[ArmName, ArmRecord]:
        names = (*self.point.linears, *self.point.failures)
        try:
            self.operands = Operands.random(self.point.task.shape, self.device)
            references = References(self.operands)
        except Exception as error:
            return {name: _failure(error) for name in names}
        for name, linear in self.point.linears.items():
            self._prepare(name, linear.over(self.operands), references)
        self.loading_s = time.perf_counter() - self.start
        if "bf16" in self.prepared and len(self.prepared) > 1:
            try:
                self._run_rounds()
            except Exception as error:  # which arm it was is not known: none of them counts
                self._none_counts(_failure(error))
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

    def _prepare(self, name: ArmName, arm: LinearArm, references: References) -> None:
        """Load, capture and check one arm; what goes wrong becomes its record."""
        try:
            prepared = self.timer.prepare(arm)
            errors = references.relative_errors(self.timer.results(prepared))
        except Exception as error:
            self.records[name] = _failure(error)
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
        """Each arm alone, in random order; then those again, and longer, on which the decision hangs."""
        protocol = next(iter(self.point.protocols.values()))
        recipes: list[ArmName] = [name for name in self.prepared if name not in ("bf16", CONTROL)]
        self.burst_start = time.perf_counter()
        first, *second = protocol.rounds
        if not self._run_all(recipes, first, protocol, protocol.run_s):
            return
        near = [name for name in recipes if self._is_near(name)]
        if near and second:
            run_s = protocol.near_s if self.has_been_limited else protocol.run_s
            self._run_all(near, second[0], protocol, run_s)

    def _run_all(self, recipes: Sequence[ArmName], target: int, protocol: SweepProtocol, run_s: float) -> bool:
        """Run bf16, with the control if there is one, and these recipes' arms, until each has `target` samples.

        Returns whether the GPU kept its speed; if not, none has any.
        """
        bf16: list[ArmName] = [name for name in ("bf16", CONTROL) if name in self.prepared]  # one power draw, one run
        runs = [bf16, *([name] for name in recipes)]
        for i, run in enumerate(self.rng.sample(runs, len(runs))):
            begins = self._paused(protocol.pause_s) or i == 0
            limited_settle_s = protocol.settle_s * (FIRST_SETTLE - 1) if begins else 0.0
            lacking = target - len(self.samples[run[0]])
            with self.quiet.kept():
                slowdown = self._run_alone(run, lacking, protocol.settle_s, limited_settle_s, run_s)
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

    def _run_alone(
        self, names: Sequence[ArmName], samples: int, settle_s: float, limited_settle_s: float, run_s: float
    ) -> str | None:
        """Settle, then run for run_s (less on an idle device), at least `samples` rounds, which become so many samples.

        Returns a slowdown.
        """
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
        self.clocks_mhz += run.clocks_mhz
        if run.is_limited:
            self.is_limited = self.has_been_limited = True
        if run.slowdown:
            return run.slowdown
        for name, of_arm in zip(names, zip(*run.rounds, strict=True), strict=True):
            self.samples[name] += condensed(of_arm, samples)
        self.settling_s += run.settling_s
        self.timing_s += run.timing_s
        return None

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


def _failure(error: Exception) -> ArmRecord:
    status, detail = failure(error)
    return ArmRecord(status=status, detail=detail)


def failure(error: Exception) -> tuple[Literal["out_of_memory", "failed"], str]:
    """What it means for what was to be measured, and what it says, at a length that a journal bears."""
    detail = f"{type(error).__name__}: {error}"[:DETAIL_LENGTH]
    return ("out_of_memory" if _is_out_of_memory(error) else "failed"), detail


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if any(sign in str(error) for sign in ("out of memory", "ALLOC_FAILED", "can't allocate memory")):
        return True
    return error.__cause__ is not None and _is_out_of_memory(error.__cause__)


def _rounded(errors: dict[str, float]) -> dict[str, float | None]:
    return {name: None if error != error else round(error, 5) for name, error in errors.items()}
