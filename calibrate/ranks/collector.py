"""Rank 0's other half: it collects what all ranks post, and deals the tasks of ranks that died out again.

Rank 0 publishes what is to be measured; every rank takes one task after the other, as it gets free, and posts what it
measured. No step needs all ranks: a slow one takes fewer tasks, and the tasks of one that dies, or does nothing for
long, go to others.

In: the store. Out: every record, to a `Ledger`.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from fp8gate.calibrate.points.point_record import PointRecord, Stages
from fp8gate.calibrate.points.task_queue import Task
from fp8gate.calibrate.processes.limits import Limits
from fp8gate.calibrate.ranks.rank_queue import BEAT_S
from fp8gate.calibrate.ranks.rank_store import POLL_S, Message, RanksError, RankStore
from fp8gate.calibrate.sweep.session import Ledger, failed_record
from fp8gate.calibrate.sweep.sweep_tasks import SweepTasks

MAX_RANK_DEATHS = 3  # of ranks that held a task: then the task is at fault


@dataclass(frozen=True, kw_only=True, slots=True)
class RankLimits:
    """Seconds. dead_s: a rank that is silent for so long is taken for dead. join_s: for a rank to join, while others
    measure. stuck_s: without a word from a rank that holds a task; compiling and measuring one take less. ending_s: for
    the other ranks to leave when rank 0 is stopped; torchrun gives it 30."""

    dead_s: float = 30.0
    join_s: float = 120.0
    stuck_s: float = 2 * Limits().step_s + 60.0
    ending_s: float = 5.0


class Collector:
    """Puts what all ranks post into the ledger, and deals out again what dead ranks had.

    A context: from its entry on it works on a thread, until all ranks have left or died. Its exit waits for that.
    """

    def __init__(
        self, store: RankStore, world: int, tasks: SweepTasks, ledger: Ledger, limits: RankLimits | None = None
    ) -> None:
        self.store, self.tasks, self.ledger = store, tasks, ledger
        self._limits = limits or RankLimits()
        self.retried = 0
        self.discarded: list[Stages] = []
        self.troubles: dict[str, str] = {}
        self._count = len(tasks.tasks)
        self._open = set(range(self._count))
        self._deaths: Counter[Task] = Counter()
        self._unowned: dict[int, float] = {}  # since when
        self._members: dict[str, _Member] = {store.me: _Member(0)}
        self._others = range(1, world)
        self._expected = set(self._others)
        self._absent: dict[int, str] = {}
        self._start = time.monotonic()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, daemon=True)

    def __enter__(self) -> Collector:
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Raise what went wrong on the thread. If something went wrong here, tell the others to end instead."""
        if error is not None:
            self.store.end(f"rank 0 has ended: {type(error).__name__} {error}")
        self._thread.join(None if error is None else self._limits.ending_s)
        if self._error and error is None:
            raise self._error

    @property
    def remaining(self) -> int:
        """How many of the tasks dealt out nobody has measured."""
        return len(self._open)

    @property
    def lost(self) -> dict[int, str]:
        """Ranks that did not stay to the end, and why."""
        return {**self._absent, **{m.rank: m.lost for m in self._members.values() if m.lost}}

    def _work(self) -> None:
        try:
            looked_at = 0.0
            while self._expected or any(member.is_here for member in self._members.values()):
                heard = [self._hear(process, member) for process, member in list(self._members.items())]
                if time.monotonic() > looked_at + BEAT_S:
                    self._admit()
                    owners = self._owners()
                    self._find_dead(owners.values())
                    self._deal_again(owners)
                    looked_at = time.monotonic()
                if not self._open and not self._expected:
                    self.store.end()
                if not any(heard):
                    time.sleep(POLL_S)
            self.store.end()
        except BaseException as error:  # a full disk, say: nobody would hear of it on this thread
            self._error = error
            with contextlib.suppress(RanksError):
                self.store.end(f"rank 0 cannot keep what was measured: {error}")

    def _admit(self) -> None:
        """Let processes in. One that joins takes the place of an earlier process of its rank."""
        for rank, process in self.store.admit(self._others).items():
            if process not in self._members:
                for earlier in self._members.values():
                    if earlier.rank == rank:
                        earlier.state = "dead"
                self._members[process] = _Member(rank)
                self._expected.discard(rank)
                self._absent.pop(rank, None)
        if self._expected and time.monotonic() > self._start + self._limits.join_s:
            self._absent = dict.fromkeys(self._expected, f"did not join within {self._limits.join_s:.0f} s")
            self._expected = set()

    def _hear(self, process: str, member: _Member) -> bool:
        message = self.store.message(process, member.heard)
        if message is None:
            return False
        member.heard += 1
        member.heard_at = time.monotonic()
        if message.refused:
            self.store.end(message.refused)
        if message.say:
            self.ledger.say(f"rank {member.rank}: {message.say}")
        if message.record:
            self._take(message, message.record)
        if message.off:
            shape, error = message.off
            self.ledger.refuse(Task(shape), error)
            self._open.discard(-1 if message.task is None else message.task)
        if message.left:
            member.state, member.lost = "left", message.lost
            self.retried += message.retried
            self.discarded += message.discarded
            self.troubles.update(message.troubles)
        return True

    def _take(self, message: Message, record: PointRecord) -> None:
        """Keep a record. A task that was dealt out again counts once: its first rank may have been slow, not dead."""
        if message.task is not None and message.task not in self._open:
            return
        self.ledger.keep(Task(record.shape, repeat=record.repeat), record)
        self._open.discard(-1 if message.task is None else message.task)

    def _owners(self) -> dict[int, str | None]:
        """Who has taken each open task, by its number; None if that process has not said so yet."""
        taken = self.store.taken()
        return {number: self.store.owner(number) for number in sorted(self._open) if number < taken}

    def _find_dead(self, owners: Collection[str | None]) -> None:
        now = time.monotonic()
        for process, member in self._members.items():
            if member.state not in ("here", "silent"):
                continue
            beats = self.store.beats(process)
            if beats != member.beats:
                member.beats, member.seen_at = beats, now
                member.state, member.lost = "here", ""
            elif now > member.seen_at + self._limits.dead_s and member.state == "here":
                self._give_up(member, "silent", f"has not been heard of for {self._limits.dead_s:.0f} s")
            if member.state == "here" and process in owners and now > member.heard_at + self._limits.stuck_s:
                self._give_up(member, "stuck", f"has measured nothing for {self._limits.stuck_s:.0f} s")

    def _give_up(self, member: _Member, state: Literal["silent", "stuck"], why: str) -> None:
        member.state, member.lost = state, why
        self.ledger.say(f"rank {member.rank} {why}: its points go to others")

    def _deal_again(self, owners: Mapping[int, str | None]) -> None:
        """Give new numbers, at the end, to tasks whose process is not here any more.

        A process may also have died between taking a number and saying so.
        """
        now = time.monotonic()
        for number, owner in owners.items():
            since = self._unowned.setdefault(number, now) if owner is None else now
            if now > since + self._limits.dead_s or (owner is not None and not self._members[owner].is_here):
                self._open.remove(number)
                self._deal(self.store.task(number), has_ended=owner is None or self._members[owner].state == "left")

    def _deal(self, task: Task, *, has_ended: bool) -> None:
        """Deal a task out again, unless ranks die of it.

        has_ended: the rank that had it stopped in order, or never began.
        """
        self._deaths[task] += not has_ended
        if self._deaths[task] < MAX_RANK_DEATHS:
            self._open.add(self._count)
            self._count = self.store.append([task], self._count)
        else:
            detail = f"{MAX_RANK_DEATHS} ranks that had it died"
            self.ledger.keep(task, failed_record(task, self.tasks.recipes, detail))


class _Member:
    """A process that takes part, as rank 0 knows it. A stuck one lives and does nothing."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.state: Literal["here", "silent", "stuck", "dead", "left"] = "here"
        self.lost = ""
        self.heard = 0  # messages
        self.beats: bytes | None = None
        self.heard_at = self.seen_at = time.monotonic()

    @property
    def is_here(self) -> bool:
        return self.state == "here"
