"""Ranks compare their decisions: real processes over gloo, of which some differ and some are killed.

Starting processes takes longer than what they do, so three of them live through several scenes and leave a file about
each. None waits without a limit, and what still lives at the end of `GROUP_LIMIT_S` is killed.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import pytest
import torch.distributed as dist
from builders import make_point, make_table, write_file

from fp8gate import AutoFilter, auto_filter
from fp8gate.filter import agreement
from fp8gate.filter.agreement import MAX_NAMED

TOKENS = 32
SURE, CLOSE = (64, 128), (128, 64)  # (in_features, out_features)
TABLE = make_table(make_point(TOKENS, *SURE, 1.5), make_point(TOKENS, *CLOSE, 1.2))
OTHER = make_table(make_point(TOKENS, *SURE, 1.5), make_point(TOKENS, *CLOSE, 0.8))
BLOCKS = MAX_NAMED + 3  # each has one layer that the tables disagree on

RANKS = range(3)
PATIENT_S = 30.0  # where all ranks answer
IMPATIENT_S = 3.0  # where one does not
STARTS_WAITING_S = 1.0  # by then the other ranks are waiting for an answer
GROUP_LIMIT_S = 90.0  # for all that one group does: 8 s on two idle cores


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How `agree` ended on one rank; error: the class's name, or empty."""

    error: str
    message: str
    elapsed_s: float


Tell: TypeAlias = Callable[[str, Outcome], None]
Scenes: TypeAlias = Callable[[int, Path, Tell], None]


# --- what runs in the processes --------------------------------------------------------------------------------


class Linear(msgspec.Struct, frozen=True):
    in_features: int
    out_features: int


def asked(table: Path, *, tokens: int = TOKENS, prefix: str = "layers") -> AutoFilter:
    """A filter that has decided about every layer of a model."""
    wants_float8 = auto_filter("rowwise", tokens=tokens, tables=table, on_outside="ignore")
    for i in range(BLOCKS):
        wants_float8(Linear(*SURE), f"{prefix}.{i}.w1")
        wants_float8(Linear(*CLOSE), f"{prefix}.{i}.w2")
    return wants_float8


def agreeing(
    wants_float8: AutoFilter, group: dist.ProcessGroup | None = None, *, timeout_s: float = PATIENT_S
) -> Outcome:
    error: Exception | None = None
    start_s = time.monotonic()
    try:
        wants_float8.agree(group, timeout_s=timeout_s)
    except Exception as caught:  # whatever it is, a test sees it
        error = caught
    elapsed_s = time.monotonic() - start_s
    return Outcome(error=type(error).__name__ if error else "", message=str(error or ""), elapsed_s=elapsed_s)


def scenes_with_a_tcp_store(rank: int, folder: Path, tell: Tell) -> None:
    """All answer, alike or not; then rank 2 is killed, then rank 0, in which the store lives."""
    same, other, longer = (
        asked(folder / "same.yaml"),
        asked(folder / "other.yaml"),
        asked(folder / "same.yaml", tokens=2 * TOKENS),
    )
    tell("same", agreeing(same))
    tell("same again", agreeing(same))
    tell("another table", agreeing(other if rank == 1 else same))
    tell("same after all", agreeing(same))
    tell("other tokens", agreeing(longer if rank == 2 else same))
    tell("other names", agreeing(asked(folder / "same.yaml", prefix="blocks") if rank == 0 else same))
    tell("three opinions", agreeing((same, other, longer)[rank]))
    groups = {"group that agrees": dist.new_group([0, 1]), "group that does not": dist.new_group([1, 2])}
    for name, group in groups.items():
        if group is not dist.GroupMember.NON_GROUP_MEMBER:
            tell(name, agreeing(other if rank == 2 else same, group))
    tell("all after groups", agreeing(same))
    if rank == 2:
        die()
    tell("rank 2 is dead", agreeing(same, timeout_s=IMPATIENT_S))
    if rank == 0:
        time.sleep(STARTS_WAITING_S)
        die()
    tell("rank 0 dies", agreeing(same, timeout_s=PATIENT_S))
    tell("rank 0 is dead", agreeing(same, timeout_s=PATIENT_S))


def scenes_with_a_file_store(rank: int, folder: Path, tell: Tell) -> None:
    same, other = asked(folder / "same.yaml"), asked(folder / "other.yaml")
    tell("same", agreeing(same))
    tell("another table", agreeing(other if rank == 1 else same))
    if rank == 0:
        die()
    tell("rank 0 is dead", agreeing(same, timeout_s=IMPATIENT_S))


def scene_of_a_rank_that_comes_late(rank: int, folder: Path, tell: Tell) -> None:
    """Rank 2 answers when the others have given up: what it finds on the board is all the same."""
    same = asked(folder / "same.yaml")
    if rank == 2:
        time.sleep(2 * IMPATIENT_S)
    tell("late", agreeing(same, timeout_s=IMPATIENT_S))
    time.sleep(4 * IMPATIENT_S if rank == 0 else 0.0)  # the store lives in it


def scene_of_an_error_that_ends_rank_0(rank: int, folder: Path, tell: Tell) -> None:
    """Nobody catches it, so the store is gone as soon as rank 0 knows; the other ranks are to know as well."""
    exchange = agreement._Board.exchange

    def exchange_late(board: agreement._Board, topic: str, *args: Any) -> dict[int, str]:
        if topic == "content":
            time.sleep(STARTS_WAITING_S)
        return exchange(board, topic, *args)

    if rank == 1:  # nobody awaits its table, which is that of rank 0
        agreement._Board.exchange = exchange_late  # type: ignore[method-assign]
    tell("another table", agreeing(asked(folder / ("other.yaml" if rank == 2 else "same.yaml"))))
    if rank == 0:
        die()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def live(scenes: Scenes, rank: int, init_method: str, folder: Path) -> None:
    def tell(scene: str, outcome: Outcome) -> None:
        (folder / scene).mkdir(exist_ok=True)
        (folder / scene / f"{rank}.json").write_bytes(msgspec.json.encode(outcome))

    limit = timedelta(seconds=PATIENT_S)
    dist.init_process_group("gloo", init_method=init_method, rank=rank, world_size=len(RANKS), timeout=limit)
    scenes(rank, folder, tell)


# --- what starts and ends them ---------------------------------------------------------------------------------


class Group:
    """Three processes and what they have said."""

    def __init__(self, scenes: Scenes, init_method: str, folder: Path) -> None:
        write_file(TABLE, folder / "same.yaml")
        write_file(OTHER, folder / "other.yaml")
        self._folder = folder
        spawn = multiprocessing.get_context("spawn")
        processes = [spawn.Process(target=live, args=(scenes, rank, init_method, folder)) for rank in RANKS]
        try:
            for process in processes:
                process.start()
            until_s = time.monotonic() + GROUP_LIMIT_S
            for process in processes:
                process.join(max(0.0, until_s - time.monotonic()))
        finally:
            for process in processes:
                process.kill()  # nothing to one that has ended
                process.join()

    def outcomes(self, scene: str) -> dict[int, Outcome]:
        files = sorted((self._folder / scene).glob("*.json"))
        return {int(file.stem): msgspec.json.decode(file.read_bytes(), type=Outcome) for file in files}


def free_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Group:
    return Group(scenes_with_a_tcp_store, free_address(), tmp_path_factory.mktemp("tcp"))


@pytest.fixture(scope="module")
def file_group(tmp_path_factory: pytest.TempPathFactory) -> Group:
    folder = tmp_path_factory.mktemp("file")
    return Group(scenes_with_a_file_store, (folder / "store").as_uri(), folder)


# --- the tests -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scene", ["same", "same again", "same after all", "all after groups"])
def test_ranks_that_decided_the_same_agree(group: Group, scene: str) -> None:
    outcomes = group.outcomes(scene)
    assert {rank: outcome.error for rank, outcome in outcomes.items()} == dict.fromkeys(RANKS, "")
    assert all(outcome.elapsed_s < PATIENT_S / 2 for outcome in outcomes.values())


def the_error(outcomes: dict[int, Outcome], error: str, ranks: Iterable[int] = RANKS) -> list[str]:
    """The lines of the one error that exactly these ranks raised."""
    assert {rank: outcome.error for rank, outcome in outcomes.items()} == dict.fromkeys(ranks, error)
    (message,) = {outcome.message for outcome in outcomes.values()}
    return [line.strip() for line in message.splitlines()]


def test_another_table_is_named_with_the_ranks_and_the_first_layers(group: Group) -> None:
    _, who, table, file, *layers = the_error(group.outcomes("another table"), "RanksDisagreeError")
    assert who == "rank 0, 2 against rank 1:"
    assert re.fullmatch(r"table: sha256 \w{12} against sha256 \w{12}", table)
    assert re.fullmatch(r"file: \S+/same\.yaml against \S+/other\.yaml", file)
    assert layers == [f"layers.{i}.w2: float8 against bf16" for i in range(MAX_NAMED)] + ["and 3 more layers"]


def test_other_tokens_are_named_even_if_they_change_no_decision(group: Group) -> None:
    _, *lines = the_error(group.outcomes("other tokens"), "RanksDisagreeError")
    assert lines == ["rank 0, 1 against rank 2:", f"tokens: {TOKENS} against {2 * TOKENS}"]


def test_layers_that_only_some_ranks_have_are_named(group: Group) -> None:
    _, who, *layers = the_error(group.outcomes("other names"), "RanksDisagreeError")
    assert who == "rank 0 against rank 1, 2:"
    assert layers[0] == "blocks.0.w1: float8 against not asked"
    assert layers[MAX_NAMED:] == [f"and {4 * BLOCKS - MAX_NAMED} more layers"]


def test_every_opinion_is_compared_with_the_first(group: Group) -> None:
    lines = the_error(group.outcomes("three opinions"), "RanksDisagreeError")
    assert [line for line in lines if line.startswith("rank")] == ["rank 0 against rank 1:", "rank 0 against rank 2:"]


def test_a_group_compares_only_its_own_ranks(group: Group) -> None:
    assert {rank: o.error for rank, o in group.outcomes("group that agrees").items()} == {0: "", 1: ""}
    lines = the_error(group.outcomes("group that does not"), "RanksDisagreeError", (1, 2))
    assert lines[1] == "rank 1 against rank 2:"


def test_a_dead_rank_is_named_in_time(group: Group) -> None:
    outcomes = group.outcomes("rank 2 is dead")
    assert the_error(outcomes, "RanksMissingError", (0, 1)) == [f"rank 2 did not answer within {IMPATIENT_S:g} s"]
    assert all(IMPATIENT_S <= outcome.elapsed_s < 3 * IMPATIENT_S for outcome in outcomes.values())


@pytest.mark.parametrize("scene", ["rank 0 dies", "rank 0 is dead"])
def test_the_death_of_the_rank_that_keeps_the_store_ends_the_waiting(group: Group, scene: str) -> None:
    outcomes = group.outcomes(scene)
    (line, *_) = the_error(outcomes, "RanksMissingError", (1,))
    assert "store does not answer" in line
    assert outcomes[1].elapsed_s < PATIENT_S / 2


def test_a_store_in_a_file_serves_as_well(file_group: Group) -> None:
    assert {rank: o.error for rank, o in file_group.outcomes("same").items()} == dict.fromkeys(RANKS, "")
    assert the_error(file_group.outcomes("another table"), "RanksDisagreeError")[1] == "rank 0, 2 against rank 1:"
    lines = the_error(file_group.outcomes("rank 0 is dead"), "RanksMissingError", (1, 2))
    assert lines == [f"rank 0 did not answer within {IMPATIENT_S:g} s"]


def test_all_ranks_know_of_a_difference_before_it_ends_one(tmp_path: Path) -> None:
    group = Group(scene_of_an_error_that_ends_rank_0, free_address(), tmp_path)
    the_error(group.outcomes("another table"), "RanksDisagreeError")


def test_without_a_process_group_it_says_what_to_call_first(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="init_process_group"):
        asked(write_file(TABLE, tmp_path / "rowwise.yaml")).agree()


def test_a_rank_that_comes_late_does_not_believe_that_all_agree(tmp_path: Path) -> None:
    outcomes = Group(scene_of_a_rank_that_comes_late, free_address(), tmp_path).outcomes("late")
    assert [outcomes[rank].error for rank in RANKS] == ["RanksMissingError"] * 3
    assert outcomes[0].message == f"rank 2 did not answer within {IMPATIENT_S:g} s"
    assert outcomes[2].message.startswith("rank 0, 1 gave up before this rank answered")


def test_nothing_decided_is_nothing_to_agree_on(tmp_path: Path) -> None:
    path = write_file(TABLE, tmp_path / "t.yaml")
    with pytest.raises(ValueError, match=r"^agree: nothing is decided yet; call check\(model\) first$"):
        auto_filter("rowwise", tokens=TOKENS, tables=path).agree()
