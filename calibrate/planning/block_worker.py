"""One process's part of a plan: it compiles sets of roles in float8 beside other processes, and visits them in turn.

In: a `PlanJob`, then requests, one at a time. Out: an answer to each; failures of a set are answers. Compiling touches
the device only to load what it has compiled. While a set is visited, no other process may use the device.

A visit has the device for itself: the device idles, then the set runs alone until the clock is its own, and then for a
whole second. At its power limit a GPU sets its clock by what runs, and keeps to the limit over a second, not over less:
sets that take turns in milliseconds share a clock that none has in training, which errs by up to 18 % (LOG.md,
2026-11-24). So bf16 and the sets are interleaved not run by run but visit by visit, in random order, and compared
within a round.
"""

from __future__ import annotations

import gc
import random
import time
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

import torch

from fp8gate.calibrate.arms.block import Block
from fp8gate.calibrate.arms.blueprint import Blueprint, ReadyBlock
from fp8gate.calibrate.arms.failure import Failure
from fp8gate.calibrate.device.registry import kind_of
from fp8gate.calibrate.device.timer import Timer
from fp8gate.calibrate.device.watch import Watch
from fp8gate.calibrate.planning.search import BF16_SET, CONTROL_SET, RoleSet
from fp8gate.calibrate.processes.channel import Channel
from fp8gate.calibrate.timing.steady_run import run_steadily
from fp8gate.filter.contract.plans.plan import PlanProtocol
from fp8gate.filter.contract.recipes import Casts, Recipe

MAX_ERROR = 0.45
"""Of float8 against bf16. Decoder layers gave up to 0.18 (tensorwise, 8192 wide), more the wider they are, and up to
0.38 where a router then sends some tokens to other experts (mixtral-8x7b). A layer that loses the last product of its
attention or MLP gives at least 0.5."""
BATCH_S = 0.1  # rounds between two questions to the driver: each takes a millisecond, in which a GPU would idle
LEAST_ROUNDS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanJob:
    """What all processes of a plan have in common. flush_bytes: see `DeviceKind.make_timer`."""

    blueprint: Blueprint
    recipe: Recipe
    protocol: PlanProtocol
    device: torch.device
    flush_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Done:
    """The set is compiled, or loaded. error: once loaded, the largest relative difference from bf16's results."""

    error: float = 0.0


@dataclass(frozen=True, slots=True)
class Visit:
    """Mean times of a visit. slowdown: why it does not count, or None."""

    fwd_us: float
    bwd_us: float
    sm_clock_mhz: int | None
    is_limited: bool
    slowdown: str | None


Answer = Done | Visit | Failure
Request = tuple[Literal["open", "compile", "load", "visit"], RoleSet]


class BlockBench:
    """The sets that this process has compiled, and its block on the device."""

    def __init__(self, job: PlanJob) -> None:
        self.job = job
        self._rng = random.Random(job.protocol.seed)
        self._ready: dict[RoleSet, ReadyBlock] = {}
        self._prepared: dict[RoleSet, Any] = {}
        self._tools: tuple[Timer[Any], Watch, Block] | None = None

    def answer(self, request: Request) -> Answer:
        """Raises what the device says if it can no longer be used."""
        what, roles = request
        try:
            return getattr(self, what)(roles)  # type: ignore[no-any-return]
        except Exception as error:
            failure = Failure.of(error)
        if what != "compile":
            kind = kind_of(self.job.device)
            kind.synchronize(self.job.device)
            kind.release_memory(self.job.device)
        return failure

    def open(self, _: RoleSet) -> Done:
        """Start the device's libraries and make the block there. It takes seconds, in which nobody may measure."""
        self._on_device()
        return Done()

    def compile(self, roles: RoleSet) -> Done:
        """bf16 is compiled as it is trained without float8, with Inductor's defaults."""
        job = self.job
        converted = BF16_SET if roles == CONTROL_SET else roles
        inductor = (job.protocol.inductor if converted else {}) if job.protocol.compile else None
        self._ready[roles] = job.blueprint.ready(
            converted, job.recipe, inductor, job.device.type, self.casts_of(converted)
        )
        return Done()

    def casts_of(self, roles: RoleSet) -> Casts:
        """Who compiles the casts of a set."""
        return self.job.protocol.casts if roles else "inductor"

    def load(self, roles: RoleSet) -> Done | Failure:
        """Tune, capture and check a set that is compiled."""
        timer, _, block = self._on_device()
        prepared = timer.prepare(block.arm(self._ready.pop(roles)))
        error, name = block.error(lambda: timer.results(prepared))
        timer.forget_results(prepared)
        gc.collect()  # here, so that it does not happen during a visit
        if not error <= MAX_ERROR:
            return Failure("failed", f"wrong result: {name} is {error:.2g} from bf16's")
        self._prepared[roles] = prepared
        return Done(error)

    def visit(self, roles: RoleSet) -> Visit:
        """Time a set that is loaded."""
        timer, watch, _ = self._on_device()
        protocol = self.job.protocol
        time.sleep(protocol.pause_s)
        run = run_steadily(
            [self._prepared[roles]],
            timer,
            watch,
            self._rng,
            settle_s=protocol.settle_s,
            run_s=protocol.run_s,
            least=LEAST_ROUNDS,
            batch_s=min(BATCH_S, protocol.run_s),
        )
        samples = [sample for (sample,) in run.rounds]
        return Visit(
            fwd_us=fmean(sample.fwd_us for sample in samples),
            bwd_us=fmean(sample.bwd_us for sample in samples),
            sm_clock_mhz=round(fmean(run.clocks_mhz)) if run.clocks_mhz else None,
            is_limited=run.is_limited,
            slowdown=run.slowdown,
        )

    def _on_device(self) -> tuple[Timer[Any], Watch, Block]:
        if not self._tools:
            device, kind = self.job.device, kind_of(self.job.device)
            torch.manual_seed(self.job.protocol.seed)
            block = Block(self.job.blueprint, device)
            timer = kind.make_timer(device, shares_memory=True, flush_bytes=self.job.flush_bytes)
            self._tools = timer, kind.make_watch(device), block
        return self._tools


def serve_block(channel: Channel, job: PlanJob) -> None:
    """Answer requests until dismissed."""
    bench = BlockBench(job)
    while True:
        channel.send(bench.answer(channel.receive()))
