"""Run arms alone on the device until its clock is their own, and then for as long as their time needs to be known.

In: prepared arms that draw the same power (mostly one), a timer, how long. Out: a `SteadyRun`, each round's samples.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fp8gate.calibrate.device.timer import Sample, Timer
from fp8gate.calibrate.device.watch import Watch

BUSY_SHARE, IDLE_RUN_S = 0.5, 0.02
"""Arms that keep the device busy for less of the time (between flushes and host work) do not reach the power limit. On
an H200 the clock then stays at its maximum: there is nothing to wait for, and IDLE_RUN_S is enough."""
BATCH_S = 0.01  # rounds that are run together, before the device is asked how it does


@dataclass(slots=True)
class SteadyRun:
    """What was counted. is_limited: the power limit was reached. slowdown: why none of it counts, or None."""

    settling_s: float
    rounds: list[list[Sample]] = field(default_factory=list)
    timing_s: float = 0.0
    clocks_mhz: list[int] = field(default_factory=list)
    is_limited: bool = False
    slowdown: str | None = None


def run_steadily(
    arms: Sequence[Any],
    timer: Timer[Any],
    watch: Watch,
    rng: random.Random,
    *,
    settle_s: float,
    limited_settle_s: float = 0.0,
    run_s: float,
    least: int,
    batch_s: float = BATCH_S,
) -> SteadyRun:
    """Settle, then run for run_s (less on an idle device), at least `least` rounds; end early at a slowdown.

    limited_settle_s: how much longer to settle if the power limit has been reached by then.
    """
    start = time.perf_counter()
    batch, is_idle = _settle(arms, timer, rng, settle_s, batch_s)
    is_limited = watch.is_power_limited()
    if is_limited and limited_settle_s:
        _settle(arms, timer, rng, limited_settle_s, batch_s)
    settled = time.perf_counter()
    end = settled + (min(run_s, IDLE_RUN_S) if is_idle else run_s)
    run = SteadyRun(settled - start, is_limited=is_limited)
    while not run.slowdown and (len(run.rounds) < least or time.perf_counter() < end):
        run.rounds += timer.rounds(arms, balanced_orders(len(arms), batch, rng))
        if (clock_mhz := watch.sm_clock_mhz()) is not None:
            run.clocks_mhz.append(clock_mhz)
        run.is_limited |= watch.is_power_limited()
        run.slowdown = watch.slowdown()
    run.timing_s = time.perf_counter() - settled
    return run


def balanced_orders(arms: int, rounds: int, rng: random.Random) -> list[list[int]]:
    """Orders for rounds, in pairs of an order and its reverse: of two arms, each comes first equally often."""
    orders: list[list[int]] = []
    while len(orders) < rounds:
        order = rng.sample(range(arms), arms)
        orders += [order, order[::-1]]
    return orders[:rounds]


def _settle(
    arms: Sequence[Any], timer: Timer[Any], rng: random.Random, at_most_s: float, batch_s: float
) -> tuple[int, bool]:
    """Run rounds that do not count for that long; stop at once if the device idles.

    Returns how many rounds fill a batch, and whether the device idles.
    """
    start, batch, passes = time.perf_counter(), 1, 0
    while True:
        before = time.perf_counter()
        rounds = timer.rounds(arms, balanced_orders(len(arms), batch, rng))
        now, passes = time.perf_counter(), passes + 1
        busy_s = sum(sample.fwd_us + sample.bwd_us for one in rounds for sample in one) / 1e6
        batch = max(1, round(batch_s / ((now - before) / len(rounds))))
        is_idle = passes > 1 and busy_s < BUSY_SHARE * (now - before)
        if is_idle or now >= start + at_most_s:
            return batch, is_idle
