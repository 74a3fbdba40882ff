"""How a sweep's tasks go to many ranks, and what becomes of those of a rank that dies.

The store is torch's own, in this process. The tests move the ranks, each over a `RankStore` of its own.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from samples import SETUP, point_record
from torch.distributed import HashStore

from fp8gate.calibrate.points.point_record import Stages
from fp8gate.calibrate.points.task_queue import Task
from fp8gate.calibrate.ranks.collector import Collector, RankLimits
from fp8gate.calibrate.ranks.rank_queue import RankLedger, RankTaskQueue, heartbeat
from fp8gate.calibrate.ranks.rank_store import Message, RanksError, RankStore
from fp8gate.calibrate.sweep.sweep_tasks import SweepTasks
from fp8gate.filter.contract.errors import InputError
from fp8gate.filter.contract.shapes import LinearShape

SHAPES = [LinearShape(16, 16, n) for n in (16, 32, 48)]
A, B, C = TASKS = [Task(shape) for shape in SHAPES]
SWEEP = SweepTasks(setup=SETUP, recipes=("tensorwise",), seed=3, tasks=tuple(TASKS))
MAX_WAIT_S = 60.0  # for anything: it only takes so long where it fails
SOON_S = 20.0  # less than the other limits of a collector
SOON_DEAD = RankLimits(dead_s=0.5)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Nobody waits long before looking again."""
    for module in ("collector", "rank_queue"):
        monkeypatch.setattr(f"fp8gate.calibrate.ranks.{module}.BEAT_S", 0.02)
    for module in ("collector", "rank_queue", "rank_store"):
        monkeypatch.setattr(f"fp8gate.calibrate.ranks.{module}.POLL_S", 0.005)


@pytest.fixture
def shared():
    """What torchrun's store is in production."""
    return HashStore()


@pytest.fixture
def leader(shared):
    """Rank 0's store. It ends the sweep after a while, so that a test fails rather than waits for ever."""
    store = RankStore.open(shared)
    limit = threading.Timer(MAX_WAIT_S, store.end, ["the test took too long"])
    limit.daemon = True
    limit.start()
    yield store
    limit.cancel()


@pytest.fixture
def join(shared, leader):
    """Another rank's store; rank 0 has let it in. over: what it takes for the shared store."""

    def join_as(rank, *, over=None):
        with ThreadPoolExecutor(1) as pool:
            joining = pool.submit(RankStore.join, over or shared, rank)
            wait_until(lambda: leader.admit([rank]) and joining.done())
        return joining.result()

    return join_as


@pytest.fixture
def collecting(leader):
    """Makes the collector of so many ranks. It starts where it is entered."""

    def make(world, limits=None):
        leader.publish(SWEEP)
        return Collector(leader, world, SWEEP, Notes(), limits)

    return make


class Notes:
    """A ledger that notes everything."""

    def __init__(self):
        self.kept, self.records, self.refused, self.said = [], [], [], []

    def keep(self, task, record):
        self.kept.append(task)
        self.records.append(record)

    def refuse(self, task, error):
        self.refused.append((task, error))

    def say(self, message):
        self.said.append(message)


class Rank:
    """A rank that the test moves: it lives until told otherwise, and measures what it takes at once."""

    def __init__(self, store, own=()):
        self.store, self.queue = store, RankTaskQueue(own, store)
        self.ledger = RankLedger(store, self.queue)
        self.come_alive()

    def come_alive(self):
        self.life = heartbeat(self.store)
        self.life.__enter__()

    def take(self):
        return self.queue.next()

    def finish(self, task):
        self.ledger.keep(task, record_of(task))

    def measure_all(self):
        while self.queue.wait():
            self.finish(self.queue.next())

    def leave(self, **fields):
        self.store.post(Message(left=True, **fields))
        self.die()

    def die(self):
        self.life.__exit__(None, None, None)


class DyingStore:
    """The shared store as a process sees it that dies as soon as it has taken a number."""

    def __init__(self, shared):
        self.shared, self.has_taken = shared, False

    def add(self, key, amount):
        self.has_taken = True
        return self.shared.add(key, amount)

    def set(self, key, value):
        if self.has_taken:
            raise RuntimeError("this process is dead")
        self.shared.set(key, value)

    def get(self, key):
        return self.shared.get(key)

    def check(self, keys):
        return self.shared.check(keys)


def record_of(task):
    shape = task.shape
    return point_record((shape.m, shape.k, shape.n), repeat=task.repeat)


def wait_until(condition):
    give_up_at = time.monotonic() + MAX_WAIT_S
    while not condition():
        assert time.monotonic() < give_up_at
        time.sleep(0.005)


def in_parallel(*calls):
    """Run the calls at once, and wait for all."""
    with ThreadPoolExecutor(len(calls)) as pool:
        for running in [pool.submit(call) for call in calls]:
            running.result(MAX_WAIT_S)


def assert_each_kept_once(collector):
    assert sorted(collector.ledger.kept, key=lambda task: task.shape) == TASKS


# The store.


def test_each_task_is_taken_once_by_whoever_comes_first(leader, join):
    stores = [join(1), join(2)]
    leader.publish(SWEEP)
    assert [stores[i].take() for i in (0, 1, 0, 1)] == [(0, A), (1, B), (2, C), None]
    assert [leader.owner(number) for number in range(3)] == [stores[0].me, stores[1].me, stores[0].me]


def test_who_came_too_early_gets_the_task_that_comes_later(leader, join):
    first, second = join(1), join(2)
    leader.publish(SWEEP)
    for _ in TASKS:
        first.take()
    assert second.take() is None
    leader.append([A], 3)
    assert first.take() is None  # its turn is after that of the second
    assert second.take() == (3, A)


def test_every_rank_reads_what_is_to_be_measured_but_not_the_tasks(leader, join):
    leader.publish(SWEEP)
    tasks = join(2).published()
    assert (tasks.setup, tasks.recipes, tasks.seed, tasks.tasks) == (SETUP, ("tensorwise",), 3, ())


def test_a_sweep_that_is_never_published_is_an_error(join, monkeypatch):
    store = join(1)
    monkeypatch.setattr("fp8gate.calibrate.ranks.rank_store.TASKS_S", 0.05)
    with pytest.raises(RanksError, match="rank 0 has not said within 0 s what to measure"):
        store.published()


def test_a_sweep_that_ended_before_it_was_published_says_why(leader, join):
    leader.end("no point to measure")
    with pytest.raises(InputError, match="no point to measure"):
        join(1).published()


def test_a_store_that_is_gone_is_an_error():
    class Gone:
        def check(self, keys):
            raise RuntimeError("Connection reset by peer")

    with pytest.raises(RanksError, match="Connection reset"):
        RankStore.open(Gone()).has_ended()


def test_only_the_first_end_counts(leader, join):
    leader.end("mixed devices")
    leader.end()
    with pytest.raises(InputError, match="mixed devices"):
        join(1).require_no_error()


def test_a_store_that_does_not_answer_is_noticed():
    class Frozen:
        def __init__(self):
            self.asked, self.answers = threading.Event(), threading.Event()

        def check(self, keys):
            self.asked.set()
            return self.answers.wait(MAX_WAIT_S) and False

    frozen = Frozen()
    store = RankStore.open(frozen)
    assert store.waiting_s() == 0.0
    thread = threading.Thread(target=store.has_ended)
    thread.start()
    frozen.asked.wait()
    wait_until(lambda: store.waiting_s() > 0.05)
    frozen.answers.set()
    thread.join()
    assert store.waiting_s() == 0.0


def test_a_later_session_over_the_same_store_knows_nothing_of_an_earlier_one(shared, leader, join):
    leader.publish(SWEEP)
    join(1).take()
    leader.end("mixed devices")
    later = RankStore.open(shared)
    later.publish(SWEEP)
    assert not later.has_ended()
    assert later.take() == (0, A)


def test_rank_0_lets_in_the_newest_process_of_each_rank(shared, join):
    earlier = join(1)
    later, joined = RankStore.open(shared), []
    threads = [threading.Thread(target=lambda r=rank: joined.append(RankStore.join(shared, r))) for rank in (1, 2)]
    [thread.start() for thread in threads]
    wait_until(lambda: later.admit([1, 2]) and len(joined) == 2)
    later.publish(SWEEP)
    assert {store.published().seed for store in joined} == {3}
    assert len({store.me for store in (earlier, *joined)}) == 3


# What a rank takes.


def test_each_device_repeats_what_it_has_not():
    tasks = SweepTasks(
        setup=SETUP,
        recipes=("rowwise",),
        seed=0,
        tasks=(),
        repeats=tuple(SHAPES),
        repeated=((SHAPES[0], "a GPU-1"), (SHAPES[1], "a GPU-2")),
    )
    assert [task.shape for task in tasks.own_tasks("a GPU-1")] == SHAPES[1:]
    assert [task.shape for task in tasks.own_tasks("b GPU-3")] == SHAPES
    assert all(task.repeat for task in tasks.own_tasks("b GPU-3"))


def test_a_rank_measures_its_own_first_and_then_what_is_dealt_out(leader):
    leader.publish(SWEEP)
    own = Task(SHAPES[2], repeat=True)
    queue = RankTaskQueue([own], leader)
    assert [queue.next() for _ in range(5)] == [own, A, B, C, None]
    assert queue.numbers == {A: 0, B: 1, C: 2}


def test_a_repeat_taken_by_the_process_that_measured_it_goes_to_another(leader):
    leader.publish(SweepTasks(setup=SETUP, recipes=("rowwise",), seed=0, tasks=(Task(SHAPES[0], repeat=True), B)))
    queue = RankTaskQueue([], leader)
    assert queue.next({SHAPES[0]}) is None
    assert queue.next({SHAPES[0]}) == B
    assert queue.next() == Task(SHAPES[0], repeat=True)


def test_after_the_end_nothing_is_taken(leader):
    leader.publish(SWEEP)
    leader.end()
    assert RankTaskQueue([], leader).next() is None


def test_waiting_ends_with_the_sweep(leader, join):
    leader.publish(SWEEP)
    for _ in TASKS:
        leader.take()
    queue = RankTaskQueue([], join(1))
    threading.Timer(0.1, leader.end).start()
    assert not queue.wait()
    assert leader.has_ended()


def test_waiting_ends_when_the_time_is_up(leader):
    leader.publish(SweepTasks(setup=SETUP, recipes=("rowwise",), seed=0, tasks=()))
    start = time.monotonic()
    assert not RankTaskQueue([], leader).wait(start + 0.05)
    assert time.monotonic() >= start + 0.05
    assert not leader.has_ended()


def test_a_task_is_not_begun_when_the_time_is_up(leader):
    leader.publish(SWEEP)
    queue = RankTaskQueue([], leader)
    assert queue.wait(time.monotonic() + MAX_WAIT_S)
    assert not queue.wait(time.monotonic())


# The collector.


def test_all_that_ranks_measure_is_kept_once(leader, join, collecting):
    with collecting(2) as collector:
        ranks = [Rank(store, [Task(SHAPES[0], repeat=True)]) for store in (leader, join(1))]
        in_parallel(*(rank.measure_all for rank in ranks))
        for i, rank in enumerate(ranks):
            rank.leave(retried=1, discarded=(Stages(timing_s=2.0),), troubles={f"GPU-{i}": "hot"})
    kept = collector.ledger.kept
    assert sorted((t for t in kept if not t.repeat), key=lambda t: t.shape) == TASKS
    assert [t.shape for t in kept if t.repeat] == [SHAPES[0]] * 2
    assert (collector.remaining, collector.retried, collector.lost) == (0, 2, {})
    assert collector.discarded == [Stages(timing_s=2.0)] * 2
    assert collector.troubles == {"GPU-0": "hot", "GPU-1": "hot"}


def test_what_a_dead_rank_had_is_dealt_out_again(leader, join, collecting):
    with collecting(2, SOON_DEAD) as collector:
        doomed, other = Rank(join(1)), Rank(leader)
        assert [doomed.take(), doomed.take()] == [A, B]
        doomed.finish(A)
        doomed.die()
        other.measure_all()
        other.leave()
    assert_each_kept_once(collector)
    assert collector.lost == {1: "has not been heard of for 0 s"}
    assert collector.ledger.said == ["rank 1 has not been heard of for 0 s: its points go to others"]


def test_also_what_it_would_have_been_dealt_next(leader, join, collecting):
    """It died holding a number that no task had yet: the first that is dealt out again gets it."""
    with collecting(3, SOON_DEAD) as collector:
        early, late, other = Rank(join(1)), Rank(join(2)), Rank(leader)
        assert [late.take() for _ in TASKS] == TASKS
        assert early.take() is None
        early.die()
        wait_until(lambda: 1 in collector.lost)
        late.die()
        other.measure_all()
        other.leave()
    assert_each_kept_once(collector)


def test_also_what_it_took_without_saying_so(shared, leader, join, collecting):
    with collecting(2, SOON_DEAD) as collector:
        doomed, other = Rank(join(1, over=DyingStore(shared))), Rank(leader)
        with pytest.raises(RanksError, match="this process is dead"):
            doomed.take()
        assert (leader.taken(), leader.owner(0)) == (1, None)
        doomed.die()
        other.measure_all()
        other.leave()
    assert_each_kept_once(collector)


def test_a_rank_that_was_only_slow_counts_for_nothing(leader, join, collecting):
    with collecting(2, SOON_DEAD) as collector:
        slow, other = Rank(join(1)), Rank(leader)
        assert slow.take() == A
        slow.die()
        other.measure_all()
        slow.finish(A)
        other.leave()
    assert_each_kept_once(collector)


def test_a_rank_that_gave_up_says_why_and_others_go_on(leader, join, collecting):
    with collecting(2) as collector:
        broken, other = Rank(join(1)), Rank(leader)
        assert broken.take() == A
        broken.leave(lost="lost its device, node7 GPU-9: an illegal memory access")
        other.measure_all()
        other.leave()
    assert collector.lost == {1: "lost its device, node7 GPU-9: an illegal memory access"}
    assert collector.remaining == 0
    assert_each_kept_once(collector)


def test_a_rank_that_never_joins_is_not_waited_for_long(leader, collecting):
    with collecting(2, RankLimits(join_s=0.2)) as collector:
        only = Rank(leader)
        only.measure_all()
        only.leave()
    assert collector.lost == {1: "did not join within 0 s"}
    assert_each_kept_once(collector)


def test_one_that_joins_late_measures_its_own_share(leader, join, collecting):
    """The sweep does not end before all have come, or their time is up: the late one has repeats to take."""
    with collecting(2) as collector:
        early = Rank(leader)
        for _ in TASKS:
            early.finish(early.take())
        wait_until(lambda: collector.remaining == 0)
        time.sleep(0.1)  # the collector looks around several times
        assert not leader.has_ended()
        late = Rank(join(1), [Task(SHAPES[0], repeat=True)])
        for rank in (late, early):
            rank.measure_all()
            rank.leave()
    assert collector.lost == {}
    assert collector.ledger.kept == [*TASKS, Task(SHAPES[0], repeat=True)]


def test_a_rank_that_comes_back_after_a_pause_counts_again(leader, join, collecting):
    with collecting(2, SOON_DEAD) as collector:
        paused, other = Rank(join(1)), Rank(leader)
        assert paused.take() == A
        paused.die()
        wait_until(lambda: collector.lost)
        paused.come_alive()
        wait_until(lambda: not collector.lost)
        paused.finish(paused.take())
        other.measure_all()
        paused.leave()
        other.leave()
    assert_each_kept_once(collector)
    assert collector.lost == {}


def test_a_rank_that_lives_and_does_nothing_is_given_up(leader, join, collecting):
    with collecting(2, RankLimits(stuck_s=0.3)) as collector:
        stuck, other = Rank(join(1)), Rank(leader)
        assert stuck.take() == A
        other.measure_all()
        other.leave()
    stuck.die()
    assert_each_kept_once(collector)
    assert collector.lost == {1: "has measured nothing for 0 s"}


def test_a_task_that_ranks_die_of_is_not_dealt_out_for_ever(leader, join, collecting, monkeypatch):
    monkeypatch.setattr("fp8gate.calibrate.ranks.collector.MAX_RANK_DEATHS", 2)
    with collecting(3, SOON_DEAD) as collector:
        first, second, other = Rank(join(1)), Rank(join(2)), Rank(leader)
        assert first.take() == A
        first.die()
        wait_until(lambda: 1 in collector.lost)
        other.finish(other.take())
        other.finish(other.take())
        wait_until(lambda: second.take() == A)
        second.die()
        wait_until(lambda: 2 in collector.lost)
        other.measure_all()
        other.leave()
    assert_each_kept_once(collector)
    failed = [record for record in collector.ledger.records if record.arms["bf16"].status == "failed"]
    assert [record.shape for record in failed] == [SHAPES[0]]
    assert failed[0].arms["tensorwise"].detail == "2 ranks that had it died"


def test_a_process_that_takes_a_ranks_place_is_heard_from_its_start(leader, join, collecting):
    """What the earlier process had is free at once, though it is not yet taken for dead."""
    with collecting(2) as collector:
        before, other = Rank(join(1)), Rank(leader)
        before.finish(before.take())
        assert before.take() == B
        wait_until(lambda: A in collector.ledger.kept)
        before.die()
        after = Rank(join(1))
        after.measure_all()
        after.leave()
        other.leave()
    assert_each_kept_once(collector)
    assert (collector.lost, collector.ledger.said) == ({}, [])


def test_when_everybody_leaves_early_tasks_remain(leader, collecting):
    with collecting(1) as collector:
        rank = Rank(leader)
        rank.finish(rank.take())
        rank.leave()
    assert (collector.remaining, collector.ledger.kept) == (2, [A])


def test_a_rank_of_another_kind_ends_the_sweep_for_all(leader, join, collecting):
    with collecting(2) as collector:
        rank, other = Rank(leader), join(1)
        other.post(Message(refused="rank 1 differs: device.name", left=True))
        wait_until(leader.has_ended)
        assert not rank.queue.wait()
        rank.leave()
    assert collector.remaining == 3
    with pytest.raises(InputError, match=r"device\.name"):
        other.require_no_error()


def test_a_control_that_is_off_is_refused_and_not_dealt_out_again(leader, collecting):
    with collecting(1) as collector:
        rank = Rank(leader)
        rank.ledger.refuse(rank.take(), 0.03)
        rank.measure_all()
        rank.leave()
    assert collector.ledger.refused == [(A, 0.03)]
    assert collector.ledger.kept == [B, C]
    assert collector.remaining == 0


def test_messages_are_said_with_their_rank(leader, join, collecting):
    with collecting(2) as collector:
        ranks = [Rank(store) for store in (leader, join(1))]
        ranks[1].ledger.say("(16, 16, 16): hot")
        ranks[0].measure_all()
        [rank.leave() for rank in ranks]
    assert collector.ledger.said == ["rank 1: (16, 16, 16): hot"]


def test_what_cannot_be_kept_is_an_error_everywhere(leader, join, collecting, monkeypatch):
    def keep_nothing(notes, task, record):
        raise OSError("No space left on device")

    monkeypatch.setattr(Notes, "keep", keep_nothing)
    other = join(1)

    def measure():
        with collecting(1):
            rank = Rank(leader)
            rank.measure_all()
            rank.leave()

    with pytest.raises(OSError, match="No space"):
        measure()
    with pytest.raises(InputError, match="No space"):
        other.require_no_error()


def test_if_rank_0_ends_the_others_do(join, collecting):
    def measure():
        with collecting(2, RankLimits(ending_s=0.2)):
            assert other.take() == A
            raise KeyboardInterrupt

    other = Rank(join(1))
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        measure()
    assert time.monotonic() < start + SOON_S  # though the other has not left
    assert other.take() is None
    with pytest.raises(InputError, match="rank 0 has ended: KeyboardInterrupt"):
        other.store.require_no_error()
    other.die()
