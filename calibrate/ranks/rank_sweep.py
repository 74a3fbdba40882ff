"""A sweep by the ranks of torchrun: rank 0 leads it and keeps the journal, every rank measures on its own device.

In: a place among the ranks, the store of torch.distributed. Out: on rank 0 what a sweep of one process gives.
Try it: torchrun --nproc-per-node=2 -m fp8gate calibrate --device cpu --grid quick --out /tmp/tables
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import msgspec
import torch

from fp8gate.calibrate.device.capacity import useful_workers
from fp8gate.calibrate.device.description import device_identity
from fp8gate.calibrate.device.timing_lock import timing_lock_file
from fp8gate.calibrate.device.watch import DeviceBusyError, DeviceLock
from fp8gate.calibrate.points.measure_point import DeviceLostError
from fp8gate.calibrate.points.point_worker import Job
from fp8gate.calibrate.points.worker_pool import WorkersDiedError
from fp8gate.calibrate.ranks.dealing import Collector, RankLedger, RankTaskQueue, heartbeat
from fp8gate.calibrate.ranks.environment import RankEnvironment
from fp8gate.calibrate.ranks.rank_store import CALL_S, POLL_S, Message, RanksError, RankStore, SweepTasks, watchdog
from fp8gate.calibrate.sweep.journal import Setup, differences
from fp8gate.calibrate.sweep.session import JournalLedger, SessionResult, SweepSession

FAREWELL_S = 15.0  # ranks start together; one that is not there by then has other troubles


@dataclass(frozen=True, slots=True)
class Ranks:
    """Where this process is among the others, and how it speaks with them."""

    place: RankEnvironment
    board: RankStore


def join(place: RankEnvironment) -> Ranks:
    """Connect to the store that torchrun holds, or rank 0, and to rank 0. Raises RanksError if there is none."""
    store = _store(place)
    return Ranks(place, RankStore.open(store) if place.rank == 0 else RankStore.join(store, place.rank))


@contextlib.contextmanager
def leading(ranks: Ranks) -> Iterator[None]:
    """What goes wrong on rank 0 before it leads is the other ranks' error too."""
    try:
        with watchdog(ranks.board):
            yield
    except BaseException as error:
        with contextlib.suppress(RanksError):
            ranks.board.end(f"rank 0 has ended: {error or type(error).__name__}")
            _tell(ranks)
        raise


def _tell(ranks: Ranks) -> None:
    """Let the others in, as far as they come soon, to read why it has ended; rank 0's own store ends with it."""
    others = range(1, ranks.place.world)
    give_up_at = time.monotonic() + FAREWELL_S
    while len(ranks.board.admit(others)) < len(others) and time.monotonic() < give_up_at:
        time.sleep(POLL_S)
    time.sleep(5 * POLL_S)


def lead(
    ranks: Ranks,
    plan: SweepTasks,
    book: JournalLedger,
    device: torch.device,
    workers: int | None,
    stop_after_s: float | None,
) -> SessionResult:
    """Rank 0's part: publish the plan, measure as all others do, and collect what everybody posts.

    Raises ValueError if a rank's device or software differs.
    """
    long_first = tuple(sorted(plan.tasks, key=lambda task: -task.shape.flop))  # what is short fills the gaps at the end
    stop_at = None if stop_after_s is None else time.time() + stop_after_s
    plan = msgspec.structs.replace(plan, tasks=long_first, stop_at=stop_at)
    ranks.board.publish(plan)
    with Collector(ranks.board, ranks.place.world, plan, book) as collector:
        run = _measure(ranks, plan, device, workers)
    ranks.board.require_no_error()
    return SessionResult(
        remaining=collector.remaining,
        retried=collector.retried,
        discarded=collector.discarded,
        starting_s=run.starting_s,
        idle_s=run.idle_s,
        troubles=collector.troubles,
        lost=collector.lost,
    )


def take_part(ranks: Ranks, device: torch.device, setup: Setup, workers: int | None) -> None:
    """Another rank's part.

    Raises ValueError if this rank's device or software is not rank 0's, which ends the sweep for all, or if the sweep
    was ended so; RanksError if rank 0 is gone.
    """
    with watchdog(ranks.board):
        plan = ranks.board.plan()
        if differing := _differences(setup, plan.setup):
            me = f"rank {ranks.place.rank} ({device_identity(device, ranks.place.local_rank)})"
            refused = f"{me} differs from rank 0: {differing}; a table is of one kind of both: sweep them apart"
            ranks.board.post(Message(refused=refused, left=True))
            raise ValueError(refused)
        try:
            with _lock(ranks.place, device):
                _measure(ranks, plan, device, workers)
        except DeviceBusyError as error:
            ranks.board.post(Message(left=True, lost=f"could not begin: {error}"))
        ranks.board.require_no_error()


def _store(place: RankEnvironment) -> Any:
    """torchrun's, which outlives its ranks, or one that rank 0 holds. Raises RanksError."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        held_by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        is_master = place.rank == 0 and not held_by_torchrun
        return TCPStore(address, port, None, is_master, timedelta(seconds=CALL_S), wait_for_workers=False)
    except (KeyError, ValueError, RuntimeError) as error:
        raise RanksError(f"no store of torch.distributed at MASTER_ADDR, MASTER_PORT: {error!r}") from error


def _measure(ranks: Ranks, plan: SweepTasks, device: torch.device, workers: int | None) -> SweepSession:
    """Take tasks until none is left. A device that fails ends this rank's part, and no other's."""
    measured_on = device_identity(device, ranks.place.local_rank)
    if workers is None:
        workers = useful_workers(plan.setup.device, plan.protocols, ranks.place.local_world)
    schedule = RankTaskQueue(plan.own_tasks(measured_on), ranks.board)
    lost = ""
    with timing_lock_file() as quiet, heartbeat(ranks.board):
        job = Job(device, plan.protocols, plan.seed, quiet, measured_on)
        run = SweepSession(job, schedule, RankLedger(ranks.board, schedule), stop_after_s=plan.stop_after_s)
        try:
            run.measure(workers)
        except DeviceLostError as error:
            lost = f"lost its device, {measured_on}: {error.__cause__}"
        except WorkersDiedError as error:
            lost = f"could not go on on {measured_on}: {error}"
        ranks.board.post(
            Message(
                left=True,
                lost=lost,
                retried=schedule.retries,
                discarded=tuple(run.discarded),
                troubles=run.part(remaining=0).troubles,
            )
        )
    return run


def _differences(own: Setup, rank_0: Setup) -> str:
    """What differs, field by field: "device.name is NVIDIA H100, there NVIDIA H200"."""
    found = [
        f"{part}.{field} is {mine}, there {theirs}"
        for part in ("device", "software")
        for field, mine, theirs in differences(getattr(own, part), getattr(rank_0, part))
    ]
    if not found and own != rank_0:
        found.append("the protocols differ")
    return ", ".join(found)


@contextlib.contextmanager
def _lock(place: RankEnvironment, device: torch.device) -> Iterator[None]:
    """The device's; on a CPU, ranks of one machine share one, which the first holds for all."""
    if device.type == "cpu" and place.local_rank > 0:
        yield
    else:
        with DeviceLock(device):
            yield
