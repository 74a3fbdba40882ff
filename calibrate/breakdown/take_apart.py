"""Where the time goes: one linear, forward and backward, bf16 against float8, kernel by kernel.

In: a shape, a recipe, a device. Out: a `Breakdown`: for each arm its timing, and the kernels that the profiler records
in replays of the graphs that were timed. Each arm runs alone: it is timed first and then profiled. Before both, it runs
for the same time without counting, so that the timer and the profiler see the clock at which it settles.
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
from fp8gate.calibrate.breakdown.breakdown_record import ArmBreakdown, Breakdown, Direction
from fp8gate.calibrate.breakdown.profiler import Event, ProfileError, flush_names, passes, record, summed
from fp8gate.calibrate.breakdown.roofline import Work, measure_ceilings, work_of
from fp8gate.calibrate.device.lock import DeviceLock
from fp8gate.calibrate.device.registry import kind_of
from fp8gate.calibrate.device.timer import Sample, Timer
from fp8gate.calibrate.device.watch import Watch
from fp8gate.calibrate.points.point_record import ArmName
from fp8gate.calibrate.points.ready_point import ReadyPoint, make_ready
from fp8gate.calibrate.points.setup import make_setup
from fp8gate.calibrate.points.task_queue import Task
from fp8gate.calibrate.timing.steady_run import BATCH_S
from fp8gate.filter.contract.errors import InputError, UnfinishedError
from fp8gate.filter.contract.recipes import Recipe, Variant, require_casts
from fp8gate.filter.contract.shapes import LinearShape

PROFILE_SETTLE_S, PROFILE_RUN_S = 1.2, 1.0
"""After a pause, a GPU at its power limit draws more than the limit for 0.8 s and less for 0.2 s. Windows of a second
after that agree within 0.5 % (LOG.md, 2026-11-24)."""
MAX_ROUNDS = 3000
"""The most rounds that count. Only short rounds reach this number. The device idles between them, so its clock is
steady, and more rounds would only give the profiler more to read."""


class BreakdownError(UnfinishedError):
    """This linear cannot be taken apart here and now."""


def break_down(shape: LinearShape, variant: Variant, device: torch.device) -> Breakdown:
    """Compile, time and profile both arms, each alone on the device.

    Raises InputError for a shape that float8 cannot compute or casts that the recipe cannot have on this device,
    DeviceBusyError if a sweep has the device, BreakdownError if an arm cannot run or the GPU slows down, ProfileError
    if the profiler has not recorded what ran.
    """
    if problem := shape.indivisible():
        raise InputError(f"{shape}: expected multiples of 16, which float8 products take; got {problem}")
    recipe, casts = variant
    require_casts(recipe, casts)
    setup = make_setup(device, casts)
    with DeviceLock(device):
        kind = kind_of(device)
        timer, watch = kind.make_timer(device), kind.make_watch(device)
        flush = flush_names(timer, device)  # the profiler starts here: it must know of graphs before they are captured
        ceilings = measure_ceilings(timer, device)
        point = make_ready(Task(shape), {recipe: setup.protocols[recipe]}, device)
        if point.failures:
            raise BreakdownError(point.failures[recipe].detail)
        bf16, float8 = _break_down_arms(point, recipe, _ProfilingBench(timer, watch, device, flush))
    return Breakdown(
        shape=shape,
        variant=variant,
        device=setup.device.name,
        ceilings=ceilings,
        bf16=bf16,
        float8=float8,
    )


@dataclass(frozen=True, slots=True)
class _TimedRounds:
    """clock_mhz: the median, None where the device does not report a clock."""

    samples: list[Sample]
    clock_mhz: int | None


@dataclass(frozen=True, slots=True)
class _ProfilingBench:
    """The device with its timer and its watch. flush: the names of the events of one flush of its cache."""

    timer: Timer[Any]
    watch: Watch
    device: torch.device
    flush: Sequence[str]

    def settle(self, prepared: Any) -> None:
        self._run(prepared, PROFILE_SETTLE_S, math.inf)

    def run(self, prepared: Any) -> _TimedRounds:
        return self._run(prepared, PROFILE_RUN_S, MAX_ROUNDS)

    def _run(self, prepared: Any, seconds: float, rounds: float) -> _TimedRounds:
        """Run this arm alone, in batches of rounds, until the seconds are over or the rounds are done.

        Raises BreakdownError if the GPU slows down.
        """
        end, batch = time.perf_counter() + seconds, 1
        samples: list[Sample] = []
        clocks_mhz: list[int] = []
        while not samples or (time.perf_counter() < end and len(samples) < rounds):
            before = time.perf_counter()
            found = self.timer.rounds([prepared], [[0]] * batch)
            samples += [sample for (sample,) in found]
            batch = max(1, round(BATCH_S * len(found) / (time.perf_counter() - before)))
            if (clock_mhz := self.watch.sm_clock_mhz()) is not None:
                clocks_mhz.append(clock_mhz)
            if slowdown := self.watch.slowdown():
                raise BreakdownError(f"{slowdown} of the GPU: try again when it has cooled down")
        return _TimedRounds(samples, round(median(clocks_mhz)) if clocks_mhz else None)


def _break_down_arms(point: ReadyPoint, recipe: Recipe, bench: _ProfilingBench) -> tuple[ArmBreakdown, ArmBreakdown]:
    """Check the results of both arms, bf16 and the recipe, then measure one after the other."""
    shape, timer = point.task.shape, bench.timer
    torch.manual_seed(0)
    operands = Operands.random(shape, bench.device)
    references = References(operands)
    prepared: dict[ArmName, Any] = {}
    try:
        for name, linear in point.linears.items():
            prepared[name] = timer.prepare(linear.over(operands))
            if not acceptable(errors := references.relative_errors(timer.results(prepared[name]))):
                raise BreakdownError(f"{name}: wrong result: relative errors {errors}")
        bf16 = _break_down_arm("bf16", prepared["bf16"], work_of(None, shape), bench)
        return bf16, _break_down_arm(recipe, prepared[recipe], work_of(recipe, shape), bench)
    finally:
        operands.free()
        timer.free(list(prepared.values()))


def _break_down_arm(name: ArmName, prepared: Any, work: Work, bench: _ProfilingBench) -> ArmBreakdown:
    bench.settle(prepared)
    timed = bench.run(prepared)
    profiled, halves = _profile(name, prepared, bench)
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
        profiled_rounds=len(profiled.samples),
        timed_mhz=timed.clock_mhz,
        profiled_mhz=profiled.clock_mhz,
    )


def _profile(name: ArmName, prepared: Any, bench: _ProfilingBench) -> tuple[_TimedRounds, list[list[Event]]]:
    """Run the arm under the profiler. Returns the rounds, and two passes for each: its forward, then its backward."""
    profiled: list[_TimedRounds] = []
    events = record(bench.device, lambda: profiled.append(bench.run(prepared)), before=lambda: bench.settle(prepared))
    (rounds,) = profiled
    expected = 2 * len(rounds.samples)
    halves = passes(events, bench.flush)[-expected:]
    if len(halves) != expected:
        raise ProfileError(f"{name}: {expected} passes ran, the profiler recorded {len(halves)}")
    return rounds, halves
