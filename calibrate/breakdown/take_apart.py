"""Where the time goes: one linear, forward and backward, bf16 against float8, kernel by kernel.

In: a shape, a recipe, a device. Out: a `Breakdown`: for each arm its paired timing, and the kernels that the profiler
records in replays of the very graphs that were timed. Each arm runs alone, first timed, then profiled, after as long
a run that counts for nothing, so that both see the clock it settles at.
Try it: fp8gate breakdown 8192 8192 1024 --recipe rowwise
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import torch

from fp8gate.calibrate.arms.linear import Operands
from fp8gate.calibrate.arms.numerics import References, acceptable
from fp8gate.calibrate.breakdown.ceilings import Ceilings, measure_ceilings
from fp8gate.calibrate.breakdown.profiler import Kernel, Kind, ProfileError, flush_names, passes, record, summed
from fp8gate.calibrate.breakdown.required_work import Flop, Work, work_of
from fp8gate.calibrate.device.timer import Sample, Timer
from fp8gate.calibrate.device.watch import DeviceLock, Watch
from fp8gate.calibrate.points.measure_point import make_ready
from fp8gate.calibrate.points.point_record import ArmName
from fp8gate.calibrate.points.point_worker import open_device
from fp8gate.calibrate.points.task_queue import Task
from fp8gate.calibrate.sweep.run_sweep import make_setup
from fp8gate.calibrate.timing.steady_run import BATCH_S
from fp8gate.filter.contract.recipes import Recipe
from fp8gate.filter.contract.shapes import LinearShape

PROFILE_SETTLE_S, PROFILE_RUN_S = 1.2, 1.0
"""After a pause, a GPU at its power limit draws more than that for 0.8 s and less for 0.2 s; windows of a second agree
within 0.5 % after that (LOG.md, 2026-11-24)."""
MAX_ROUNDS = (
    3000  # that count; shorter ones leave the device idle between, its clock steady, and the profiler much to read
)
AGREEMENT = 0.05  # how far the kernels' sum may be from the paired timing for the parts to explain the whole


class BreakdownError(RuntimeError):
    """This linear cannot be taken apart here and now."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Direction:
    """One direction of one arm. timed_us: by the paired timing."""

    flop: Flop
    timed_us: float
    kernels: tuple[Kernel, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ArmBreakdown:
    """One arm. Clocks are medians, None where the device does not tell."""

    name: ArmName
    forward: Direction
    backward: Direction
    least_cast_bytes: int
    rounds: int
    profiled_rounds: int
    timed_mhz: int | None
    profiled_mhz: int | None

    @property
    def directions(self) -> dict[str, Direction]:
        return {"forward": self.forward, "backward": self.backward}

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        return (*self.forward.kernels, *self.backward.kernels)

    @property
    def flop(self) -> Flop:
        both = self.forward.flop, self.backward.flop
        return Flop(sum(flop.bf16 for flop in both), sum(flop.float8 for flop in both))

    def kind_us(self, kind: Kind) -> float:
        return sum(kernel.time_us for kernel in self.kernels if kernel.kind == kind)

    @property
    def kernels_us(self) -> float:
        return sum(kernel.time_us for kernel in self.kernels)

    @property
    def timed_us(self) -> float:
        return self.forward.timed_us + self.backward.timed_us

    @property
    def gaps_us(self) -> float:
        """What the paired timing holds beside the kernels: launch gaps; below 0, kernels overlap or ran slower."""
        return self.timed_us - self.kernels_us

    @property
    def apart(self) -> float:
        return self.kernels_us / self.timed_us - 1

    @property
    def adds_up(self) -> bool:
        return abs(self.apart) <= AGREEMENT


@dataclass(frozen=True, kw_only=True, slots=True)
class Breakdown:
    """Both arms at one shape."""

    shape: LinearShape
    recipe: Recipe
    device: str
    ceilings: Ceilings
    bf16: ArmBreakdown
    float8: ArmBreakdown

    @property
    def arms(self) -> tuple[ArmBreakdown, ArmBreakdown]:
        return self.bf16, self.float8

    @property
    def has_findings(self) -> bool:
        """Whether the parts do not explain the whole."""
        return not all(arm.adds_up for arm in self.arms)


def break_down(shape: LinearShape, recipe: Recipe, device: torch.device) -> Breakdown:
    """Compile, time and profile both arms, alone on the device.

    Raises ValueError for a shape that float8 cannot compute, DeviceBusyError if a sweep has the device, BreakdownError
    if an arm cannot run or the GPU slows down, ProfileError if the profiler has not recorded what ran.
    """
    if problem := shape.indivisible():
        raise ValueError(f"{shape}: expected multiples of 16, which float8 products take; got {problem}")
    setup = make_setup(device)
    with DeviceLock(device):
        timer, watch = open_device(device)
        flush = flush_names(timer, device)  # starts the profiler, which must know of graphs from their capture on
        ceilings = measure_ceilings(timer, device)
        point = make_ready(Task(shape), {recipe: setup.protocols[recipe]}, device)
        if point.failures:
            raise BreakdownError(point.failures[recipe].detail)
        torch.manual_seed(0)
        operands = Operands.random(shape, device)
        references = References(operands)
        prepared: dict[ArmName, Any] = {}
        try:
            for name, linear in point.linears.items():
                prepared[name] = timer.prepare(linear.over(operands))
                if not acceptable(errors := references.relative_errors(timer.results(prepared[name]))):
                    raise BreakdownError(f"{name}: wrong result: relative errors {errors}")
            bench = _Bench(timer, watch, device, flush)
            bf16 = _take_apart("bf16", prepared["bf16"], work_of(None, shape), bench)
            float8 = _take_apart(recipe, prepared[recipe], work_of(recipe, shape), bench)
        finally:
            operands.free()
            timer.free(list(prepared.values()))
    return Breakdown(
        shape=shape,
        recipe=recipe,
        device=setup.device.name,
        ceilings=ceilings,
        bf16=bf16,
        float8=float8,
    )


@dataclass(frozen=True, slots=True)
class _Run:
    samples: list[Sample]
    clock_mhz: int | None


@dataclass(frozen=True, slots=True)
class _Bench:
    """The device and what it is measured with. flush: the names of what a flush of its cache runs."""

    timer: Timer[Any]
    watch: Watch
    device: torch.device
    flush: Sequence[str]

    def settle(self, prepared: Any) -> None:
        self._run(prepared, PROFILE_SETTLE_S, math.inf)

    def run(self, prepared: Any) -> _Run:
        return self._run(prepared, PROFILE_RUN_S, MAX_ROUNDS)

    def _run(self, prepared: Any, seconds: float, rounds: float) -> _Run:
        """Rounds of this arm alone, in batches, for so long or so many. Raises BreakdownError if the GPU slows down."""
        end, batch = time.perf_counter() + seconds, 1
        samples: list[Sample] = []
        clocks_mhz: list[int] = []
        while not samples or (time.perf_counter() < end and len(samples) < rounds):
            before = time.perf_counter()
            samples += [sample for (sample,) in self.timer.rounds([prepared], [[0]] * batch)]
            batch = max(1, round(BATCH_S * batch / (time.perf_counter() - before)))
            if (clock_mhz := self.watch.sm_clock_mhz()) is not None:
                clocks_mhz.append(clock_mhz)
            if slowdown := self.watch.slowdown():
                raise BreakdownError(f"{slowdown} of the GPU: try again when it has cooled down")
        return _Run(samples, round(median(clocks_mhz)) if clocks_mhz else None)


def _take_apart(name: ArmName, prepared: Any, work: Work, bench: _Bench) -> ArmBreakdown:
    bench.settle(prepared)
    timed = bench.run(prepared)
    profiled: list[_Run] = []
    events = record(bench.device, lambda: profiled.append(bench.run(prepared)), before=lambda: bench.settle(prepared))
    (run,) = profiled
    halves = passes(events, bench.flush)[-2 * len(run.samples) :]
    if len(halves) != 2 * len(run.samples):
        raise ProfileError(f"{name}: {2 * len(run.samples)} passes ran, the profiler recorded {len(halves)}")
    return ArmBreakdown(
        name=name,
        forward=Direction(
            flop=work.forward,
            timed_us=fmean(sample.fwd_us for sample in timed.samples),
            kernels=summed(halves[0::2]),
        ),
        backward=Direction(
            flop=work.backward,
            timed_us=fmean(sample.bwd_us for sample in timed.samples),
            kernels=summed(halves[1::2]),
        ),
        least_cast_bytes=work.least_cast_bytes,
        rounds=len(timed.samples),
        profiled_rounds=len(run.samples),
        timed_mhz=timed.clock_mhz,
        profiled_mhz=run.clock_mhz,
    )
