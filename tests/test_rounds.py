"""Rounds of visits: which set is visited when, what is kept, and that nothing is measured twice, however it ends."""

from __future__ import annotations

import math
import re
import time

import pytest
from plans import PROTOCOL, SHAPES
from samples import CPU, NOON, SOFTWARE

from fp8gate.calibrate.arms.failure import Failure
from fp8gate.calibrate.planning.block_worker import Done, Visit
from fp8gate.calibrate.planning.block_worker_pool import BlockWorkerDiedError, StoppedError
from fp8gate.calibrate.planning.search import BF16_SET
from fp8gate.calibrate.planning.visit_journal import PlanJournal, PlanSetup, VisitRecord
from fp8gate.calibrate.planning.visit_rounds import MAX_ATTEMPTS, MAX_SLOWDOWNS, VisitRounds

Q, GATE, BOTH = (
    frozenset(one) for one in (["self_attn.q_proj"], ["mlp.gate_proj"], ["self_attn.q_proj", "mlp.gate_proj"])
)
TIMES_US = {BF16_SET: 400.0, Q: 200.0, GATE: 100.0, BOTH: 50.0}
SETUP = PlanSetup(
    recipe="rowwise",
    model="tiny",
    tokens=32,
    sequence=32,
    tp=1,
    recompute="none",
    device=CPU,
    software=SOFTWARE,
    protocol=PROTOCOL,
    block="0123456789abcdef",
    shapes=SHAPES,
)


class FakePool:
    """Times that are known. broken: what each step answers instead, by set. slowdowns: of the first visits."""

    def __init__(self, broken=None, slowdowns=(), dies=None, has_company=False):
        self.broken, self.slowdowns, self.dies = broken or {}, list(slowdowns), dies
        self.log, self.has_company = [], has_company

    def compile(self, sets):
        self.log.append(("compile", tuple(sets)))
        for one in sets:
            yield one, self.broken.get(("compile", one), Done())

    def load(self, one):
        if one == self.dies:
            raise BlockWorkerDiedError("its process ended with exit code -9", one)
        self.log.append(("load", one))
        return self.broken.get(("load", one), Done(0.04))

    def visit(self, one):
        self.log.append(("visit", one))
        slowdown = self.slowdowns.pop(0) if self.slowdowns else None
        times_us = TIMES_US[one]
        return self.broken.get(("visit", one), Visit(times_us / 4, times_us * 3 / 4, 1500, True, slowdown))

    def others(self):
        return ["1234 (python3)"] if self.has_company else []

    def visits(self):
        return [one for what, one in self.log if what == "visit"]


@pytest.fixture
def rounds(tmp_path):
    """Opens the journal in this test's folder, again and again."""
    journals = []

    def make(pool, *, said=None, until=math.inf):
        for journal in journals:
            journal.__exit__(None, None, None)
        journals[:] = [PlanJournal(tmp_path, SETUP).__enter__()]
        say = said.append if said is not None else lambda _: None
        return VisitRounds(pool, journals[0], SHAPES, say, start=time.monotonic(), until=until)

    yield make
    journals[0].__exit__(None, None, None)


def test_bf16_is_visited_in_every_round_and_the_order_varies(rounds):
    pool = FakePool()
    ratios = rounds(pool)([Q, GATE], 6)
    assert ratios == {Q: (math.log(2),) * 6, GATE: (math.log(4),) * 6}
    orders = [tuple(pool.visits()[i : i + 3]) for i in range(0, 18, 3)]
    assert all(set(order) == {BF16_SET, Q, GATE} for order in orders)
    assert len(set(orders)) > 1


def test_all_are_compiled_together_and_once(rounds):
    pool = FakePool()
    measure = rounds(pool)
    measure([Q, GATE], 1)
    measure([Q, BOTH], 2)
    assert [sets for what, sets in pool.log if what == "compile"] == [(BF16_SET, Q, GATE), (BOTH,)]


def test_only_what_lacks_visits_is_visited(rounds):
    pool = FakePool()
    measure = rounds(pool)
    measure([Q], 2)
    pool.log.clear()
    measure([Q, GATE], 2)
    assert (pool.visits().count(Q), pool.visits().count(GATE), pool.visits().count(BF16_SET)) == (0, 2, 2)
    assert measure.times(GATE, 0) == (25.0, 75.0)


def test_another_process_goes_on_with_what_is_in_the_journal(rounds):
    rounds(FakePool())([Q], 3)
    pool = FakePool()
    measure = rounds(pool)
    assert measure([Q], 3) == {Q: (math.log(2),) * 3}
    assert pool.log == []
    measure([Q], 4)
    assert sorted(pool.visits(), key=len) == [BF16_SET, Q]
    assert measure.errors[Q] == 0.04


def test_a_round_without_its_bf16_is_no_pair(tmp_path):
    """As a kill leaves it: GATE was visited in two rounds, bf16 in the first of them alone."""
    visits = [(BF16_SET, 1), (GATE, 1), (GATE, 2)]
    with PlanJournal(tmp_path, SETUP) as journal:
        for one, at in visits:
            times_us = {"fwd_us": TIMES_US[one] / 4, "bwd_us": TIMES_US[one] * 3 / 4}
            journal.append(VisitRecord(convert=tuple(one), round=at, measured_at=NOON, error=0.0, **times_us))
    with PlanJournal(tmp_path, SETUP) as journal:
        measure = VisitRounds(FakePool(), journal, SHAPES, lambda _: None, start=time.monotonic())
        assert measure.log_ratios(GATE) == (math.log(4),)


@pytest.mark.parametrize("step", ["compile", "load", "visit"])
def test_a_set_that_fails_has_no_number_and_is_tried_once_more(rounds, step):
    for _ in range(MAX_ATTEMPTS):
        measure = rounds(FakePool(broken={(step, Q): Failure("out_of_memory", "no room")}))
        assert measure([Q, GATE], 2) == {Q: (), GATE: (math.log(4),) * 2}
        assert measure.failed == {Q: "out_of_memory"}
    again = FakePool()
    assert rounds(again)([Q, GATE], 2) == {Q: (), GATE: (math.log(4),) * 2}
    assert again.log == []


def test_without_bf16_there_is_nothing_to_compare_with(rounds):
    with pytest.raises(StoppedError, match="bf16 could not be measured"):
        rounds(FakePool(broken={("load", BF16_SET): Failure("failed", "no room")}))([Q], 1)


def test_without_bf16_no_other_set_is_loaded(rounds):
    pool = FakePool(broken={("compile", BF16_SET): Failure("failed", "no compiler")})
    with pytest.raises(StoppedError, match="bf16 could not be measured"):
        rounds(pool)([Q, GATE, BOTH], 1)
    assert [step for step, _ in pool.log] == ["compile"]


def test_without_bf16_the_next_call_tries_it_again(rounds):
    for _ in range(MAX_ATTEMPTS + 1):
        with pytest.raises(StoppedError, match="try fewer --workers"):
            rounds(FakePool(broken={("load", BF16_SET): Failure("out_of_memory", "no room")}))([Q], 1)
    assert rounds(FakePool())([Q], 1) == {Q: (math.log(2),)}


def test_a_set_over_which_processes_die_is_not_tried_for_ever(rounds):
    for _ in range(MAX_ATTEMPTS):
        with pytest.raises(BlockWorkerDiedError):
            rounds(FakePool(dies=Q))([GATE, Q], 1)
    measure = rounds(FakePool())
    assert measure([Q, GATE], 1) == {Q: (), GATE: (math.log(4),)}
    assert measure.failed == {Q: "failed"}


def test_a_visit_in_which_the_gpu_slowed_down_is_made_again(rounds):
    said, pool = [], FakePool(slowdowns=["thermal slowdown"] * (MAX_SLOWDOWNS - 1))
    assert rounds(pool, said=said)([Q], 1) == {Q: (math.log(2),)}
    assert len(pool.visits()) == 2 + MAX_SLOWDOWNS - 1
    assert sum("again: thermal slowdown of the GPU" in line for line in said) == MAX_SLOWDOWNS - 1


def test_a_gpu_that_stays_slow_stops_it(rounds):
    with pytest.raises(StoppedError, match="thermal slowdown of the GPU, 3 times in a row"):
        rounds(FakePool(slowdowns=["thermal slowdown"] * MAX_SLOWDOWNS))([Q], 1)


def test_no_round_begins_when_the_time_is_up(rounds):
    pool = FakePool()
    with pytest.raises(StoppedError, match="the time is up"):
        rounds(pool, until=time.monotonic())([Q], 1)
    assert pool.visits() == []
    assert not any(step == "load" for step, _ in pool.log)
    assert rounds(pool, until=time.monotonic() + 1000.0)([Q], 1) == {Q: (math.log(2),)}


def test_another_process_on_the_device_is_named_once(rounds):
    said = []
    rounds(FakePool(has_company=True), said=said)([Q, GATE], 3)
    assert [line for line in said if "1234" in line] == [
        "warning: another process is on the device and may spoil timings: 1234 (python3)"
    ]


def test_every_step_is_said(rounds):
    said = []
    measure = rounds(FakePool(), said=said)
    measure([BOTH], 1)
    assert [line.partition(" s ")[2] for line in said[:2]] == [
        "ready 1 of 2: bf16",
        "ready 2 of 2: self_attn.q_proj, mlp.gate_proj",
    ]
    assert re.search(r"round 1, visit [12] of 2: 0\.400 ms bf16", " ".join(said))
    assert re.fullmatch(r"\d+ s: waiting for compilers \d+, loading and tuning \d+, visits \d+", measure.summary())
