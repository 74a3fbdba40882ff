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
from fp8gate.calibrate.device.lock import DeviceBusyError, DeviceLock
from fp8gate.calibrate.device.registry import kind_of
from fp8gate.calibrate.device.timing_lock import timing_lock_file
from fp8gate.calibrate.points.measure_point import DeviceLostError
from fp8gate.calibrate.points.point_worker import Job
from fp8gate.calibrate.points.setup import Setup, differences
from fp8gate.calibrate.processes.child import NoChildError
from fp8gate.calibrate.ranks.collector import Collector
from fp8gate.calibrate.ranks.environment import RankEnvironment
from fp8gate.calibrate.ranks.rank_queue import RankLedger, RankTaskQueue, heartbeat
from fp8gate.calibrate.ranks.rank_store import CALL_S, POLL_S, Message, RanksError, RankStore, watchdog
from fp8gate.calibrate.sweep.session import JournalLedger, SessionResult, SweepSession
from fp8gate.calibrate.sweep.sweep_tasks import SweepTasks
from fp8gate.filter.contract.errors import InputError

ADMIT_S = 15.0  # ranks start together: one that is not there by then will not come


@dataclass(frozen=True, slots=True)
class Ranks:
    """Where this process is among the others, and how it speaks with them."""

    environment: RankEnvironment
    store: RankStore


def join(environment: RankEnvironment) -> Ranks:
    """Connect to the store that torchrun holds, or rank 0, and to rank 0. Raises RanksError if there is none."""
    store = _connect(environment)
    return Ranks(
        environment, RankStore.open(store) if environment.rank == 0 else RankStore.join(store, environment.rank)
    )


@contextlib.contextmanager
def leading(ranks: Ranks) -> Iterator[None]:
    """Tell the other ranks what goes wrong on rank 0, so that they end with the same error."""
    try:
        with watchdog(ranks.store):
            yield
    except BaseException as error:
        with contextlib.suppress(RanksError):
            ranks.store.end(f"rank 0 has ended: {error or type(error).__name__}")
            _tell(ranks)
        raise


def _tell(ranks: Ranks) -> None:
    """Let the others in, if they come soon, to read why the sweep has ended: rank 0's own store ends with it."""
    others = range(1, ranks.environment.world)
    give_up_at = time.monotonic() + ADMIT_S
    while len(ranks.store.admit(others)) < len(others) and time.monotonic() < give_up_at:
        time.sleep(POLL_S)
    time.sleep(5 * POLL_S)


@dataclass(frozen=True, slots=True)
class MeasuringByRanks:
    """Rank 0 publishes the tasks, measures as all others do, and collects what they post."""

    connected: Ranks

    @property
    def ranks(self) -> int:
        return self.connected.environment.world

    @property
    def ranks_here(self) -> int:
        return self.connected.environment.local_world

    def measure(
        self, tasks: SweepTasks, ledger: JournalLedger, device: torch.device, workers: int, stop_after_s: float | None
    ) -> SessionResult:
        """Raises InputError if a rank's device or software differs."""
        store = self.connected.store
        long_first = tuple(
            sorted(tasks.tasks, key=lambda task: -task.shape.flop)
        )  # short ones fill the gaps at the end
        stop_at = None if stop_after_s is None else time.time() + stop_after_s
        tasks = msgspec.structs.replace(tasks, tasks=long_first, stop_at=stop_at)
        store.publish(tasks)
        with Collector(store, self.ranks, tasks, ledger) as collector:
            session = _measure(self.connected, tasks, device, workers)
        store.require_no_error()
        return SessionResult(
            remaining=collector.remaining,
            retried=collector.retried,
            discarded=collector.discarded,
            starting_s=session.starting_s,
            idle_s=session.idle_s,
            troubles=collector.troubles,
            lost=collector.lost,
            host=session.host,
        )


def take_part(ranks: Ranks, device: torch.device, setup: Setup, workers: int | None) -> None:
    """Another rank's part.

    Raises InputError if this rank's device or software is not rank 0's, which ends the sweep for all, or if the sweep
    was ended so; RanksError if rank 0 is gone.
    """
    with watchdog(ranks.store):
        tasks = ranks.store.published()
        if differing := _differences(setup, tasks.setup):
            me = f"rank {ranks.environment.rank} ({kind_of(device).identity(device, ranks.environment.local_rank)})"
            refused = f"{me} differs from rank 0: {differing}; a table is of one kind of both: sweep them apart"
            ranks.store.post(Message(refused=refused, left=True))
            raise InputError(refused)
        try:
            with _lock(ranks.environment, device):
                _measure(ranks, tasks, device, workers)
        except DeviceBusyError as error:
            ranks.store.post(Message(left=True, lost=f"could not begin: {error}"))
        ranks.store.require_no_error()


def _connect(environment: RankEnvironment) -> Any:
    """torchrun's, which outlives its ranks, or one that rank 0 holds. Raises RanksError."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        held_by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        is_master = environment.rank == 0 and not held_by_torchrun
        return TCPStore(address, port, None, is_master, timedelta(seconds=CALL_S), wait_for_workers=False)
    except (KeyError, ValueError, RuntimeError) as error:
        raise RanksError(f"no store of torch.distributed at MASTER_ADDR, MASTER_PORT: {error!r}") from error


def _measure(ranks: Ranks, tasks: SweepTasks, device: torch.device, workers: int | None) -> SweepSession:
    """Take tasks until none is left. A device that fails ends the part of this rank alone."""
    measured_on = kind_of(device).identity(device, ranks.environment.local_rank)
    if workers is None:
        workers = useful_workers(tasks.setup.device, tasks.protocols, ranks.environment.local_world)
    queue = RankTaskQueue(tasks.own_tasks(measured_on), ranks.store)
    lost = ""
    with timing_lock_file() as timing_lock, heartbeat(ranks.store):
        job = Job(device, tasks.protocols, tasks.seed, timing_lock, measured_on)
        session = SweepSession(job, queue, RankLedger(ranks.store, queue), stop_after_s=tasks.stop_after_s)
        try:
            session.measure(workers)
        except DeviceLostError as error:
            lost = f"lost its device, {measured_on}: {error.reason}"
        except NoChildError as error:
            lost = f"could not go on on {measured_on}: {error}"
        ranks.store.post(
            Message(
                left=True,
                lost=lost,
                retried=queue.retries,
                discarded=tuple(session.discarded),
                troubles=session.result(remaining=0).troubles,
            )
        )
    return session


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
def _lock(environment: RankEnvironment, device: torch.device) -> Iterator[None]:
    """The device's, unless another rank of this machine holds it for all."""
    if kind_of(device).has_own_lock(environment.local_rank):
        with DeviceLock(device):
            yield
    else:
        yield
