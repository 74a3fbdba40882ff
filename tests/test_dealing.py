"""How a sweep's points are dealt out to many ranks, and what becomes of those of a rank that dies.

The store is torch's own, in this process; ranks are boards over it, moved by the tests.
"""

from __future__ import annotations

import threading
import time

import pytest
from samples import SETUP, point_record
from torch.distributed import HashStore

from fp8gate.calibrate.points.point_record import Stages
from fp8gate.calibrate.points.task_queue import Task
from fp8gate.calibrate.ranks import dealing
from fp8gate.calibrate.ranks import rank_store as board_module
from fp8gate.calibrate.ranks.dealing import Collector, RankLedger, RankTaskQueue, heartbeat
from fp8gate.calibrate.ranks.rank_store import Message, RanksError, RankStore, SweepTasks
from fp8gate.filter.contract.shapes import LinearShape

SHAPES = [LinearShape(16, 16, n) for n in (16, 32, 48)]
A, B, C = TASKS = [Task(shape) for shape in SHAPES]
PLAN = SweepTasks(setup=SETUP, recipes=("tensorwise",), seed=3, tasks=tuple(TASKS))
LIMIT_S = 20.0


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(dealing, "BEAT_S", 0.02)
    monkeypatch.setattr(dealing, "DEAD_S", 0.3)
    monkeypatch.setattr(dealing, "JOIN_S", 0.4)
    for module in (dealing, board_module):
        monkeypatch.setattr(module, "POLL_S", 0.005)


@pytest.fixture
def boards():
    """Those of three ranks, over one store."""
    store = HashStore()
    leader = RankStore.open(store)
    return [leader, *(RankStore(store, leader._session, f"process {rank}") for rank in (1, 2))]


def ask_to_join(board, rank):
    RankStore(board._store, "lobby", board.me)._set(f"join/{rank}", board.me)


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

    def __init__(self, board, own=()):
        self.board, self.schedule = board, RankTaskQueue(own, board)
        if board.me.startswith("process"):
            ask_to_join(board, int(board.me[-1]))
        self.posts = RankLedger(board, self.schedule)
        self.life = heartbeat(board)
        self.life.__enter__()

    def take(self):
        return self.schedule.next()

    def finish(self, task):
        self.posts.keep(task, record_of(task))

    def measure_all(self):
        while self.schedule.wait():
            self.finish(self.schedule.next())

    def leave(self, **fields):
        self.board.post(Message(left=True, **fields))
        self.die()

    def die(self):
        self.life.__exit__(None, None, None)


def record_of(task):
    shape = task.shape
    return point_record((shape.m, shape.k, shape.n), repeat=task.repeat)


@pytest.fixture
def collecting(boards):
    """Starts the collector for so many ranks; the test fails rather than waits for ever."""
    notes = Notes()
    limit = threading.Timer(LIMIT_S, boards[0].end, ["the test took too long"])
    limit.daemon = True
    limit.start()

    def start(world):
        boards[0].publish(PLAN)
        collector = Collector(boards[0], world, PLAN, notes)
        collector.notes = notes
        return collector

    yield start
    limit.cancel()


def wait_until(condition):
    give_up_at = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < give_up_at
        time.sleep(0.005)


def test_each_task_is_taken_once_by_whoever_comes_first(boards):
    boards[0].publish(PLAN)
    taken = [boards[rank].take() for rank in (1, 2, 1, 2)]
    assert taken == [(0, A), (1, B), (2, C), None]
    assert [boards[0].owner(number) for number in range(3)] == ["process 1", "process 2", "process 1"]


def test_who_came_too_early_gets_the_task_that_comes_later(boards):
    boards[0].publish(PLAN)
    for _ in TASKS:
        boards[1].take()
    assert boards[2].take() is None
    boards[0].append([A], 3)
    assert boards[1].take() is None  # its turn is after that of rank 2
    assert boards[2].take() == (3, A)


def test_every_rank_reads_the_plan_but_not_its_tasks(boards):
    boards[0].publish(PLAN)
    plan = boards[2].plan()
    assert (plan.setup, plan.recipes, plan.seed, plan.tasks) == (SETUP, ("tensorwise",), 3, ())


def test_a_plan_that_never_comes_is_an_error(boards, monkeypatch):
    monkeypatch.setattr(board_module, "PLAN_S", 0.05)
    with pytest.raises(RanksError, match="rank 0"):
        boards[1].plan()


def test_a_sweep_that_ended_before_the_plan_says_why(boards):
    boards[0].end("no point to measure")
    with pytest.raises(ValueError, match="no point to measure"):
        boards[1].plan()


def test_a_store_that_is_gone_is_an_error(boards):
    class Gone:
        def check(self, keys):
            raise RuntimeError("Connection reset by peer")

    with pytest.raises(RanksError, match="Connection reset"):
        RankStore.open(Gone()).has_ended()


def test_only_the_first_end_counts(boards):
    boards[0].end("mixed devices")
    boards[0].end()
    with pytest.raises(ValueError, match="mixed devices"):
        boards[1].require_no_error()


def test_each_device_repeats_what_it_has_not(boards):
    plan = SweepTasks(
        setup=SETUP,
        recipes=("rowwise",),
        seed=0,
        tasks=(),
        repeats=tuple(SHAPES),
        repeated=((SHAPES[0], "a GPU-1"), (SHAPES[1], "a GPU-2")),
    )
    assert [task.shape for task in plan.own_tasks("a GPU-1")] == SHAPES[1:]
    assert all(task.repeat for task in plan.own_tasks("b GPU-3"))


def test_a_rank_measures_its_own_first_and_then_what_is_dealt_out(boards):
    boards[0].publish(PLAN)
    own = Task(SHAPES[2], repeat=True)
    schedule = RankTaskQueue([own], boards[1])
    assert [schedule.next() for _ in range(5)] == [own, A, B, C, None]
    assert schedule.numbers == {A: 0, B: 1, C: 2}


def test_a_repeat_taken_by_the_process_that_measured_it_goes_to_another(boards):
    boards[0].publish(SweepTasks(setup=SETUP, recipes=("rowwise",), seed=0, tasks=(Task(SHAPES[0], repeat=True), B)))
    schedule = RankTaskQueue([], boards[1])
    assert schedule.next({SHAPES[0]}) is None
    assert schedule.next({SHAPES[0]}) == B
    assert schedule.next() == Task(SHAPES[0], repeat=True)


def test_after_the_end_nothing_is_taken(boards):
    boards[0].publish(PLAN)
    boards[0].end()
    schedule = RankTaskQueue([], boards[1])
    assert schedule.next() is None


def test_waiting_ends_with_the_sweep(boards):
    boards[0].publish(PLAN)
    boards[2].take(), boards[2].take(), boards[2].take()
    threading.Timer(0.1, boards[0].end).start()
    assert not RankTaskQueue([], boards[1]).wait()


def test_all_that_ranks_measure_is_kept_once(boards, collecting):
    with collecting(2) as collector:
        ranks = [Rank(board, [Task(SHAPES[0], repeat=True)]) for board in boards[:2]]
        threads = [threading.Thread(target=rank.measure_all) for rank in ranks]
        [thread.start() for thread in threads]
        [thread.join(LIMIT_S) for thread in threads]
        for rank in ranks:
            rank.leave(retried=1, discarded=(Stages(timing_s=2.0),), troubles={f"GPU of {rank.board.me[:7]}": "hot"})
    kept = collector.notes.kept
    assert sorted((t for t in kept if not t.repeat), key=lambda t: t.shape) == TASKS
    assert [t.shape for t in kept if t.repeat] == [SHAPES[0]] * 2
    assert (collector.remaining, collector.retried, len(collector.discarded), collector.lost) == (0, 2, 2, {})
    assert len(collector.troubles) == 2


def test_what_a_dead_rank_had_is_dealt_out_again(boards, collecting):
    with collecting(2) as collector:
        doomed, other = Rank(boards[1]), Rank(boards[0])
        assert [doomed.take(), doomed.take()] == [A, B]
        doomed.finish(A)
        doomed.die()
        other.measure_all()
        other.leave()
    assert sorted(collector.notes.kept, key=lambda task: task.shape) == TASKS
    assert collector.lost == {1: "has not been heard of for 0 s"}
    assert collector.notes.said == ["rank 1 has not been heard of for 0 s: its points go to others"]


def test_also_what_it_would_have_been_dealt_next(boards, collecting):
    """It died holding a number that no task had yet: the first that is dealt out again gets it."""
    with collecting(3) as collector:
        early, late, other = (Rank(board) for board in (boards[1], boards[2], boards[0]))
        assert [late.take() for _ in TASKS] == TASKS
        assert early.take() is None
        early.die()
        wait_until(lambda: 1 in collector.lost)
        late.die()
        other.measure_all()
        other.leave()
    assert sorted(collector.notes.kept, key=lambda task: task.shape) == TASKS


def test_also_what_it_took_without_saying_so(boards, collecting):
    with collecting(2) as collector:
        doomed, other = Rank(boards[1]), Rank(boards[0])
        boards[1]._store.add(boards[1]._key("taken"), 1)  # and died before it could say who took it
        doomed.die()
        other.measure_all()
        other.leave()
    assert sorted(collector.notes.kept, key=lambda task: task.shape) == TASKS


def test_a_rank_that_was_only_slow_counts_for_nothing(boards, collecting):
    with collecting(2) as collector:
        slow, other = Rank(boards[1]), Rank(boards[0])
        assert slow.take() == A
        slow.die()
        other.measure_all()
        slow.finish(A)
        other.leave()
    assert sorted(collector.notes.kept, key=lambda task: task.shape) == TASKS


def test_a_rank_that_gave_up_says_why_and_others_go_on(boards, collecting):
    with collecting(2) as collector:
        broken, other = Rank(boards[1]), Rank(boards[0])
        assert broken.take() == A
        broken.leave(lost="lost its device, node7 GPU-9: an illegal memory access")
        other.measure_all()
        other.leave()
    assert collector.lost == {1: "lost its device, node7 GPU-9: an illegal memory access"}
    assert collector.remaining == 0


def test_a_rank_that_never_joins_is_not_waited_for_long(boards, collecting):
    with collecting(2) as collector:
        only = Rank(boards[0])
        only.measure_all()
        only.leave()
    assert collector.lost == {1: "did not join within 0 s"}
    assert len(collector.notes.kept) == 3


def test_one_that_joins_late_measures_its_own_share(boards, collecting):
    """The sweep has not ended before all have come, or their time is up: the late one has repeats to take."""
    with collecting(2) as collector:
        early = Rank(boards[0])
        for _ in TASKS:
            early.finish(early.take())
        time.sleep(0.2)
        late = Rank(boards[1], [Task(SHAPES[0], repeat=True)])
        for rank in (late, early):
            rank.measure_all()
            rank.leave()
    assert collector.lost == {}
    assert collector.notes.kept[-1] == Task(SHAPES[0], repeat=True)


def test_a_rank_that_comes_back_after_a_pause_counts_again(boards, collecting):
    with collecting(2) as collector:
        paused, other = Rank(boards[1]), Rank(boards[0])
        assert paused.take() == A
        paused.die()
        wait_until(lambda: collector.lost)
        again = heartbeat(boards[1])
        again.__enter__()
        wait_until(lambda: not collector.lost)
        paused.finish(paused.take())
        other.measure_all()
        again.__exit__(None, None, None)
        boards[1].post(Message(left=True))
        other.leave()
    assert sorted(collector.notes.kept, key=lambda task: task.shape) == TASKS
    assert collector.lost == {}


def test_a_rank_that_lives_and_does_nothing_is_given_up(boards, collecting, monkeypatch):
    monkeypatch.setattr(dealing, "STUCK_S", 0.3)
    with collecting(2) as collector:
        stuck, other = Rank(boards[1]), Rank(boards[0])
        assert stuck.take() == A
        other.measure_all()
        other.leave()
    stuck.die()
    assert sorted(collector.notes.kept, key=lambda task: task.shape) == TASKS
    assert collector.lost == {1: "has measured nothing for 0 s"}


def test_a_task_that_ranks_die_of_is_not_dealt_out_for_ever(boards, collecting, monkeypatch):
    monkeypatch.setattr(dealing, "MAX_RANK_DEATHS", 2)
    with collecting(3) as collector:
        first, second, other = (Rank(board) for board in (boards[1], boards[2], boards[0]))
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
    assert sorted(collector.notes.kept, key=lambda task: task.shape) == TASKS
    failed = [record for record in collector.notes.records if record.arms["bf16"].status == "failed"]
    assert [record.shape for record in failed] == [SHAPES[0]]
    assert failed[0].arms["tensorwise"].detail == "2 ranks that had it died"


def test_a_process_that_takes_a_ranks_place_is_heard_from_its_start(boards, collecting):
    with collecting(2) as collector:
        before, other = Rank(boards[1]), Rank(boards[0])
        before.finish(before.take())
        assert before.take() == B
        wait_until(lambda: A in collector.notes.kept)
        before.die()
        after = RankStore(boards[1]._store, boards[1]._session, "process started again, rank 1")
        rank = Rank(after)
        wait_until(lambda: len(collector._members) == 3)
        rank.measure_all()
        rank.leave()
        other.leave()
    assert sorted(collector.notes.kept, key=lambda task: task.shape) == TASKS
    assert collector.lost == {}


def test_a_later_session_over_the_same_store_knows_nothing_of_an_earlier_one(boards):
    boards[0].publish(PLAN)
    boards[1].take()
    boards[0].end("mixed devices")
    later = RankStore.open(boards[0]._store)
    later.publish(PLAN)
    assert not later.has_ended()
    assert later.take() == (0, A)


def test_rank_0_lets_in_the_newest_process_of_each_rank(boards):
    leader, store = boards[0], boards[0]._store
    ask_to_join(boards[1], 1)  # of an earlier session, long gone
    joined = []
    threads = [threading.Thread(target=lambda r=rank: joined.append(RankStore.join(store, r))) for rank in (1, 2)]
    [thread.start() for thread in threads]
    wait_until(lambda: leader.admit([1, 2]) and len(joined) == 2)
    leader.publish(PLAN)
    assert {board.plan().seed for board in joined} == {3}
    assert len({board.me for board in joined}) == 2


def test_a_store_that_does_not_answer_is_noticed():
    class Frozen:
        def check(self, keys):
            time.sleep(0.3)
            return False

    board = RankStore.open(Frozen())
    thread = threading.Thread(target=board.has_ended)
    thread.start()
    time.sleep(0.15)
    assert board.waiting_s() > 0.1
    thread.join()
    assert board.waiting_s() == 0.0


def test_when_everybody_leaves_early_tasks_remain(boards, collecting):
    with collecting(1) as collector:
        rank = Rank(boards[0])
        rank.finish(rank.take())
        rank.leave()
    assert (collector.remaining, collector.notes.kept) == (2, [A])


def test_a_rank_of_another_kind_ends_the_sweep_for_all(boards, collecting):
    with collecting(2) as collector:
        rank = Rank(boards[0])
        ask_to_join(boards[1], 1)
        boards[1].post(Message(refused="rank 1 differs: device.name", left=True))
        wait_until(boards[0].has_ended)
        assert not rank.schedule.wait()
        rank.leave()
    assert collector.remaining == 3
    with pytest.raises(ValueError, match=r"device\.name"):
        boards[2].require_no_error()


def test_a_control_that_is_off_is_refused_and_not_dealt_out_again(boards, collecting):
    with collecting(1) as collector:
        rank = Rank(boards[0])
        rank.posts.refuse(rank.take(), 0.03)
        rank.measure_all()
        rank.leave()
    assert collector.notes.refused == [(A, 0.03)]
    assert collector.notes.kept == [B, C]
    assert collector.remaining == 0


def test_messages_are_said_with_their_rank(boards, collecting):
    with collecting(2) as collector:
        ranks = [Rank(board) for board in boards[:2]]
        ranks[1].posts.say("(16, 16, 16): hot")
        ranks[0].measure_all()
        [rank.leave() for rank in ranks]
    assert collector.notes.said == ["rank 1: (16, 16, 16): hot"]


def test_what_cannot_be_kept_is_an_error_everywhere(boards, collecting):
    collector = collecting(1)
    collector.notes.keep = lambda task, record: (_ for _ in ()).throw(OSError("No space left on device"))
    rank = Rank(boards[0])
    collector.__enter__()
    rank.measure_all()
    rank.leave()
    with pytest.raises(OSError, match="No space"):
        collector.__exit__(None, None, None)
    with pytest.raises(ValueError, match="No space"):
        boards[1].require_no_error()


def test_if_rank_0_ends_the_others_do(boards, collecting):
    other = Rank(boards[1])
    collector = collecting(2)
    collector.__enter__()
    assert other.take() == A
    collector.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert other.take() is None
    with pytest.raises(ValueError, match="rank 0 has ended: KeyboardInterrupt"):
        boards[1].require_no_error()
    other.die()
