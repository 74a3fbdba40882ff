"""Texts that the ranks of a group leave for each other in torch.distributed's store: with any backend, in bounded time.

In: one text of each rank. Out: the texts of all, or the ranks that are missing; all ranks learn the same.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from concurrent.futures import Future

    from torch.distributed import Store  # type: ignore[attr-defined]

READ_S = 2.0  # ranks that have all answered have this long after the timeout to read the answers; it takes moments
STORE_S = 1.0  # then the store itself does not answer: its process is stopped, or cannot be reached
SEEN_S = 1.0  # all ranks have this long to see how a round ended, before an error may end the process with the store
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.01, 0.2  # between two looks; a thousand ranks then look 5,000 times a second
NO_STORE = "the rank that keeps torch.distributed's store does not answer"


class RanksMissingError(RuntimeError):
    """Some ranks did not say in time what they decided."""


class Ending(msgspec.Struct, frozen=True):
    """How one step of a round ended. missing: the ranks that left no text in time. reason: the same as a sentence.

    asks_again: the missing rank had given up, and has begun another call: all meet in the next round.
    """

    missing: tuple[int, ...] = ()
    reason: str = ""
    asks_again: bool = False


class _AskedAgainError(Exception):
    """The round is over, and the work begins again in the next one."""


class RankExchange:
    """One rank's part in one round, in which all ranks of a group exchange texts.

    Only the store counts the rounds of a group. A rank joins the first round that is open. So a rank that left out a
    call, or came too late for one, meets the others at its next call. Each step of a round ends once: the first rank
    that knows how writes an `Ending`, which holds for all.
    """

    def __init__(self, store: Store, ranks: Sequence[int], rank: int, timeout_s: float) -> None:
        from hashlib import sha256

        self._live_store = store
        self._ranks, self._rank, self._timeout_s = ranks, rank, timeout_s
        self._group = f"fp8gate/{sha256(str(sorted(ranks)).encode()).hexdigest()[:16]}"
        self._answer_by_s = time.monotonic() + timeout_s
        self._read_by_s = self._answer_by_s + READ_S
        self._gave_up = threading.Event()
        self._present: Sequence[int] = ()  # the ranks that take part in this round to its end
        self._was_missed = False

    def run(self, work: Callable[[], None]) -> None:
        """Do `work`, which calls the other methods, in bounded time. It may have to begin again. Raises what it raises.

        No call of the store returns while the process that keeps the store is stopped. So the work is done on a thread.
        When its time is up the thread is left behind, and makes no further call. Raises RanksMissingError then.
        """
        from concurrent.futures import Future, wait

        future: Future[None] = Future()
        thread = threading.Thread(target=self._fulfil, args=(future, work), name="fp8gate agree", daemon=True)
        thread.start()
        try:
            ended, _ = wait([future], self._read_by_s + STORE_S - time.monotonic())
            if not ended:
                raise RanksMissingError(f"{NO_STORE} within {self._timeout_s:g} s")
            thread.join(SEEN_S)
            future.result()
        finally:
            self._gave_up.set()

    def join(self, text: str) -> dict[int, str]:
        """Answer in the first open round, and wait for the answers of all: rank -> text.

        Raises RanksMissingError if a rank does not answer in time, or if the store is lost.
        """
        with _lost_store():
            number = int(self._store.compare_set(f"{self._group}/round", "", "0"))
            while (ending := self._answer(number, text)) is None:
                number += 1
            self._store.set(f"{self._group}/round", str(number))  # all rounds before this one have ended
            self._present = self._ranks
            self._require_all(ending)
            return self._texts("answer", self._ranks)

    def read_all(self, step: str, text: str, speakers: Sequence[int]) -> dict[int, str]:
        """The texts of the speakers in the next step: rank -> text. `text` is this rank's, if it is a speaker.

        All ranks call this. Raises RanksMissingError if a speaker leaves no text in time, or if the store is lost.
        """
        with _lost_store():
            if self._rank in speakers:
                self._store.set(self._key(step, self._rank), text)
            self._require_all(self._end(step, speakers, self._read_by_s))
            return self._texts(step, speakers)

    def finish(self) -> None:
        """Wait until all ranks have read everything. Raises RanksMissingError if one does not, or the store is lost."""
        with _lost_store():
            self._store.set(self._key("read", self._rank), "")
            self._require_all(self._end("read", self._ranks, self._read_by_s))

    def _fulfil(self, future: Future[None], work: Callable[[], None]) -> None:
        try:
            while not self._is_done(work):
                pass
            future.set_result(None)
        except BaseException as error:  # the thread that waits for the future raises it
            future.set_exception(error)
        with contextlib.suppress(RuntimeError):  # the store may be gone already, with the rank that kept it
            self._see_others_off()

    def _is_done(self, work: Callable[[], None]) -> bool:
        """Do the work. False if it has to begin again."""
        try:
            work()
        except _AskedAgainError:
            return False
        return True

    def _see_others_off(self) -> None:
        """Wait until the ranks that are present know how the round ended: the store may be in this rank's process."""
        if self._present:
            self._store.set(self._key("seen", self._rank), "")
            self._end("seen", self._present, time.monotonic() + SEEN_S)

    @property
    def _store(self) -> Store:
        if self._gave_up.is_set():
            raise RanksMissingError("this rank gave up")  # nobody hears it: it ends the thread
        return self._live_store

    def _answer(self, number: int, text: str) -> Ending | None:
        """How the first step of this round ended. None if the round is not for this call: then the next one may be.

        An earlier call of this rank that gave up may have left an answer. Another text must not replace it, as some
        ranks may have read it.
        """
        self._round = f"{self._group}/{number}"
        ending = self._known_ending("answer")
        if ending is None:
            if self._store.compare_set(self._key("answer", self._rank), "", text) == text.encode():
                ending = self._end("answer", self._ranks, self._answer_by_s)
                return None if self._is_missed(ending) else ending
            ending = self._write_ending("answer", Ending((self._rank,), asks_again=True))
        is_open = not self._is_missed(ending) and not ending.missing
        return ending if is_open and self._takes_up(text) else None

    def _is_missed(self, ending: Ending) -> bool:
        self._was_missed = self._was_missed or self._rank in ending.missing
        return self._rank in ending.missing

    def _takes_up(self, text: str) -> bool:
        """Whether this call goes on where an earlier call of this rank gave up, after it had answered the same.

        If that call had answered otherwise, the others need no longer wait for this rank to read their answers.
        """
        if self._known_ending("read") or self._store.check([self._key("read", self._rank)]):
            return False
        if self._store.get(self._key("answer", self._rank)) == text.encode():
            return True
        self._write_ending("read", Ending((self._rank,), asks_again=True))
        return False

    def _texts(self, step: str, speakers: Sequence[int]) -> dict[int, str]:
        texts = self._store.multi_get([self._key(step, rank) for rank in speakers])
        return {rank: text.decode() for rank, text in zip(speakers, texts, strict=True)}

    def _require_all(self, ending: Ending) -> None:
        if ending.asks_again:
            raise _AskedAgainError
        if ending.missing:
            self._present = [rank for rank in self._ranks if rank not in ending.missing]
            missed = "; earlier, others gave up waiting for this rank" if self._was_missed else ""
            raise RanksMissingError(ending.reason + missed)

    def _end(self, step: str, speakers: Sequence[int], by_s: float) -> Ending:
        """Wait until all speakers have left a text, or for the time that is left, and say how the step ended.

        The last speaker writes that all are there; a rank whose time is up writes who is not. Waiting is looking again
        and again: not every kind of store keeps to the timeout of its own `wait`.
        """
        if self._store.check([self._key(step, rank) for rank in speakers]):
            return self._write_ending(step, Ending())
        pause_s = FIRST_PAUSE_S
        while (ending := self._known_ending(step)) is None:
            if time.monotonic() > by_s:
                return self._write_ending(step, self._ending_now(step, speakers))
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        return ending

    def _ending_now(self, step: str, speakers: Sequence[int]) -> Ending:
        """Who is missing now. Perhaps nobody: the last one may have come just now, or ended before it could say so."""
        missing = tuple(rank for rank in speakers if not self._store.check([self._key(step, rank)]))
        if not missing:
            return Ending()
        if step == "answer":
            return Ending(missing, f"rank {listed(missing)} did not answer within {self._timeout_s:g} s")
        limit = f"{self._timeout_s + READ_S:g} s"
        return Ending(missing, f"rank {listed(missing)} answered, but did not read the other answers within {limit}")

    def _known_ending(self, step: str) -> Ending | None:
        key = f"{self._round}/{step}"
        return _ending_from(self._store.get(key)) if self._store.check([key]) else None

    def _write_ending(self, step: str, ending: Ending) -> Ending:
        """The ending that holds: this one, or the one that another rank has written before."""
        text = msgspec.json.encode(ending).decode()
        return _ending_from(self._store.compare_set(f"{self._round}/{step}", "", text))

    def _key(self, step: str, rank: int) -> str:
        return f"{self._round}/{step}/{rank}"


def listed(ranks: Sequence[int]) -> str:
    """Ranks as they are written in an error: "0, 2"."""
    return ", ".join(map(str, ranks))


@contextlib.contextmanager
def _lost_store() -> Iterator[None]:
    """What the store raises, as an error that says so."""
    try:
        yield
    except RanksMissingError:
        raise
    except RuntimeError as error:
        raise RanksMissingError(f"{NO_STORE}: {error}") from error


def _ending_from(text: bytes) -> Ending:
    return msgspec.json.decode(text, type=Ending)
