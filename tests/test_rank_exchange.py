"""Rounds of questions and answers between ranks, here threads that share a store; one store stops answering."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from fp8gate.filter.ranks import rank_exchange
from fp8gate.filter.ranks.rank_exchange import READ_S, SEEN_S, STORE_S, RankExchange, RanksMissingError

RANKS = (0, 1, 2)
PATIENT_S = 30.0  # the limit for what must happen
IMPATIENT_S = 0.2  # the timeout of ranks that wait for one that does not answer


@pytest.fixture
def store():
    return dist.HashStore()


@pytest.fixture
def quick(monkeypatch):
    """Ranks that wait in vain do not wait for long."""
    monkeypatch.setattr(rank_exchange, "READ_S", 0.2)
    monkeypatch.setattr(rank_exchange, "SEEN_S", 0.2)
    monkeypatch.setattr(rank_exchange, "STORE_S", 0.2)


def ask(store, rank, text="same", timeout_s=PATIENT_S, ranks=RANKS):
    """One call of one rank: the answers of all, or the error's message."""
    exchange = RankExchange(store, ranks, rank, timeout_s)
    answers = {}

    def work():
        answers.update(exchange.join(text))
        exchange.finish()

    try:
        exchange.run(work)
    except RanksMissingError as error:
        return str(error)
    return answers


def together(*calls: Callable[[], object]) -> list[object]:
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def all_ask(store, *texts, **options):
    return together(
        *(lambda rank=rank, text=text: ask(store, rank, text, **options) for rank, text in enumerate(texts))
    )


def group_of(store, ranks=RANKS):
    return RankExchange(store, ranks, 0, PATIENT_S)._group


def wait_for(store, *keys):
    until_s = time.monotonic() + PATIENT_S
    while not store.check([f"{group_of(store)}/{key}" for key in keys]):
        assert time.monotonic() < until_s
        time.sleep(0.01)


class StoppingStore:
    """A store whose process is stopped after some calls: from then on no call returns until it goes on."""

    def __init__(self, store, calls):
        self._store, self._left, self.goes_on = store, calls, threading.Event()
        self.calls = 0

    def __getattr__(self, name):
        self.calls += 1
        if self.calls > self._left:
            assert self.goes_on.wait(PATIENT_S)
        return getattr(self._store, name)


def test_every_rank_learns_every_answer(store):
    for texts in (("a", "b", "c"), ("a", "a", "a"), ("d", "e", "f")):
        assert all_ask(store, *texts) == [dict(enumerate(texts))] * 3


def test_groups_do_not_hear_each_other(store):
    calls = [lambda r=r, g=g: ask(store, r, str(g), ranks=g) for g in ((0, 1), (1, 2)) for r in g]
    assert together(*calls) == [dict.fromkeys(g, str(g)) for g in ((0, 1), (1, 2)) for _ in g]


def test_a_rank_that_does_not_answer_is_named_by_all(store):
    expected = f"rank 2 did not answer within {IMPATIENT_S:g} s"
    assert all_ask(store, "same", "same", timeout_s=IMPATIENT_S) == [expected] * 2


def test_the_shortest_timeout_ends_the_round_for_all(store):
    """The rank that gives up ends, and so does its store, perhaps. The others need not wait for that."""
    start_s = time.monotonic()
    calls = [lambda: ask(store, 0, timeout_s=PATIENT_S), lambda: ask(store, 1, timeout_s=IMPATIENT_S)]
    assert together(*calls) == [f"rank 2 did not answer within {IMPATIENT_S:g} s"] * 2
    assert time.monotonic() - start_s < PATIENT_S / 2


def test_a_rank_that_left_out_a_call_meets_the_others_at_the_next(store):
    for _ in range(2):
        assert "rank 2 did not answer" in all_ask(store, "a", "a", timeout_s=IMPATIENT_S)[0]
    assert all_ask(store, "b", "b", "c") == [{0: "b", 1: "b", 2: "c"}] * 3


def test_a_call_of_another_number_is_heard_if_it_comes_in_time(store):
    """Rank 2 left out its first call, and its second meets the first of the others."""
    assert all_ask(store, "a", "a", "b") == [{0: "a", 1: "a", 2: "b"}] * 3
    assert "rank 2 did not answer" in all_ask(store, "b", "b", timeout_s=IMPATIENT_S)[0]
    assert all_ask(store, "c", "c", "c") == [dict.fromkeys(RANKS, "c")] * 3


def test_a_late_rank_does_not_hear_those_that_gave_up(store):
    all_ask(store, "same", "same", timeout_s=IMPATIENT_S)
    late = ask(store, 2, timeout_s=IMPATIENT_S)
    assert late == f"rank 0, 1 did not answer within {IMPATIENT_S:g} s; earlier, others gave up waiting for this rank"
    assert all_ask(store, "a", "a", "a") == [dict.fromkeys(RANKS, "a")] * 3


def test_an_answer_just_after_the_timeout_still_counts(store, monkeypatch):
    """It arrives when the others have begun to count who is missing. No error names nobody."""
    counting, arrived = threading.Event(), threading.Event()
    count = RankExchange._ending_now

    def count_late(exchange, *args):
        counting.set()
        assert arrived.wait(PATIENT_S)
        return count(exchange, *args)

    def third():
        assert counting.wait(PATIENT_S)
        store.set(f"{group_of(store)}/0/answer/2", "same")
        arrived.set()
        return ask(store, 2)

    monkeypatch.setattr(RankExchange, "_ending_now", count_late)
    calls = [lambda rank=rank: ask(store, rank, timeout_s=IMPATIENT_S) for rank in (0, 1)]
    assert together(*calls, third) == [dict.fromkeys(RANKS, "same")] * 3


@pytest.mark.usefixtures("quick")
def test_a_rank_that_answers_and_does_not_read_is_named(store):
    silent = RankExchange(store, RANKS, 2, PATIENT_S)
    calls = [lambda rank=rank: ask(store, rank, timeout_s=IMPATIENT_S) for rank in (0, 1)]
    first, second, _ = together(*calls, lambda: silent.run(lambda: silent.join("same") and None))
    assert first == second == "rank 2 answered, but did not read the other answers within 0.4 s"
    assert all_ask(store, "a", "a", "a") == [dict.fromkeys(RANKS, "a")] * 3


def test_the_limits_keep_the_promise_of_agree():
    """`agree` promises to end 4 seconds after the timeout at the latest."""
    assert READ_S + SEEN_S + STORE_S == 4.0


@pytest.mark.parametrize("calls", [0, 1, 2, 3, 4, 8])
@pytest.mark.usefixtures("quick")
def test_a_stopped_store_ends_the_waiting(store, calls):
    start_s = time.monotonic()
    stopping = StoppingStore(store, calls)
    expected = "the rank that keeps torch.distributed's store does not answer within 0.2 s"
    assert ask(stopping, 0, timeout_s=IMPATIENT_S) == expected
    assert IMPATIENT_S < time.monotonic() - start_s < IMPATIENT_S + 5.0


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_a_call_that_gave_up_asks_the_store_nothing_more(store):
    stopping = StoppingStore(store, 2)
    ask(stopping, 0, timeout_s=IMPATIENT_S)
    stopping.goes_on.set()
    for thread in threading.enumerate():
        if thread.name == "fp8gate agree":
            thread.join(PATIENT_S)
    assert stopping.calls == 3


@pytest.mark.parametrize("calls", range(9))
@pytest.mark.parametrize("text", ["same", "other"])
@pytest.mark.usefixtures("quick")
def test_after_a_stop_the_ranks_meet_again_and_hear_no_stale_answer(store, calls, text):
    """Whatever the stopped call had done, and whichever rank asks first: an error, or what the ranks ask with now."""
    stopping = StoppingStore(store, calls)
    ask(stopping, 0, timeout_s=IMPATIENT_S)
    stopping.goes_on.set()
    now = {0: text, 1: text, 2: "same"}
    outcomes = [answers for answers in all_ask(store, *now.values(), timeout_s=0.3) if not isinstance(answers, str)]
    assert outcomes in ([], [now] * 3)
    assert all_ask(store, "b", "b", "b") == [dict.fromkeys(RANKS, "b")] * 3


NEW = {0: "new", 1: "same", 2: "same"}


@pytest.mark.parametrize("left_by", [(0,), (0, 1), (0, 1, 2)])
def test_an_answer_left_behind_is_not_replaced(store, left_by):
    """Other ranks may have read it. Its rank ends the round, and all meet in the next."""
    for rank in left_by:
        store.set(f"{group_of(store)}/0/answer/{rank}", "old" if rank == 0 else "same")
    assert all_ask(store, *NEW.values()) == [NEW] * 3


def test_ranks_that_have_read_an_answer_left_behind_go_on_to_the_next_round(store):
    store.set(f"{group_of(store)}/0/answer/0", "old")
    others = [lambda rank=rank: ask(store, rank) for rank in (1, 2)]
    assert together(*others, lambda: (wait_for(store, "0/read/1", "0/read/2"), ask(store, 0, "new"))[1]) == [NEW] * 3


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_an_answer_left_behind_is_not_replaced_though_the_others_read_it_meanwhile(store, calls):
    """Rank 0 is about to look at the round, to answer, or to end it, when the others have read what it left there."""
    store.set(f"{group_of(store)}/0/answer/0", "old")
    stopping = StoppingStore(store, calls)
    others = [lambda rank=rank: ask(store, rank) for rank in (1, 2)]

    def let_it_go_on():
        wait_for(store, "0/read/1", "0/read/2")
        stopping.goes_on.set()

    assert together(lambda: ask(stopping, 0, "new"), *others, let_it_go_on) == [NEW] * 3 + [None]


@pytest.mark.usefixtures("quick")
def test_an_equal_answer_left_behind_counts_for_the_next_call(store):
    """The others have all answered and wait for this rank, which gave up before it read."""
    gave_up = RankExchange(store, RANKS, 0, PATIENT_S)
    others = [lambda rank=rank: ask(store, rank) for rank in (1, 2)]
    results = together(*others, lambda: (gave_up.run(lambda: gave_up.join("same") and None), ask(store, 0))[1])
    assert results == [dict.fromkeys(RANKS, "same")] * 3


@pytest.mark.parametrize("others", [(1, 2), (1,)], ids=["all", "one missing"])
def test_no_rank_ends_with_the_store_before_the_others_know(store, others):
    """The store lives in rank 0, which ends as soon as it knows. The others look at it less often than rank 0."""

    class MortalStore:
        is_alive = True

        def __getattr__(self, name):
            time.sleep(0.02)
            if not self.is_alive:
                raise RuntimeError("Connection reset by peer")
            return getattr(store, name)

    mortal = MortalStore()

    def until_the_end():
        answers = ask(store, 0, timeout_s=IMPATIENT_S)
        mortal.is_alive = False
        return answers

    first, *rest = together(until_the_end, *(lambda rank=rank: ask(mortal, rank) for rank in others))
    assert rest == [first] * len(others)


def test_a_lost_store_is_named():
    class LostStore:
        def __getattr__(self, name):
            raise RuntimeError("Connection reset by peer")

    expected = "the rank that keeps torch.distributed's store does not answer: Connection reset by peer"
    assert ask(LostStore(), 0) == expected


def test_an_error_of_the_work_itself_is_raised(store):
    def work():
        raise KeyError("broken")

    with pytest.raises(KeyError, match="broken"):
        RankExchange(store, RANKS, 0, PATIENT_S).run(work)


# --- ranks and a store that do as they please ------------------------------------------------------------------


class HesitatingStore:
    """A store some of whose calls take longer than ranks wait for an answer, before or after they take effect."""

    def __init__(self, store, chance):
        self._store, self._chance = store, chance

    def __getattr__(self, name):
        def call(*args):
            drawn = self._chance.random()
            time.sleep(self._chance.uniform(0.1, 0.5) if drawn < 0.03 else 0.0)
            result = getattr(self._store, name)(*args)
            time.sleep(self._chance.uniform(0.1, 0.5) if drawn > 0.97 else 0.0)
            return result

        return call


def some_calls(store, seed, rank):
    """What this rank asked with and heard, of a few calls: some left out, some late, some with little patience."""
    chance = random.Random(f"{seed} {rank}")
    heard = []
    for _ in range(3):
        time.sleep(chance.choice([0.0, 0.0, 0.05, 0.3]))
        text = f"{rank}: {chance.randrange(2)}"
        if chance.random() < 0.8:
            timeout_s = chance.choice([0.1, 0.3, 1.0])
            start_s = time.monotonic()
            heard.append((text, ask(HesitatingStore(store, chance), rank, text, timeout_s)))
            assert time.monotonic() - start_s < timeout_s + 5.0
    return heard


def one_story(seed):
    store = dist.HashStore()
    for heard in together(*(lambda rank=rank: some_calls(store, seed, rank) for rank in RANKS)):
        for text, answers in heard:
            assert isinstance(answers, str) or text in answers.values(), f"seed {seed}: asked with {text}"
    time.sleep(0.6)  # calls left behind take effect
    assert all_ask(store, "b", "b", "b") == [dict.fromkeys(RANKS, "b")] * 3, f"seed {seed}"


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_whatever_ranks_and_store_do_no_answer_is_stale_and_the_next_call_works():
    together(*(lambda seed=seed: one_story(seed) for seed in range(24)))
