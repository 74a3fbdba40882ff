"""Deal the points of a sweep out to many ranks.

Rank 0 publishes what is to be measured; every rank takes one task after the other, as it gets free, and posts what it
measured; rank 0 collects that. No step needs all ranks: one that is slow takes fewer tasks, and the tasks of one that
dies, or does nothing for long, are dealt out again.

In: a board. Out: on rank 0, every record to a `Ledger`.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Collection, Container, Iterable, Iterator, Mapping
from typing import Literal

from fp8gate.calibrate.points.point_record import PointRecord, Stages
from fp8gate.calibrate.points.task_queue import Task, TaskQueue
from fp8gate.calibrate.points.worker_pool import MAX_STEP_S
from fp8gate.calibrate.ranks.rank_store import POLL_S, Message, RanksError, RankStore, SweepTasks
from fp8gate.calibrate.sweep.session import Ledger, failed_record
from fp8gate.filter.contract.shapes import LinearShape

BEAT_S, DEAD_S = 2.0, 30.0  # a rank shows that it lives so often; silent for so long, it is taken for dead
JOIN_S = 120.0  # for a rank to join, while others measure
STUCK_S = 2 * MAX_STEP_S + 60.0  # without a word from a rank that holds a task: compiling and measuring take less
MAX_RANK_DEATHS = 3  # of ranks that held a task: then it is the task's fault


class RankTaskQueue(TaskQueue):
    """This rank's own tasks, and those that it takes from the board."""

    def __init__(self, own: Iterable[Task], board: RankStore) -> None:
        super().__init__(own)
        self._board = board
        self.numbers: dict[Task, int] = {}  # of those taken

    def next(self, measured: Container[LinearShape] = ()) -> Task | None:
        found = super().next(measured)
        if found is None and self._take():
            found = super().next(measured)
        return found

    def wait(self) -> bool:
        """Until there is a task, or none will come: those of a rank that dies are dealt out again."""
        while not self and not self._take():
            if self._board.has_ended():
                return False
            time.sleep(POLL_S)
        return True

    def _take(self) -> bool:
        """Whether there was a task to take."""
        taken = None if self._board.has_ended() else self._board.take()
        if taken is None:
            return False
        number, task = taken
        self.numbers[task] = number
        self.give_back(task)
        return True


class RankLedger:
    """The ledger of a rank: everything goes to rank 0."""

    def __init__(self, board: RankStore, schedule: RankTaskQueue) -> None:
        self._board, self._schedule = board, schedule

    def keep(self, task: Task, record: PointRecord) -> None:
        self._board.post(Message(task=self._schedule.numbers.get(task), record=record))

    def refuse(self, task: Task, error: float) -> None:
        self._board.post(Message(task=self._schedule.numbers.get(task), off=(task.shape, error)))

    def say(self, message: str) -> None:
        self._board.post(Message(say=message))


@contextlib.contextmanager
def heartbeat(board: RankStore) -> Iterator[None]:
    """Show that this rank lives, for as long as it does."""
    stop = threading.Event()

    def beat() -> None:
        count = 0
        with contextlib.suppress(RanksError):  # the rank will notice by itself
            while not stop.wait(BEAT_S if count else 0):
                count += 1
                board.beat(count)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


class Collector:
    """Rank 0's other half: what all ranks post goes into the ledger, and what dead ranks had is dealt out again.

    A context: it works on a thread from its entry until all ranks have left or died, for which its exit waits.
    """

    def __init__(self, board: RankStore, world: int, plan: SweepTasks, ledger: Ledger) -> None:
        self.board, self.plan, self.ledger = board, plan, ledger
        self.retried = 0
        self.discarded: list[Stages] = []
        self.troubles: dict[str, str] = {}
        self._count = len(plan.tasks)
        self._open = set(range(self._count))
        self._deaths: Counter[Task] = Counter()
        self._unowned: dict[int, float] = {}  # since when
        self._members: dict[str, _Member] = {board.me: _Member(0)}
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
        """Raises what went wrong on the thread, unless something has gone wrong here: then the others end soon."""
        if error is not None:
            self.board.end(f"rank 0 has ended: {type(error).__name__} {error}")
        self._thread.join(None if error is None else DEAD_S)
        if self._error and error is None:
            raise self._error

    @property
    def remaining(self) -> int:
        """Tasks dealt out that nobody has measured."""
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
                    self.board.end()
                if not any(heard):
                    time.sleep(POLL_S)
            self.board.end()
        except BaseException as error:  # a full disk, say: nobody would hear of it on this thread
            self._error = error
            with contextlib.suppress(RanksError):
                self.board.end(f"rank 0 cannot keep what was measured: {error}")

    def _admit(self) -> None:
        """A process that joins takes the place of an earlier one of its rank."""
        for rank, process in self.board.admit(self._others).items():
            if process not in self._members:
                for earlier in self._members.values():
                    if earlier.rank == rank:
                        earlier.state = "dead"
                self._members[process] = _Member(rank)
                self._expected.discard(rank)
                self._absent.pop(rank, None)
        if self._expected and time.monotonic() > self._start + JOIN_S:
            self._absent = dict.fromkeys(self._expected, f"did not join within {JOIN_S:.0f} s")
            self._expected = set()

    def _hear(self, process: str, member: _Member) -> bool:
        message = self.board.message(process, member.heard)
        if message is None:
            return False
        member.heard += 1
        member.heard_at = time.monotonic()
        if message.refused:
            self.board.end(message.refused)
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
        """A task that was dealt out again counts once: its first rank may have been slow rather than dead."""
        if message.task is not None and message.task not in self._open:
            return
        self.ledger.keep(Task(record.shape, repeat=record.repeat), record)
        self._open.discard(-1 if message.task is None else message.task)

    def _owners(self) -> dict[int, str | None]:
        """Of the open tasks that are taken, by number; None: whoever it is has not said so yet."""
        taken = self.board.taken()
        return {number: self.board.owner(number) for number in sorted(self._open) if number < taken}

    def _find_dead(self, owners: Collection[str | None]) -> None:
        now = time.monotonic()
        for process, member in self._members.items():
            if member.state not in ("here", "silent"):
                continue
            beats = self.board.beats(process)
            if beats != member.beats:
                member.beats, member.seen_at = beats, now
                member.state, member.lost = "here", ""
            elif now > member.seen_at + DEAD_S and member.state == "here":
                self._give_up(member, "silent", f"has not been heard of for {DEAD_S:.0f} s")
            if member.state == "here" and process in owners and now > member.heard_at + STUCK_S:
                self._give_up(member, "stuck", f"has measured nothing for {STUCK_S:.0f} s")

    def _give_up(self, member: _Member, state: Literal["silent", "stuck"], why: str) -> None:
        member.state, member.lost = state, why
        self.ledger.say(f"rank {member.rank} {why}: its points go to others")

    def _deal_again(self, owners: Mapping[int, str | None]) -> None:
        """What was taken by processes that are not here any more gets new numbers at the end.

        One may also have died between taking a number and saying so.
        """
        now = time.monotonic()
        for number, owner in owners.items():
            since = self._unowned.setdefault(number, now) if owner is None else now
            if now > since + DEAD_S or (owner is not None and not self._members[owner].is_here):
                self._open.remove(number)
                self._deal(self.board.task(number), has_ended=owner is None or self._members[owner].state == "left")

    def _deal(self, task: Task, *, has_ended: bool) -> None:
        """Once more, unless ranks die of it. has_ended: whoever had it stopped in order, or never began."""
        self._deaths[task] += not has_ended
        if self._deaths[task] < MAX_RANK_DEATHS:
            self._open.add(self._count)
            self._count = self.board.append([task], self._count)
        else:
            detail = f"{MAX_RANK_DEATHS} ranks that had it died"
            self.ledger.keep(task, failed_record(task, self.plan.recipes, detail))


class _Member:
    """A process that takes part, as rank 0 knows it. stuck: it lives, and does nothing."""

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
