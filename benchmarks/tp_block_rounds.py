"""Rounds of visits to sets of float8 linears, on all ranks of a tensor parallel group alike.

In: a set-up, layers. Out: visits, each as soon as it is done, in the journal of rank 0.
"""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import TypeVar

import torch
import torch.distributed as dist
from tp_block_layers import Results, TpLayers, TpStack
from tp_block_output import RankVisit, TpJournal, TpSetup, TpVisit, complete_rounds

from fp8gate.calibrate.device.watch import Watch

MAX_TRIES = 2  # times the rounds asked for: a round in which a GPU was slowed down is measured again
LEAST_STEPS = 3
TRIAL_STEPS = 3  # they tell how many steps a visit takes

Told = TypeVar("Told")


class Ranks:
    """The processes of the run, and what they tell each other, on the CPU."""

    def __init__(self) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self._group = dist.new_group(backend="gloo")

    @classmethod
    @contextlib.contextmanager
    def joined(cls, device: torch.device) -> Iterator[Ranks]:
        """The tensor parallel group is the default one. It is left at the end, unless an error ends the process."""
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        yield cls()
        dist.destroy_process_group()

    def gather(self, value: Told) -> list[Told]:
        """What each rank tells, by rank. No rank goes on before all have told."""
        told: list[Told] = [value] * self.world
        dist.all_gather_object(told, value, group=self._group)
        return told


@dataclass(frozen=True, slots=True)
class ReadySet:
    """A set that is compiled. steps: that do not count at the start of a visit, and that count."""

    stack: TpStack
    error: float
    steps: tuple[int, int]


class CpuClock:
    """The wall clock, from now on."""

    def __init__(self) -> None:
        self._begin = self._end = time.perf_counter()

    def end(self) -> None:
        self._end = time.perf_counter()

    def elapsed_us(self) -> float:
        return (self._end - self._begin) * 1e6


class GpuClock:
    """Two events in the current stream, the first now."""

    def __init__(self) -> None:
        self._begin, self._end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        self._begin.record()

    def end(self) -> None:
        self._end.record()

    def elapsed_us(self) -> float:
        """Waits for the second event."""
        self._end.synchronize()
        milliseconds: float = self._begin.elapsed_time(self._end)
        return milliseconds * 1e3


@dataclass(slots=True)
class Bench:
    """Measures rounds of visits, on all ranks alike. journal: of rank 0. until: of `time.monotonic`, of rank 0."""

    setup: TpSetup
    ranks: Ranks
    device: torch.device
    until: float
    say: Callable[[str], None]
    visits: list[TpVisit]
    journal: TpJournal | None
    watch: Watch
    _ready: dict[str, ReadySet] = field(default_factory=dict)

    def is_done(self, rounds: int) -> bool:
        return len(complete_rounds(self.setup, self.visits)) >= rounds

    def measure(self, layers: TpLayers, rounds: int) -> None:
        """Until so many rounds are complete, or the time is up."""
        if not self._load(layers):
            return
        number = max((visit.round for visit in self.visits), default=0)
        for _ in range(MAX_TRIES * rounds):
            if self.is_done(rounds):
                return
            number += 1
            for one in random.Random(f"{self.setup.seed} {number}").sample(self.setup.sets, len(self.setup.sets)):
                if self._is_time_up():
                    return
                self._keep(self._visit(one.name, number))

    def _load(self, layers: TpLayers) -> bool:
        """Compile all sets, one after the other. Returns whether the time was enough."""
        expected: Results | None = None
        for one in self.setup.sets:
            if self._is_time_up():
                return False
            settings = self.setup.inductor if one.convert else {}
            stack = layers.make(one.convert, self.setup.recipe, settings if self.setup.compile else None, one.casts)
            results = stack.start()
            expected = expected or results
            error = max(self.ranks.gather(results.error(expected)))
            self._ready[one.name] = ReadySet(stack, error, self._count_steps(stack))
            self.say(f"ready: {one.name}, {len(one.convert)} linears a layer in float8, {error:.3f} from bf16")
        return True

    def _count_steps(self, stack: TpStack) -> tuple[int, int]:
        """Of a visit: how many settle, and how many count. The slowest rank decides for all."""
        stack.step()
        slowest_s = max(self.ranks.gather(self._time(stack, TRIAL_STEPS).step_us)) / 1e6
        settle, run = self.setup.settle_s / slowest_s, self.setup.run_s / slowest_s
        return max(1, math.ceil(settle)), max(LEAST_STEPS, math.ceil(run))

    def _visit(self, name: str, number: int) -> TpVisit:
        one = self._ready[name]
        settle, steps = one.steps
        time.sleep(self.setup.pause_s)
        self.ranks.gather(None)  # all ranks begin together
        launch_us = self._launch(one.stack)
        for _ in range(settle - 1):
            one.stack.step()
        own = self._time(one.stack, steps, launch_us)
        return TpVisit(
            set=name,
            round=number,
            measured_at=datetime.now(timezone.utc).replace(microsecond=0),
            steps=steps,
            error=one.error,
            ranks=tuple(self.ranks.gather(own)),
        )

    def _launch(self, stack: TpStack) -> float | None:
        """Run a step on an idle GPU, without waiting for it. Returns how long the host took; None on a CPU."""
        begin = time.perf_counter()
        stack.step()
        launch_us = (time.perf_counter() - begin) * 1e6
        return round(launch_us, 3) if self.device.type == "cuda" else None

    def _time(self, stack: TpStack, steps: int, launch_us: float | None = None) -> RankVisit:
        """Time steps that follow others. The watch is asked while a GPU runs them: the host is ahead of it."""
        clock = GpuClock() if self.device.type == "cuda" else CpuClock()
        for _ in range(steps):
            stack.step()
        clock.end()
        slowdown, is_limited = self.watch.slowdown(), self.watch.is_power_limited()
        return RankVisit(
            sm_clock_mhz=self.watch.sm_clock_mhz(),
            step_us=round(clock.elapsed_us() / steps, 3),
            launch_us=launch_us,
            is_limited=is_limited,
            slowdown=slowdown,
        )

    def _keep(self, visit: TpVisit) -> None:
        self.visits.append(visit)
        if self.journal:
            self.journal.append(visit)
        slowdown = f", does not count: {'; '.join(visit.slowdowns)}" if visit.slowdowns else ""
        self.say(f"round {visit.round}: {visit.step_us / 1e3:.3f} ms {visit.set}{slowdown}")

    def _is_time_up(self) -> bool:
        """Rank 0 decides, so that all ranks stop at the same place."""
        is_up = self.ranks.gather(time.monotonic() >= self.until)[0]
        if is_up:
            self.say("the time is up; the same command goes on")
        return is_up
