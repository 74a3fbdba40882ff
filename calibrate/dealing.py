"""Deal the points of a sweep out to many ranks.

Rank 0 publishes what is to be measured; every rank takes one task after the other, as it gets free, and posts what it
measured; rank 0 collects that. No step needs all ranks: one that is slow takes fewer tasks, and the tasks of one that
dies are dealt out again. Nothing here waits without a limit.

In: a board. Out: on rank 0, every record to a `Ledger`.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Container, Iterable, Iterator

from fp8gate.calibrate.board import POLL_S, Board, Message, RanksError
from fp8gate.calibrate.records import PointRecord, Stages
from fp8gate.calibrate.run import Ledger
from fp8gate.calibrate.schedule import Schedule, Task
from fp8gate.filter.shapes import LinearShape

BEAT_S, DEAD_S = 2.0, 30.0  # a rank shows that it lives so often; silent for so long, it is dead
JOIN_S = 300.0  # for a rank to join, while others measure


class RankSchedule(Schedule):
    """This rank's own tasks, and those that it takes from the board."""

    def __init__(self, own: Iterable[Task], board: Board) -> None:
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


class Posts:
    """The ledger of a rank: everything goes to rank 0."""

    def __init__(self, board: Board, schedule: RankSchedule) -> None:
        self._board, self._schedule = board, schedule

    def keep(self, task: Task, record: PointRecord) -> None:
        self._board.post(Message(task=self._schedule.numbers.get(task), record=record))

    def refuse(self, task: Task, error: float) -> None:
        self._board.post(Message(task=self._schedule.numbers.get(task), off=(task.shape, error)))

    def say(self, message: str) -> None:
        self._board.post(Message(say=message))


@contextlib.contextmanager
def heartbeat(board: Board) -> Iterator[None]:
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

    def __init__(self, board: Board, world: int, tasks: int, ledger: Ledger) -> None:
        self.board, self.ledger = board, ledger
        self.retried = 0
        self.discarded: list[Stages] = []
        self.troubles: dict[str, str] = {}
        self.lost: dict[int, str] = {}  # ranks that died or gave up, and why
        self._count = tasks
        self._open = set(range(tasks))
        self._unowned: dict[int, float] = {}  # since when
        self._members = {rank: _Member(time.monotonic()) for rank in range(world)}
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

    def _work(self) -> None:
        try:
            checked_at = 0.0
            while any(member.is_here for member in self._members.values()):
                heard = [self._hear(rank, member) for rank, member in self._members.items() if member.is_here]
                if not self._open:
                    self.board.end()
                if time.monotonic() > checked_at + BEAT_S:
                    self._find_dead()
                    self._deal_again()
                    checked_at = time.monotonic()
                if not any(heard):
                    time.sleep(POLL_S)
            self.board.end()
        except BaseException as error:  # a full disk, say: nobody would hear of it on this thread
            self._error = error
            with contextlib.suppress(RanksError):
                self.board.end(f"rank 0 cannot keep what was measured: {error}")

    def _hear(self, rank: int, member: _Member) -> bool:
        message = self.board.message(rank, member.heard)
        if message is None:
            return False
        member.heard += 1
        if message.refused:
            self.board.end(message.refused)
        if message.say:
            self.ledger.say(f"rank {rank}: {message.say}")
        if message.record:
            self._take(message, message.record)
        if message.off:
            shape, error = message.off
            self.ledger.refuse(Task(shape), error)
            self._open.discard(-1 if message.task is None else message.task)
        if message.left:
            member.is_here = False
            if message.lost:
                self.lost[rank] = message.lost
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

    def _find_dead(self) -> None:
        now = time.monotonic()
        join_s = JOIN_S if self._open else DEAD_S
        for rank, member in self._members.items():
            if not member.is_here:
                continue
            beats = self.board.beats(rank)
            if beats != member.beats:
                member.beats, member.seen_at = beats, now
            elif beats is None and now > member.seen_at + join_s:
                self._give_up(rank, f"did not join within {join_s:.0f} s")
            elif beats is not None and now > member.seen_at + DEAD_S:
                self._give_up(rank, f"has not been heard of for {DEAD_S:.0f} s")

    def _give_up(self, rank: int, why: str) -> None:
        self._members[rank].is_here = False
        self.lost[rank] = why
        self.ledger.say(f"rank {rank} {why}: its points go to others")

    def _deal_again(self) -> None:
        """What ranks took that are not here any more gets new numbers at the end.

        A rank may also have died between taking a number and saying so.
        """
        now, taken = time.monotonic(), self.board.taken()
        for number in sorted(number for number in self._open if number < taken):
            owner = self.board.owner(number)
            since = self._unowned.setdefault(number, now) if owner is None else now
            if now > since + DEAD_S or (owner is not None and not self._members[owner].is_here):
                self._open.remove(number)
                self._open.add(self._count)
                self._count = self.board.append([self.board.task(number)], self._count)


class _Member:
    """A rank as rank 0 knows it."""

    def __init__(self, seen_at: float) -> None:
        self.is_here = True
        self.heard = 0  # messages
        self.beats: bytes | None = None
        self.seen_at = seen_at
