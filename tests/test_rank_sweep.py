"""Sweeps by several ranks, each a process of its own on the CPU. Whatever dies, no point is lost or measured twice."""

from __future__ import annotations

import functools
import signal
import time
from types import SimpleNamespace

import msgspec
import pytest
from forked import (
    SHAPES,
    Gate,
    Processes,
    before_call,
    free_port,
    points_in_table,
    sweep_arguments,
    table_in,
    wait_for_points,
)
from samples import journal_points

from fp8gate.calibrate.points import setup, worker_pool
from fp8gate.calibrate.points.point_worker import PointBench
from fp8gate.calibrate.ranks import collector, rank_queue, rank_sweep
from fp8gate.calibrate.ranks.collector import Collector, RankLimits
from fp8gate.filter.contract.table import Incomplete

SOON_DEAD = RankLimits(dead_s=2.0)


class Ranks(Processes):
    """Ranks that the test starts itself, so that none dies because another does."""

    def __init__(self, folder):
        super().__init__(folder)
        self.arguments = [*sweep_arguments(folder), "--workers", "0"]
        self.use_another_port()

    def use_another_port(self):
        """For another sweep: rank 0's store listens there."""
        self.store = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}

    def start_rank(self, rank, world, *changes, limits=None):
        """limits: of rank 0's patience."""
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        change = functools.partial(become_a_rank, limits, changes)
        return self.start_command(*self.arguments, change=change, **self.store, **numbers)

    def sweep(self, world):
        """A whole sweep by so many ranks; what each said."""
        self.use_another_port()
        ranks = [self.start_rank(rank, world) for rank in range(world)]
        for rank in ranks:
            assert rank.exit_code() == 0, rank.said
        return [rank.said for rank in ranks]


def become_a_rank(limits, changes):
    """Ranks look around often."""
    rank_queue.BEAT_S = collector.BEAT_S = 0.1
    rank_sweep.Collector = functools.partial(Collector, limits=limits)
    for change in changes:
        change()


def pass_time_before(point, seconds):
    """So much time passes while this process measures its point of this number."""
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + seconds, sleep=time.sleep)

    def pass_time():
        worker_pool.time = rank_queue.time = clock

    before_call(PointBench, "measure", point, pass_time)


@pytest.fixture
def ranks(tmp_path):
    started = Ranks(tmp_path)
    yield started
    started.kill()


@pytest.fixture
def gate(tmp_path):
    """A gate before a rank's point of this number. Its first point is the one that every rank measures."""
    return lambda number: Gate(tmp_path / f"gate {number}", number)


def be_of_another_kind():
    describe = setup.describe_device
    setup.describe_device = lambda device: msgspec.structs.replace(describe(device), name="CPU of another kind")


@pytest.mark.parametrize("world", [2, *(pytest.param(world, marks=pytest.mark.slow) for world in (1, 4))])
def test_every_point_is_measured_once_and_one_by_every_rank(ranks, tmp_path, world):
    said = ranks.sweep(world)
    protocol, points = table_in(tmp_path).protocol, journal_points(tmp_path)
    assert points_in_table(tmp_path) == SHAPES
    assert len(points) == len(SHAPES) + world
    assert sorted(set(points)) == SHAPES
    assert [text.count("wrote ") for text in said] == [1] + [0] * (world - 1)
    assert protocol.devices == world
    assert (protocol.between is None) == (world == 1)


@pytest.mark.slow
def test_the_same_command_measures_nothing_again(ranks, tmp_path):
    ranks.sweep(2)
    before = journal_points(tmp_path)
    leader, _ = ranks.sweep(2)
    assert f"0 points measured, {len(before)} taken from the journal" in leader
    assert journal_points(tmp_path) == before


@pytest.mark.slow
def test_a_rank_that_is_new_measures_its_share_though_all_points_are_there(ranks, tmp_path):
    ranks.sweep(1)
    before = journal_points(tmp_path)
    said = ranks.sweep(2)
    assert not any("did not join" in text for text in said)
    assert journal_points(tmp_path)[:-1] == before
    assert journal_points(tmp_path)[-1] in before


@pytest.mark.slow
def test_what_is_wrong_on_rank_0_is_said_everywhere(ranks):
    ranks.arguments[ranks.arguments.index("--grid") + 1] = "no such grid.yaml"
    for rank in [ranks.start_rank(rank, 2) for rank in range(2)]:
        assert rank.exit_code() == 2, rank.said
        assert "no such grid.yaml" in rank.said


@pytest.mark.slow
def test_a_rank_that_never_starts_does_not_keep_the_others(ranks, tmp_path):
    only = ranks.start_rank(0, 2, limits=RankLimits(join_s=0.5))
    assert only.exit_code() == 0, only.said
    assert "rank 1 did not join within 0 s" in only.said
    assert points_in_table(tmp_path) == SHAPES


def test_a_rank_that_is_killed_loses_no_point(ranks, gate, tmp_path):
    """It dies at its second point, which it has taken from the others. They wait until then."""
    at_first, at_second = gate(1), gate(2)
    leader, other = ranks.start_rank(0, 3, at_first, limits=SOON_DEAD), ranks.start_rank(1, 3, at_first)
    doomed = ranks.start_rank(2, 3, at_second)
    at_second.wait_for(doomed)
    doomed.kill()
    assert doomed.exit_code() == -signal.SIGKILL
    at_first.open()
    assert (leader.exit_code(), other.exit_code()) == (0, 0), leader.said
    assert "rank 2 has not been heard of for 2 s: its points go to others" in leader.said
    assert points_in_table(tmp_path) == SHAPES
    points = journal_points(tmp_path)
    assert len(points) == len(SHAPES) + 3
    assert sorted(set(points)) == SHAPES


@pytest.mark.slow
def test_ranks_of_different_devices_make_no_table(ranks, gate, tmp_path):
    at_first = gate(1)
    leader, other = ranks.start_rank(0, 2, at_first), ranks.start_rank(1, 2, be_of_another_kind)
    other.exit_code()
    at_first.open()
    for rank in (leader, other):
        assert rank.exit_code() == 2, rank.said
        assert "rank 1" in rank.said
        assert "device.name is CPU of another kind, there CPU" in rank.said
    assert not list((tmp_path / "out").rglob("*.yaml"))


@pytest.mark.slow
def test_without_rank_0_the_others_end_and_a_later_sweep_goes_on(ranks, gate, tmp_path):
    leader, other = ranks.start_rank(0, 2, gate(2)), ranks.start_rank(1, 2)
    wait_for_points(tmp_path, 3, leader)
    leader.kill()
    assert leader.exit_code() == -signal.SIGKILL
    assert other.exit_code() == 1, other.said
    assert "rank 0" in other.said
    kept = journal_points(tmp_path)
    ranks.sweep(2)
    assert points_in_table(tmp_path) == SHAPES
    assert journal_points(tmp_path)[: len(kept)] == kept
    assert len(journal_points(tmp_path)) == len(SHAPES) + 2


@pytest.mark.slow
def test_ctrl_c_ends_all_ranks_and_keeps_what_was_measured(ranks, gate, tmp_path):
    leader, other = ranks.start_rank(0, 2, gate(2), limits=RankLimits(ending_s=0.5)), ranks.start_rank(1, 2, gate(3))
    wait_for_points(tmp_path, 3, leader)
    for rank in (leader, other):
        rank.press_ctrl_c()
    assert leader.exit_code() == 130, leader.said
    assert other.exit_code() != 0  # by its own Ctrl-C, or as rank 0 is gone
    assert len(journal_points(tmp_path)) == 3
    table = table_in(tmp_path)
    assert table.incomplete == Incomplete(measured=3, of=len(SHAPES) + 2)
    assert set(points_in_table(tmp_path)) < set(journal_points(tmp_path))  # two are repeats
    ranks.sweep(2)
    assert (table_in(tmp_path).incomplete, points_in_table(tmp_path)) == (None, SHAPES)


def test_ranks_that_are_stopped_by_the_clock_leave_an_incomplete_table(ranks, tmp_path):
    """The time is up while rank 0 measures its third point."""
    stop_after_min = 60.0
    ranks.arguments += ["--stop-after", str(stop_after_min)]
    leader = ranks.start_rank(0, 1, functools.partial(pass_time_before, 3, stop_after_min * 60))
    assert leader.exit_code() == 1, leader.said
    table = table_in(tmp_path)
    assert table.incomplete == Incomplete(measured=3, of=len(SHAPES) + 1)
    assert "2 measurements are missing: the same command takes them" in leader.said
    ranks.sweep(1)
    assert (table_in(tmp_path).incomplete, points_in_table(tmp_path)) == (None, SHAPES)
